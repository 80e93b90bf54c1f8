"""Indexer scores on a CPU: keys gathered by NumPy, GEMMs by Paddle.

Rows of a decode step have different lengths. Padding to the longest row wastes work, and a GEMM for
each block is too small for the matrix library. So each row is cut into units of a few blocks (about
256 keys), and all units form one batched GEMM.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from fd_dsa.ops.arrays import Scratch, as_numpy
from fd_dsa.ops.fixed_order import fixed_order, two_rows
from fd_dsa.ops.fp8 import decode_e4m3
from fd_dsa.ops.host_gemm import batched
from fd_dsa.ops.host_rows import gather_index_blocks, gather_index_keys
from fd_dsa.ops.key_bounds import key_bounds
from fd_dsa.step import ForwardMeta
from fd_dsa.tensor import Array

UNIT_KEYS = 256
"""Number of keys that are gathered and scored as one unit."""
TILE_BYTES = 8 << 20
"""Memory of the keys or scores of one pass, in bytes."""


@dataclass(frozen=True, slots=True)
class PagedUnits:
    """Units of `blocks_per_unit` blocks of decode rows, the same for all layers of a step.

    Attributes:
        row: int64 [num_units]; row of each unit.
        blocks: int64 [num_units, blocks_per_unit]; physical blocks, 0 past the end of the row.
        column: int64 [num_units]; index of the unit in its row.
        num_rows: number of rows.
        units_per_row: maximum number of units of a row.
        block_size: keys of a block.
    """

    row: np.ndarray
    blocks: np.ndarray
    column: np.ndarray
    num_rows: int
    units_per_row: int
    block_size: int

    @property
    def unit_keys(self) -> int:
        return self.blocks.shape[1] * self.block_size

    @property
    def width(self) -> int:
        return self.units_per_row * self.unit_keys

    @classmethod
    def build(cls, lengths: np.ndarray, block_tables: np.ndarray, block_size: int) -> PagedUnits:
        """Cut rows with `lengths` keys (int [num_rows], all > 0) into units."""
        longest = -(-int(lengths.max()) // block_size)
        per_unit = min(longest, max(1, UNIT_KEYS // block_size))
        counts = -(-lengths.astype(np.int64) // (per_unit * block_size))
        row = np.repeat(np.arange(len(counts)), counts)
        first = np.cumsum(counts) - counts
        column = np.arange(len(row)) - first[row]
        logical = column[:, None] * per_unit + np.arange(per_unit)[None, :]
        inside = logical * block_size < lengths[row][:, None]
        # the minimum only concerns entries that `inside` replaces
        logical = np.minimum(logical, block_tables.shape[1] - 1)
        blocks = np.where(inside, block_tables[row[:, None], logical], 0).astype(np.int64)
        return cls(row, blocks, column, len(counts), int(counts.max()), block_size)


def weighted_scores(q: np.ndarray, weights: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """Return the scores of queries against keys, float32 [batch, queries, num_keys].

    Args:
        q: [batch, queries, heads, dim].
        weights: [batch, queries, heads].
        keys: [batch, num_keys, dim].
    """
    batch, queries, heads, dim = q.shape
    rows = weights.reshape(batch * queries, 1, heads)
    if fixed_order():
        rows = two_rows(rows)
    # the caller handles keys that are not finite
    with np.errstate(invalid="ignore"):
        dots = batched(q.reshape(batch, queries * heads, dim), keys, transpose_y=True)
        np.clip(dots, 0.0, np.inf, out=dots)
        summed = batched(rows, dots.reshape(batch * queries, heads, -1))
    return summed[:, 0].reshape(batch, queries, -1)


def _scaled(scores: np.ndarray, scales: np.ndarray | None) -> np.ndarray:
    """Multiply `scores` by the scales of their keys, in place."""
    if scales is not None:
        # unused slots may hold any bits
        with np.errstate(invalid="ignore", over="ignore"):
            scores *= scales
    return scores


def score_gathered(
    q: Array, weights: Array, cache: Array, key_slots: np.ndarray, scratch: Scratch | None = None
) -> np.ndarray:
    """Score every query against the keys at `key_slots`, in tiles of keys to bound memory.

    Args:
        q: float32 [num_queries, index_n_heads, index_head_dim], with RoPE. For an fp8_ds_mla cache
            it has the values of the codes.
        weights: float32 [num_queries, index_n_heads]; head weights, which include all scales.
        cache, key_slots, scratch: as for `gather_index_keys`.

    Returns:
        float32 [num_queries, num_keys], valid until the next call with `scratch`. The caller
        applies windows.
    """
    queries, heads, dim = q.shape
    scratch = scratch or Scratch()
    q_rows, w_rows, blocks = as_numpy(q)[None], as_numpy(weights)[None], as_numpy(cache)
    logits = scratch.take("gathered_logits", (queries, len(key_slots)))
    step = max(1, TILE_BYTES // (4 * max(dim, queries * heads)))
    for start in range(0, len(key_slots), step):
        tile = slice(start, start + step)
        slots = key_slots[tile]
        keys = scratch.take("indexer_keys", (len(slots), dim))
        scales = gather_index_keys(blocks, slots, keys, scratch)
        scores = weighted_scores(q_rows, w_rows, keys[None])[0]
        logits[:, tile] = _scaled(scores, scales)
    return logits


def score_paged(
    q: Array, weights: Array, cache: Array, units: PagedUnits, scratch: Scratch | None = None
) -> np.ndarray:
    """Score the queries of decode rows against the blocks of their rows.

    Args:
        q, weights: as for `score_gathered`, with two axes [num_rows, queries_per_row] of queries.

    Returns:
        float32 [num_rows, queries_per_row, units.width], a column for each position in the row.
        Columns past a row's keys have any values. Valid until the next call with `scratch`.
    """
    blocks, q_rows, w_rows = as_numpy(cache), as_numpy(q), as_numpy(weights)
    _, queries, _, dim = q_rows.shape
    scratch = scratch or Scratch()
    logits = scratch.take(
        "paged_logits", (units.num_rows, queries, units.units_per_row, units.unit_keys)
    )
    step = max(1, TILE_BYTES // (units.unit_keys * dim * 4))
    for start in range(0, len(units.row), step):
        tile = slice(start, start + step)
        row, index = units.row[tile], units.blocks[tile].ravel()
        keys = scratch.take("indexer_keys", (len(index), units.block_size, dim))
        scales = gather_index_blocks(blocks, index, keys, scratch)
        if units.num_rows == 1 and not fixed_order():
            # the units of one row are contiguous, so one GEMM scores them
            scores = weighted_scores(q_rows, w_rows, keys.reshape(1, -1, dim))
            if scales is not None:
                scales = scales.reshape(1, 1, -1)
            columns = logits.reshape(1, queries, -1)[:, :, start * units.unit_keys :]
            columns[:, :, : scores.shape[2]] = _scaled(scores, scales)
            continue
        unit_keys = keys.reshape(len(row), units.unit_keys, dim)
        scores = weighted_scores(q_rows[row], w_rows[row], unit_keys)
        if scales is not None:
            scales = scales.reshape(len(row), 1, units.unit_keys)
        logits[row, :, units.column[tile]] = _scaled(scores, scales)
    return logits.reshape(units.num_rows, queries, units.width)


def score_step(q: Array, weights: Array, cache: Array, step: ForwardMeta, logits: Array) -> None:
    """Write the scores of a step to `logits`, as `fd_dsa.ops.logits.indexer_logits` describes."""
    query, head_weights, blocks, out = map(as_numpy, (q, weights, cache, logits))
    if query.dtype == np.uint8:
        query = decode_e4m3(query)
    tables, starts = map(as_numpy, (step.block_tables, step.cu_seqlens_q))
    first_keys, key_ends = key_bounds(step, int(starts[-1]))
    block_size, scratch = blocks.shape[1], Scratch()
    for row, (begin, end) in enumerate(pairwise(starts.tolist())):
        if begin == end:
            continue
        tokens = slice(begin, end)
        keys = np.arange(key_ends[tokens].max())
        slots = tables[row, keys // block_size].astype(np.int64) * block_size + keys % block_size
        scores = score_gathered(query[tokens], head_weights[tokens], blocks, slots, scratch)
        seen = (keys >= first_keys[tokens, None]) & (keys < key_ends[tokens, None])
        np.copyto(out[tokens, : len(keys)], scores, where=seen)
