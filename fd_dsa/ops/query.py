"""Operator that brings queries of the indexer into the format of the keys."""

from __future__ import annotations

from numbers import Real
from typing import Any

import numpy as np

from fd_dsa.cache_formats import INDEX_WIDTH, check_scale_fmt
from fd_dsa.errors import ShapeError
from fd_dsa.ops.arrays import (
    as_numpy,
    check_array,
    check_dtype,
    check_rope,
    check_shape,
    check_writable,
    dtype_name,
    result,
)
from fd_dsa.ops.fp8 import absolute_maximum, decode_e4m3, index_scale, quantise
from fd_dsa.ops.host_rows import cos_sin_of, rotate_
from fd_dsa.ops.host_rows import hadamard as hadamard_rotated
from fd_dsa.ops.providers import activation_dtypes, device_kind, selected_function
from fd_dsa.tensor import Array

__all__ = ["indexer_query"]

_NAME = "indexer_query"


def indexer_query(
    q: Array,
    weights: Array,
    position_ids: Array | None,
    cos_sin_cache: Array,
    *,
    rope_interleave: bool = False,
    quantized: bool = True,
    hadamard: bool = False,
    scale_fmt: str | None = "ue8m0",
    weights_scale: float = 1.0,
    out: tuple[Array, Array] | None = None,
) -> tuple[Any, Any]:
    """Rotate the indexer's queries, quantise them, and fold their scales into the head weights.

    q'[t, h] = RoPE of the first rope_dim values of q[t, h], Hadamard if requested.

    q8[t, h] = e4m3(q'[t, h] / s[t, h]).

    w'[t, h] = (w[t, h] * weights_scale) * s[t, h].

    s = max(absmax, 1e-4) / 448 as for the keys, rounded up to a power of two with "ue8m0". All
    arithmetic is float32, so a CPU and a device give the same bytes. The scores of a token are
    k_scale[s] * sum_h w'[t, h] * relu(q8[t, h] . k8[s]).

    Args:
        q: float32 or bfloat16 [num_tokens, index_n_heads, index_head_dim]; float32 on a CPU.
        weights: float32 or bfloat16 [num_tokens, index_n_heads].
        position_ids: int64 [num_tokens], rows of `cos_sin_cache`. None = row t belongs to token t,
            for a step that gathers the rows once for all layers. A device clamps positions to the
            table.
        cos_sin_cache: float32 [max_position, rope_dim], cos in the first half, sin in the second.
        rope_interleave: True if RoPE pairs neighbours, False if it pairs the two halves.
        quantized: True for e4m3 keys; False only rotates.
        hadamard: `index_hadamard` of the keys in the cache.
        scale_fmt: `index_scale_fmt` of the keys in the cache.
        weights_scale: index_n_heads**-0.5 * index_head_dim**-0.5, or 1 if the weights contain it.
        out: memory of the two results, of their shapes and dtypes. On a CPU the first one may be
            float32, for the values of the codes. None allocates.

    Returns:
        q' of the shape of `q`: e4m3 codes as uint8 if quantised, else of the dtype of `q`; and w',
        float32 [num_tokens, index_n_heads].

    Raises:
        ShapeError, DtypeError: an argument is not as above.
        ConfigError: an unknown scale_fmt.
        ValueError: weights_scale is not a number, or on a CPU a position is outside the table or an
            array is read-only. All errors are raised before any work.
        BackendUnavailable: the device has no kernel.

    Source: DeepSeek-V3.2-Exp, inference/model.py (Indexer).
    """
    check_shape(_NAME, "q", q, (None, None, INDEX_WIDTH if quantized or hadamard else None))
    dtypes = activation_dtypes(q)
    check_dtype(_NAME, "q", q, dtypes)
    check_array(_NAME, "weights", weights, tuple(q.shape[:2]), dtypes)
    check_rope(_NAME, position_ids, cos_sin_cache, q.shape[0], q.shape[2])
    check_scale_fmt("scale_fmt", scale_fmt)
    if isinstance(weights_scale, bool) or not isinstance(weights_scale, Real):
        raise ValueError(f"{_NAME}: weights_scale is {weights_scale!r}, allowed is a number")
    shape = tuple(q.shape)
    if out is None:
        dtype = "uint8" if quantized else dtype_name(q.dtype)
        out = result(_NAME, None, q, shape, dtype), result(_NAME, None, q, shape[:2], "float32")
    elif not isinstance(out, tuple | list) or len(out) != 2:
        raise ShapeError(f"{_NAME}: out is not a pair; pass queries and head weights, or None")
    else:
        codes = ("float32", "uint8") if len(dtypes) == 1 else ("uint8", "float8_e4m3fn")
        check_array(_NAME, "out[0]", out[0], shape, codes if quantized else dtypes)
        check_array(_NAME, "out[1]", out[1], shape[:2], ("float32",))
    return selected_function("indexer_query", q)(
        # a copy, because `prepare_on_host` rotates in place
        as_numpy(q).copy() if device_kind(q) == "cpu" else q,
        weights,
        position_ids,
        cos_sin_cache,
        rope_interleave=rope_interleave,
        quantized=quantized,
        hadamard=hadamard,
        scale_fmt=scale_fmt,
        weights_scale=float(weights_scale),
        out=out,
    )


def prepare_on_host(
    q: Array,
    weights: Array,
    position_ids: Array | None,
    cos_sin_cache: Array,
    *,
    rope_interleave: bool,
    quantized: bool,
    hadamard: bool = False,
    scale_fmt: str | None = "ue8m0",
    weights_scale: float = 1.0,
    out: tuple[Array, Array] | None = None,
) -> tuple[Any, Any]:
    """Prepare queries as `indexer_query`, on a CPU by NumPy.

    `q` is overwritten. Without `out` the queries are returned as float32 values of the codes.
    """
    query, head_weights = as_numpy(q), as_numpy(weights)
    for argument, array in zip(("q", "out[0]", "out[1]"), (q, *(out or ())), strict=False):
        check_writable(_NAME, argument, array)
    cos_sin = cos_sin_of(_NAME, position_ids, cos_sin_cache)
    rotate_(query[:, :, : cos_sin.shape[1]], cos_sin, interleaved=rope_interleave)
    if hadamard:
        query = hadamard_rotated(query)
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
