"""Queries of the indexer on a CPU, in NumPy."""

from __future__ import annotations

from typing import Any

import numpy as np

from fd_dsa.ops._fp8 import absolute_maximum, decode_e4m3, index_scale, quantise
from fd_dsa.ops._host import as_numpy, check_writable
from fd_dsa.ops._rope import cos_sin_of, rotate_
from fd_dsa.ops._rope import hadamard as rotate


def prepare_indexer_query(
    q: Any,
    weights: Any,
    position_ids: Any,
    cos_sin_cache: Any,
    *,
    rope_interleave: bool,
    quantized: bool,
    hadamard: bool = False,
    scale_fmt: str | None = "ue8m0",
    weights_scale: float = 1.0,
    out: tuple[Any, Any] | None = None,
) -> tuple[Any, Any]:
    """See `fd_dsa.ops.query.indexer_query`."""
    query, head_weights = as_numpy(q), as_numpy(weights)
    name = "indexer_query"
    for argument, array in zip(("q", "out[0]", "out[1]"), (q, *(out or ())), strict=False):
        check_writable(name, argument, array)
    cos_sin = cos_sin_of(name, position_ids, cos_sin_cache)
    rotate_(query[:, :, : cos_sin.shape[1]], cos_sin, interleaved=rope_interleave)
    if hadamard:
        query = rotate(query)
    if weights_scale != 1.0:
        head_weights = head_weights * np.float32(weights_scale)
    if quantized:
        scale = index_scale(absolute_maximum(query), scale_fmt)
        codes = quantise(query, scale)
        head_weights = head_weights * scale
        wants_codes = out is not None and as_numpy(out[0]).dtype == np.uint8
        query = codes if wants_codes else decode_e4m3(codes)
    if out is None:
        return query, head_weights
    as_numpy(out[0])[...] = query
    as_numpy(out[1])[...] = head_weights
    return out
