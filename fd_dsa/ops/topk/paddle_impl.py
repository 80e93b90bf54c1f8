"""Top-k on a CPU: one selection over 64-bit keys that hold the score and the position."""

from __future__ import annotations

import numpy as np

from fd_dsa.ops.arrays import as_numpy
from fd_dsa.tensor import Array

_SIGN = np.uint32(0x80000000)
_LOW = np.uint64(0xFFFFFFFF)
_NONE = np.int32(np.iinfo(np.int32).max)
TILE_KEYS = 1 << 20
"""Scores that one pass selects from."""


def ordered_bits(scores: np.ndarray) -> np.ndarray:
    """uint32 image of float32 `scores`: larger = higher score; -0.0 equals +0.0."""
    # adding +0.0 turns -0.0 into +0.0 and leaves everything else; unused columns may be anything
    with np.errstate(invalid="ignore"):
        bits = (scores + np.float32(0.0)).view(np.uint32)
    return np.where(bits & _SIGN, ~bits, bits | _SIGN)


def select_positions(logits: Array, lengths: Array, k: int) -> np.ndarray:
    """Positions of the k best columns of each row, int32 [num_rows, k]; see `topk_indices`.

    Nothing is checked.
    """
    scores, lengths = as_numpy(logits), as_numpy(lengths)
    rows, width = scores.shape
    out = np.full((rows, k), -1, np.int32)
    take = min(k, width)
    if rows == 0 or take == 0:
        return out
    # a key has twice the bytes of a score: rows come in tiles that bound them
    step = max(1, TILE_KEYS // width)
    for start in range(0, rows, step):
        tile = slice(start, start + step)
        out[tile, :take] = _best_columns(scores[tile], lengths[tile], take)
    return out


def _best_columns(scores: np.ndarray, lengths: np.ndarray, take: int) -> np.ndarray:
    """int32 [rows, take]: best columns of each row, ascending, -1 last.

    By keys that are larger for a higher score, then for a lower column: the upper half is the image
    of the score, NaN lowest, the lower half the complement of the column. Tie rule:
    docs/concepts/dsa.md, "The selection is exact".
    """
    width = scores.shape[1]
    image = ordered_bits(scores)
    image[np.isnan(scores)] = 0
    keys = image.astype(np.uint64) << np.uint64(32)
    keys |= _LOW - np.arange(width, dtype=np.uint64)
    # a valid key is never 0
    keys[np.arange(width)[None, :] >= lengths[:, None]] = 0
    if take < width:
        keys = np.partition(keys, width - take, axis=1)[:, width - take :]
    positions = (_LOW - (keys & _LOW)).astype(np.int32)
    positions[keys == 0] = _NONE
    positions.sort(axis=1)
    positions[positions == _NONE] = -1
    return positions


def positions_to_slots(
    positions: np.ndarray, batch_ids: np.ndarray, block_tables: np.ndarray, block_size: int
) -> np.ndarray:
    """Cache slots, int32 [num_rows, k], of request-local positions; -1 stays -1.

    slot = block_tables[b, p // block_size] * block_size + p % block_size

    Args:
        positions: int32 [num_rows, k], -1 = none.
        batch_ids: int [num_rows]; row of `block_tables`.
        block_tables: int32 [num_reqs, max_blocks].
    """
    block = block_tables[batch_ids[:, None], positions // block_size]
    return np.where(positions >= 0, block * block_size + positions % block_size, -1).astype(
        np.int32
    )


def select_slots(
    logits: Array,
    position_ids: Array,
    batch_id_per_token: Array,
    block_tables: Array,
    slots: Array,
    *,
    block_size: int,
    num_blocks: int,
) -> None:
    """See `triton_kernel.select_slots`, for all tokens and rows of at most `width` keys."""
    rows, tables, out = map(as_numpy, (batch_id_per_token, block_tables, slots))
    lengths = np.where(rows < 0, 0, np.minimum(as_numpy(position_ids) + 1, logits.shape[1]))
    positions = select_positions(logits, lengths, out.shape[1])
    # what is no block of the cache, or past the table, has no slot
    tables = np.where((tables >= 0) & (tables < num_blocks), tables, -1)
    positions[positions >= tables.shape[1] * block_size] = -1
    found = positions_to_slots(positions, np.maximum(rows, 0), tables, block_size)
    out[...] = np.maximum(found, -1)
