"""Index keys gathered on a CPU, in NumPy."""

from __future__ import annotations

from typing import Any

import numpy as np

from fd_dsa.ops._gather import index_planes
from fd_dsa.ops._host import as_numpy, check_values, check_writable


def gather_indexer_keys(
    index_cache: Any,
    block_tables: Any,
    cu_seqlens_kg: Any,
    seq_lens_encoder: Any,
    out_k: Any,
    out_scale: Any,
) -> None:
    """See `fd_dsa.ops.indexer_gather.gather_indexer_keys`."""
    cache, tables, starts = as_numpy(index_cache), as_numpy(block_tables), as_numpy(cu_seqlens_kg)
    rows = np.flatnonzero(as_numpy(seq_lens_encoder) > 0)
    _check(cache, tables, starts, rows, out_k, out_scale)
    keys, scales = (cache, None) if out_scale is None else index_planes(cache)
    block_size = cache.shape[1]
    for row in rows:
        start, end = int(starts[row]), int(starts[row + 1])
        blocks = tables[row, : -(-(end - start) // block_size)]
        as_numpy(out_k)[start:end] = keys[blocks].reshape(-1, keys.shape[2])[: end - start]
        if scales is not None:
            as_numpy(out_scale)[start:end] = scales[blocks].reshape(-1)[: end - start]


def _check(
    cache: np.ndarray,
    tables: np.ndarray,
    starts: np.ndarray,
    rows: np.ndarray,
    out_k: Any,
    out_scale: Any,
) -> None:
    """Refuse rows that lie outside the outputs, or pages outside the cache."""
    name, (num_blocks, block_size) = "gather_indexer_keys", cache.shape[:2]
    check_writable(name, "out_k", out_k)
    if out_scale is not None:
        check_writable(name, "out_scale", out_scale)
    check_values(name, "cu_seqlens_kg", starts, 0, out_k.shape[0] + 1)
    lengths = np.diff(starts)
    for row in np.flatnonzero(lengths < 0)[:1]:
        raise ValueError(
            f"{name}: cu_seqlens_kg[{row + 1}] is {starts[row + 1]}, allowed is at least the "
            f"{starts[row]} before it"
        )
    num_pages = -(-lengths // block_size)
    for row in rows:
        if num_pages[row] > tables.shape[1]:
            raise ValueError(
                f"{name}: row {row} has {lengths[row]} keys, its {tables.shape[1]} pages in "
                f"block_tables hold {tables.shape[1] * block_size}"
            )
        pages = tables[row, : num_pages[row]]
        check_values(name, f"block_tables of row {row}: page", pages, 0, num_blocks)
