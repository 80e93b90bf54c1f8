"""Compressed entries: which a token sees, and the rows where they lie."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from fd_dsa.v4_prepare.config import V4PrepareConfig

Int32Array = npt.NDArray[np.int32]


def entry_rows(
    cfg: V4PrepareConfig,
    block_table: npt.NDArray[Any],
    row: Int32Array,
    entry: Int32Array,
    ratio: int,
) -> npt.NDArray[Any]:
    """Row of each entry: comp_base + block_table[row, e // n] * n + e % n, n = P // ratio.

    Args:
        block_table: [B, columns].
        row, entry: [n]; request and number of each entry.
    """
    per_block = cfg.block_size // ratio
    block = block_table[row, entry // per_block]
    return cfg.comp_base + block.astype(np.int32, copy=False) * per_block + entry % per_block


def write_offsets(counts: Int32Array, indptr: Int32Array) -> int:
    """Prefix sums of the tokens' list lengths, the last one repeated; the last one."""
    num_tokens = len(counts)
    indptr[0] = 0
    np.cumsum(counts, out=indptr[1 : num_tokens + 1])
    total = int(indptr[num_tokens])
    indptr[num_tokens + 1 :] = total
    return total


def write_csa(
    cfg: V4PrepareConfig,
    position: Int32Array,
    *,
    csa_visible: Int32Array,
    csa_indptr: Int32Array,
) -> int:
    """Fill how many CSA entries each token sees, and the offsets of those it keeps; their sum."""
    num_tokens = len(position)
    visible = csa_visible[:num_tokens]
    np.floor_divide(position + 1, cfg.csa_ratio, out=visible)
    csa_visible[num_tokens:] = 0
    return write_offsets(np.minimum(visible, cfg.index_topk), csa_indptr)


def write_hca_list(
    cfg: V4PrepareConfig,
    ctx: Int32Array,
    q: Int32Array,
    block_table: npt.NDArray[Any],
    hca_idx: Int32Array,
) -> None:
    """Fill the rows of all visible HCA entries, token after token; what lies behind is kept.

    The tokens of a request see the same entries up to the last few, so the rows are computed once
    a request and copied: one copy for all tokens that see equally many.
    """
    ratio, per_block = cfg.hca_ratio, cfg.block_size // cfg.hca_ratio
    at = 0
    for b, (end, count) in enumerate(zip(ctx.tolist(), q.tolist(), strict=True)):
        most, position = end // ratio, end - count
        if count == 0 or most == 0:
            continue
        rows = _first_entry_rows(cfg, block_table[b], most, per_block)
        while position < end:
            visible = (position + 1) // ratio
            # the tokens before the one that finishes the next entry
            after = min(end, (visible + 1) * ratio - 1)
            stop = at + (after - position) * visible
            hca_idx[at:stop].reshape(after - position, visible)[:] = rows[:visible]
            at, position = stop, after


def _first_entry_rows(
    cfg: V4PrepareConfig, blocks: npt.NDArray[Any], count: int, per_block: int
) -> npt.NDArray[Any]:
    """Rows of the first `count` entries of one request."""
    used = blocks[: -(-count // per_block)].astype(np.int32)
    if per_block == 1:
        used += cfg.comp_base
        return used
    first = used * per_block + cfg.comp_base
    return (first[:, None] + np.arange(per_block, dtype=np.int32)).reshape(-1)[:count]
