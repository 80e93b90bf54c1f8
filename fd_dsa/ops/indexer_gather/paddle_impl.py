"""Index keys gathered on a CPU, in NumPy."""

from __future__ import annotations

from typing import Any

import numpy as np

from fd_dsa.ops._gather import index_planes
from fd_dsa.ops._host import as_numpy


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
    keys, scales = (cache, None) if out_scale is None else index_planes(cache)
    block_size = cache.shape[1]
    for row in np.flatnonzero(as_numpy(seq_lens_encoder) > 0):
        start, end = int(starts[row]), int(starts[row + 1])
        blocks = tables[row, : -(-(end - start) // block_size)]
        as_numpy(out_k)[start:end] = keys[blocks].reshape(-1, keys.shape[2])[: end - start]
        if scales is not None:
            as_numpy(out_scale)[start:end] = scales[blocks].reshape(-1)[: end - start]
