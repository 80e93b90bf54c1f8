"""Make the indexer's queries ready for the format of the keys."""

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
from fd_dsa.ops.providers import activation_dtypes, device_kind, serving
from fd_dsa.ops.rotations import cos_sin_of, rotate_
from fd_dsa.ops.rotations import hadamard as hadamard_rotated
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

    q' = RoPE of the first rope_dim values, Hadamard where asked for
    q8[t, h] = e4m3(q'[t, h] / s[t, h]), w'[t, h] = (w[t, h] * weights_scale) * s[t, h]

    with s as of the keys: a / 448, a = max(absmax, 1e-4), up to a power of two with "ue8m0". All
    in float32, so a CPU and a device give the same bytes. A token's scores are then
    k_scale[s] * sum_h w'[t, h] * relu(q8[t, h] . k8[s]).

    Args:
        q: float32 or bfloat16 [num_tokens, index_n_heads, index_head_dim]; float32 on a CPU.
        weights: float32 or bfloat16 [num_tokens, index_n_heads].
        position_ids: int64 [num_tokens]; rows of `cos_sin_cache`. None = row t belongs to token t,
            as where a step gathers them once for all layers. A device takes a position outside
            the table for its nearest row.
        cos_sin_cache: float32 [max_position, rope_dim], cos in the first half, sin in the second.
        rope_interleave: pairing of the RoPE.
        quantized: for e4m3 keys; False only rotates.
        hadamard, scale_fmt: those of the keys in the cache.
        weights_scale: a number, index_n_heads**-0.5 * index_head_dim**-0.5; 1 where the weights
            have it.
        out: where to write the two results, of their shapes and types, on a CPU also float32,
            the values of the codes; None allocates.

    Returns:
        (q', w'): quantised uint8, e4m3 codes, else of the dtype of `q`; of its shape. And float32
        [num_tokens, index_n_heads].

    Raises:
        ShapeError, DtypeError, ConfigError (an unknown scale_fmt): before any work.
        ValueError: weights_scale is no number; on a CPU, a position outside `cos_sin_cache` or an
            array that is read-only; before any work.
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
        raise ShapeError(f"{_NAME}: out is no pair, allowed are queries and head weights, or None")
    else:
        codes = ("float32", "uint8") if len(dtypes) == 1 else ("uint8", "float8_e4m3fn")
        check_array(_NAME, "out[0]", out[0], shape, codes if quantized else dtypes)
        check_array(_NAME, "out[1]", out[1], shape[:2], ("float32",))
    return serving("indexer_query", q)(
        # NumPy's form works in the memory of the query
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
    """The same on a CPU, in NumPy; `q` is overwritten, and without `out` values are returned."""
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
