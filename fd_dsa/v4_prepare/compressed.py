"""Compressed entries: which a token sees, and the rows where they lie."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from fd_dsa.v4_prepare.config import V4PrepareConfig

Int32Array = npt.NDArray[np.int32]

# entries, those of the longest token for every token, up to which one gather is the faster way
_MAX_GATHERED = 2**15


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
    block_table: npt.NDArray[Any],
    row: Int32Array,
    hca_indptr: Int32Array,
    hca_idx: Int32Array,
) -> None:
    """Fill the rows of all HCA entries that each token sees; what lies behind them is kept.

    The tokens of a request see its first entries, so rows are computed once a request. Short lists
    are made in one masked gather; long ones by a slice copy a token, which moves a row many times
    faster once the call itself no longer counts.

    Args:
        row: [T], request of each token.
        hca_indptr: [T + 1 or more], where the entries of each token start.
    """
    offsets = hca_indptr[: len(row) + 1]
    counts = np.diff(offsets)
    most = int(counts.max(initial=0))
    if most == 0:
        return
    entries = _first_entries(cfg, block_table, most)
    if entries.shape[1] * len(row) <= _MAX_GATHERED:
        seen = np.arange(entries.shape[1], dtype=np.int32) < counts[:, None]
        hca_idx[: offsets[-1]] = entries[row][seen]
        return
    bounds = offsets.tolist()
    for request, at, stop in zip(row.tolist(), bounds, bounds[1:], strict=False):
        hca_idx[at:stop] = entries[request, : stop - at]


def _first_entries(
    cfg: V4PrepareConfig, block_table: npt.NDArray[Any], count: int
) -> npt.NDArray[Any]:
    """[B, count or more]: rows of the first HCA entries of every request, blocks permitting."""
    per_block = cfg.block_size // cfg.hca_ratio
    blocks = block_table[:, : -(-count // per_block)].astype(np.int32)
    if per_block == 1:
        blocks += cfg.comp_base
        return blocks
    blocks *= per_block
    blocks += cfg.comp_base
    inside = np.arange(per_block, dtype=np.int32)
    return (blocks[:, :, None] + inside).reshape(len(blocks), -1)
