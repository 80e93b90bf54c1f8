"""Operator for exact, deterministic top-k of indexer logits.

The functions after `topk_indices` run it on a CPU, in NumPy.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from fd_dsa.errors import ShapeError
from fd_dsa.ops.arrays import allocator_beside, as_numpy, check_array, check_values, result
from fd_dsa.ops.key_bounds import positions_to_slots
from fd_dsa.ops.providers import device_kind, function, select_provider
from fd_dsa.tensor import Array

__all__ = ["topk_indices"]
_NAME = "topk_indices"
_SIGN = np.uint32(0x80000000)
_LOW = np.uint64(0xFFFFFFFF)
_NONE = np.int32(np.iinfo(np.int32).max)
TILE_KEYS = 1 << 20
"""Maximum scores that one pass selects from."""


def topk_indices(
    logits: Array,
    lengths: Array,
    k: int,
    *,
    batch_ids: Array | None = None,
    block_tables: Array | None = None,
    block_size: int | None = None,
    num_blocks: int | None = None,
    out: Array | None = None,
) -> Any:
    """Return the positions of the k best columns of each row, or the cache slots of their keys.

    Columns are ranked by higher score, then by lower position. -0.0 equals +0.0, and NaN ranks
    below every number. The result depends only on the scores, not on atomics or the order of
    threads. Entries of a row ascend by position. A row with fewer than k columns ends with -1.

    Args:
        logits: float32 [num_rows, width]. Columns at or past a row's length are ignored.
        lengths: int32 or int64 [num_rows], valid columns of each row, 0 to width. Only a CPU checks
            the range.
        k: entries of a row, at least 1.
        batch_ids: int32 [num_rows], row of `block_tables`, -1 = padding; None without
            `block_tables`.
        block_tables: int32 [num_requests, max_blocks]; None = return positions.
        block_size: tokens of a block; None without `block_tables`.
        num_blocks: blocks of the cache; None without `block_tables`. Keys of table entries outside
            the cache give -1.
        out: int32 [num_rows, k], contiguous; None allocates.

    Returns:
        `out`.

    Raises:
        ShapeError, DtypeError, ValueError: an argument is not as above, before any work.
        ConfigError, BackendUnavailable: FD_DSA_OP_PROVIDER, see `providers.select_provider`.

    Cost on a device: three launches without a wait; one of them is the selection.
    Source: DeepSeek-V3.2 (arXiv 2512.02556) §2; order: docs/concepts/dsa.md.
    """
    check_array(_NAME, "logits", logits, (None, None), ("float32",))
    num_rows, width = logits.shape
    check_array(_NAME, "lengths", lengths, (num_rows,), ("int32", "int64"))
    numbers = {"block_size": block_size, "num_blocks": num_blocks}
    for name, value in {"batch_ids": batch_ids, **numbers}.items():
        if (value is None) != (block_tables is None):
            raise ShapeError(
                f"{_NAME}: {name} is {value} and block_tables {type(block_tables).__name__}, "
                "allowed are batch_ids, block_tables, block_size and num_blocks, or None for all"
            )
    for name, value in {"k": k, **numbers}.items():
        if value is not None and value < 1:
            raise ValueError(f"{_NAME}: {name} is {value}, allowed is at least 1")
    if block_tables is not None:
        check_array(_NAME, "batch_ids", batch_ids, (num_rows,), ("int32",))
        check_array(_NAME, "block_tables", block_tables, (None, None), ("int32",))
    out, kind = result(_NAME, out, logits, (num_rows, k), "int32"), device_kind(logits)
    if kind == "cpu":
        check_values(_NAME, "lengths", as_numpy(lengths), 0, width + 1)
        lengths = as_numpy(lengths)
    if block_tables is None:
        # one block of all positions, so that slots are positions
        block_size, num_blocks = 1 << max(width - 1, 1).bit_length(), 1
        batch_ids, block_tables = (
            result(_NAME, None, logits, shape, "int32", fill=0) for shape in ((num_rows,), (1, 1))
        )
    if num_rows:
        places = {"block_size": block_size, "num_blocks": num_blocks}
        positions = lengths.astype("int64") - 1
        if kind == "cpu":
            provider = select_provider("topk", kind).provider
        else:
            # imported only if there is a device, because it loads the library
            from fd_dsa.ops.topk.custom_op import select_topk

            assert not isinstance(logits, np.ndarray)
            provider = select_topk(kind, allocator_beside(logits)).provider
        select = function("topk", provider)
        select(logits, positions, batch_ids, block_tables, out, **places)
    return out


def ordered_bits(scores: np.ndarray) -> np.ndarray:
    """Map float32 `scores` to uint32 in the same order. -0.0 equals +0.0."""
    # adding +0.0 changes only -0.0, to +0.0; unused columns may have any bits
    with np.errstate(invalid="ignore"):
        bits = (scores + np.float32(0.0)).view(np.uint32)
    return np.where(bits & _SIGN, ~bits, bits | _SIGN)


def select_positions(logits: Array, lengths: Array, k: int) -> np.ndarray:
    """Return the positions of the k best columns of each row as `topk_indices`, without checks."""
    scores, lengths = as_numpy(logits), as_numpy(lengths)
    rows, width = scores.shape
    out = np.full((rows, k), -1, np.int32)
    take = min(k, width)
    if rows == 0 or take == 0:
        return out
    # tiles of rows bound the memory of keys, which have twice the bytes of scores
    step = max(1, TILE_KEYS // width)
    for start in range(0, rows, step):
        tile = slice(start, start + step)
        out[tile, :take] = _best_columns(scores[tile], lengths[tile], take)
    return out


def _best_columns(scores: np.ndarray, lengths: np.ndarray, take: int) -> np.ndarray:
    """Return the best columns of each row: int32 [rows, take], ascending, -1 last.

    One partition selects by 64-bit keys. The upper half of a key is the image of the score, with
    NaN as the lowest. The lower half is the complement of the column, so that a lower column wins a
    tie, see docs/concepts/dsa.md, "The selection is exact".
    """
    width = scores.shape[1]
    image = ordered_bits(scores)
    image[np.isnan(scores)] = 0
    keys = image.astype(np.uint64) << np.uint64(32)
    keys |= _LOW - np.arange(width, dtype=np.uint64)
    # 0 is below every valid key
    keys[np.arange(width)[None, :] >= lengths[:, None]] = 0
    if take < width:
        keys = np.partition(keys, width - take, axis=1)[:, width - take :]
    positions = (_LOW - (keys & _LOW)).astype(np.int32)
    positions[keys == 0] = _NONE
    positions.sort(axis=1)
    positions[positions == _NONE] = -1
    return positions


def select_on_host(
    logits: Array,
    position_ids: Array,
    batch_id_per_token: Array,
    block_tables: Array,
    slots: Array,
    *,
    block_size: int,
    num_blocks: int,
) -> None:
    """Select as `triton_kernel.select_slots`, on a CPU, for rows of at most `width` keys."""
    rows, tables, out = map(as_numpy, (batch_id_per_token, block_tables, slots))
    lengths = np.where(rows < 0, 0, np.minimum(as_numpy(position_ids) + 1, logits.shape[1]))
    positions = select_positions(logits, lengths, out.shape[1])
    # blocks outside the cache, and positions past the table, have no slot
    tables = np.where((tables >= 0) & (tables < num_blocks), tables, -1)
    positions[positions >= tables.shape[1] * block_size] = -1
    found = positions_to_slots(positions, np.maximum(rows, 0), tables, block_size)
    out[...] = np.maximum(found, -1)
