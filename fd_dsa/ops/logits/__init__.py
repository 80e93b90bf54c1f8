"""Lightning-indexer scores: I[t, s] = scale[s] * sum_h w[t, h] * relu(q[t, h] . k[s])."""

from __future__ import annotations

from typing import Any

from fd_dsa.cache_formats import INDEX_WIDTH
from fd_dsa.ops.arrays import (
    CACHE_DTYPES,
    cache_format,
    check_array,
    check_shape,
    dtype_name,
    result,
)
from fd_dsa.ops.logits.tile_configs import unsupported_reason
from fd_dsa.ops.providers import TENSOR_CORE, activation_dtypes, call, device_kind, select_provider
from fd_dsa.step import ForwardMeta
from fd_dsa.tensor import Array

__all__ = ["indexer_logits"]
_NAME = "indexer_logits"


def indexer_logits(
    q: Array, weights: Array, cache: Array, step: ForwardMeta, out: Array | None = None
) -> Any:
    """Score every token of a step against the keys of its own row, directly from the cache blocks.

    out[t, s] = scale[s] * sum_h weights[t, h] * relu(q[t, h] . k[s])

    A token of a decode row has scores for the positions s from 0 to its own. A prompt token has
    scores for the positions of its window, `[ks, ke)` of `step.indexer_attn_mask_offsets` less the
    start of its row's keys in `step.cu_seqlens_kg`.

    Args:
        q: [num_tokens, index_n_heads, index_head_dim], with RoPE: float32, on a device also
            bfloat16. For an fp8_ds_mla cache uint8, the e4m3 codes of `indexer_query`.
        weights: float32 [num_tokens, index_n_heads], which include all scales of the query.
        cache: the layer's indexer cache with the keys of the step. float32 or bfloat16
            (or int16, its bits) [num_blocks, block_size, index_head_dim], or uint8
            [num_blocks, 64, 132] for fp8_ds_mla.
        step: result of `step_metadata`.
        out: float32 [num_tokens, width], contiguous, width at least `step.max_seqlen_k`. Entries
            outside of a token's window stay as they are. None allocates, with -inf there.

    Returns:
        `out`.

    Raises:
        ShapeError, DtypeError: an argument is not as above. It is raised before any work.
        MissingStepError: the step has prompt tokens and no windows.
        ConfigError, BackendUnavailable: FD_DSA_OP_PROVIDER, see `providers.select_provider`.

    Source: DeepSeek-V3.2 (arXiv 2512.02556) §2, eq. 1; the FP8 form is that of DeepGEMM's
    fp8_mqa_logits.
    """
    check_array(_NAME, "cache", cache, (None, None, None), CACHE_DTYPES)
    num_tokens, is_fp8 = step.position_ids.shape[0], cache_format(cache).is_fp8
    dtypes = ("uint8",) if is_fp8 else activation_dtypes(q)
    check_array(_NAME, "q", q, (num_tokens, None, INDEX_WIDTH if is_fp8 else None), dtypes)
    row = cache_format(cache).indexer_row(q.shape[2])
    check_shape(_NAME, "cache", cache, (None, None, row))
    check_array(_NAME, "weights", weights, tuple(q.shape[:2]), ("float32",))
    shape = num_tokens, max(step.max_seqlen_k, 1)
    out = result(_NAME, out, q, shape, "float32", fill=float("-inf"))
    cache_dtype = cache_format(cache).name if is_fp8 else dtype_name(cache.dtype)
    reason = unsupported_reason(
        cache_dtype, dtype_name(q.dtype), cache.shape[1], q.shape[1], q.shape[2]
    )
    kind = device_kind(q)

    def provider() -> str:
        return select_provider(_NAME, kind, {TENSOR_CORE: reason}).provider

    if num_tokens:
        call(_NAME, kind, provider, q, weights, cache, step, out)
    else:
        # a requested provider that is unsupported is an error for a step without tokens too
        provider()
    return out
