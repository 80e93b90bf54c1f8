"""Operator that joins the latent part and the rotated part of MLA's absorbed query."""

from __future__ import annotations

from typing import Any

import numpy as np

from fd_dsa.ops.arrays import (
    as_numpy,
    check_array,
    check_dtype,
    check_rope,
    check_shape,
    check_writable,
    dtype_name,
)
from fd_dsa.ops.host_rows import cos_sin_of, rotate_
from fd_dsa.ops.providers import activation_dtypes, selected_function
from fd_dsa.tensor import Array

__all__ = ["prepare_mla_query"]

_NAME = "prepare_mla_query"


def prepare_mla_query(
    q_latent: Array,
    q_pe: Array,
    position_ids: Array | None,
    cos_sin_cache: Array,
    out: Array | None = None,
) -> Any:
    """Join both parts of the queries for sparse MLA, and rotate the second part.

    out[t, h] = q_latent[t, h], then RoPE(q_pe[t, h]) in interleaved pairs

    The rotation is float32, and each product is rounded before the sum. So a CPU and a device give
    the same bytes. The inputs are not changed.

    Args:
        q_latent: float32, on a device also bfloat16, [num_tokens, num_heads, kv_lora_rank]; may be
            a view of [num_heads, num_tokens, kv_lora_rank], as a GEMM by heads returns it.
        q_pe: of the same dtype, [num_tokens, num_heads, rope_dim]; may be the end of wider heads.
        position_ids: int64 [num_tokens], rows of `cos_sin_cache`. None = row t belongs to token t,
            for a step that gathers the rows once for all layers. A device clamps positions to the
            table.
        cos_sin_cache: float32 [max_position, rope_dim], cos in the first half, sin in the second.
        out: [num_tokens, num_heads, kv_lora_rank + rope_dim] of the same dtype, on a device
            contiguous; None allocates.

    Returns:
        `out`, or a new array (NumPy on a CPU) without one.

    Raises:
        ShapeError, DtypeError: an argument is not as above.
        ValueError: on a CPU, a position outside `cos_sin_cache` or a read-only `out`. All errors up
            to here are raised before any work.
        BackendUnavailable: the device has no kernel.
        LaunchError: on a device, a tensor that must be contiguous has gaps.

    Cost on a device: one launch, which reads each input once.

    Source: DeepSeek-V2 (arXiv 2405.04434) §2.1, absorbed as in its appendix.
    """
    check_shape(_NAME, "q_latent", q_latent, (None, None, None))
    check_dtype(_NAME, "q_latent", q_latent, activation_dtypes(q_latent))
    num_tokens, num_heads, rank = q_latent.shape
    same = (dtype_name(q_latent.dtype),)
    check_array(_NAME, "q_pe", q_pe, (num_tokens, num_heads, None), same)
    rope_dim = q_pe.shape[2]
    check_rope(_NAME, position_ids, cos_sin_cache, num_tokens, rope_dim)
    check_shape(_NAME, "cos_sin_cache", cos_sin_cache, (None, rope_dim))
    if out is not None:
        check_array(_NAME, "out", out, (num_tokens, num_heads, rank + rope_dim), same)
    return selected_function("mla_query", q_latent)(
        q_latent, q_pe, position_ids, cos_sin_cache, out
    )


def prepare_on_host(
    q_latent: Array,
    q_pe: Array,
    position_ids: Array | None,
    cos_sin_cache: Array,
    out: Array | None = None,
) -> Any:
    """Prepare queries as `prepare_mla_query`, on a CPU by NumPy."""
    if out is not None:
        check_writable(_NAME, "out", out)
    cos_sin = cos_sin_of(_NAME, position_ids, cos_sin_cache)
    parts = as_numpy(q_latent), as_numpy(q_pe)
    query = np.concatenate(parts, axis=-1, out=None if out is None else as_numpy(out))
    rotate_(query[..., parts[0].shape[-1] :], cos_sin, interleaved=True)
    return query if out is None else out
