"""Where DeepSeek-V4's attention finds the tokens of a step, and their keys and entries."""

from __future__ import annotations

from typing import NamedTuple

from fd_dsa.tensor import Tensor


class TokenPlaces(NamedTuple):
    """Places of a step's tokens, int32, see `fd_dsa.v4_prepare.V4Arrays`.

    Attributes:
        positions, rows: [num_tokens or more], position and row, -1 = padding.
        starts: [num_rows + 1], first token of each row.
        block_table: [num_rows, columns].
    """

    positions: Tensor
    rows: Tensor
    starts: Tensor
    block_table: Tensor


class Windows(NamedTuple):
    """Window keys of a layer, or their FP8 records (uint8, see `v4_records.py`).

    Attributes:
        keys: [num_tokens, width], keys of the step's tokens.
        ring: [num_rows * ring_rows, width], older keys by position modulo `ring_rows`.
        ring_rows, size: keys of a row's ring, and keys that a token sees with its own.
    """

    keys: Tensor
    ring: Tensor
    ring_rows: int
    size: int


class Entries(NamedTuple):
    """Compressed entries of a layer.

    Attributes:
        pool: [num_blocks, entries of a block, width], or their FP8 records.
        ratio: tokens of an entry.
        slots: int32 [num_tokens, topk], selected entries as slots of the pool; None = all entries.
    """

    pool: Tensor
    ratio: int
    slots: Tensor | None = None


class PlainKeys(NamedTuple):
    """Values of the keys and entries of some rows, which their tokens read instead of records.

    The first three are float32 tensors, whose memory has rows of bfloat16 values.

    Attributes:
        keys, ring: rows with the numbers of those of `Windows`.
        pool: [num_slots, width], rows with the slots of `block_table`.
        is_plain: int32 [num_rows], 0 = tokens of the row read records.
        block_table: int32 [num_rows, columns], blocks of each row, in `pool` if the row is plain.
            The slots of `Entries` are those of this table.
        num_slots: rows of `pool`.
    """

    keys: Tensor
    ring: Tensor
    pool: Tensor
    is_plain: Tensor
    block_table: Tensor
    num_slots: int
