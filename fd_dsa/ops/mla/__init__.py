"""Attention over the selected keys only, in MLA's absorbed (latent) form."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from fd_dsa.cache_formats import LATENT_RECORD_BYTES, LATENT_WIDTH, ROPE_WIDTH
from fd_dsa.errors import ShapeError
from fd_dsa.ops.arrays import (
    CACHE_DTYPES,
    Scratch,
    allocator_beside,
    as_numpy,
    cache_format,
    check_array,
    check_dtype,
    check_shape,
    check_values,
    dtype_name,
    result,
)
from fd_dsa.ops.fixed_order import fixed_order, row_sums, weighted_sum
from fd_dsa.ops.gather import gather_latents
from fd_dsa.ops.host_gemm import batched
from fd_dsa.ops.providers import activation_dtypes, call, choose, device_kind, function
from fd_dsa.tensor import Array

__all__ = ["dequantize", "sparse_mla"]

TILE_BYTES = 8 << 20
"""Memory of the latents that one pass gathers."""
# a row that attends to an infinite or NaN key becomes NaN, which is for the sampler to report
_quiet = np.errstate(invalid="ignore", over="ignore")
# scores whose exp is far from a float32's least and most
_SMALL = np.float32(40.0)
_HIDDEN, _SEEN = np.float32(-np.inf), np.float32(0.0)


def sparse_mla(
    q: Array,
    cache: Array,
    slots: Array,
    *,
    softmax_scale: float,
    kv_lora_rank: int = LATENT_WIDTH,
    out: Array | None = None,
) -> Any:
    """Attention of each token over the cache slots that its row names.

    out[t, h] = sum_s softmax_s(softmax_scale * q[t, h] . kv[s]) * kv[s, :kv_lora_rank]

    Args:
        q: float32, on a device also bfloat16, [num_tokens, num_heads, kv_lora_rank + rope_dim];
            absorbed, its last part rotated.
        cache: the layer's latent cache, [..., row] with a row a slot: float32 or bfloat16 (or
            int16, its bits) of the width of q, or uint8 with row = 656, fp8_ds_mla records.
        slots: int32 [num_tokens, topk]; -1 = none, after all others.
        softmax_scale: factor of the scores.
        kv_lora_rank: width of the value part; 512 with records.
        out: [num_tokens, num_heads, kv_lora_rank] float32, on a device also bfloat16, contiguous;
            None allocates, of the dtype of q.

    Returns:
        `out`; zeros where a row names no slot.

    Raises:
        ShapeError, DtypeError: an argument is not as above; before any work.
        ValueError: on a CPU, a slot below -1 or past the cache; a device leaves it out.
        ConfigError, BackendUnavailable: FD_DSA_OP_PROVIDER, see `fd_dsa.ops.providers.choose`.

    Source: DeepSeek-V2 (arXiv 2405.04434) §2.1, over the keys chosen as in arXiv 2512.02556.
    """
    name, dtypes = "sparse_mla", activation_dtypes(q)
    check_array(name, "q", q, (None, None, None), dtypes)
    num_tokens, num_heads, width = q.shape
    _check_cache(name, cache, width)
    is_fp8 = cache_format(cache).is_fp8
    allowed = [LATENT_WIDTH] if is_fp8 else range(1, width + 1)
    if kv_lora_rank not in allowed:
        rule = "an fp8_ds_mla cache has 512" if is_fp8 else f"allowed is 1 to {width}"
        raise ShapeError(f"{name}: kv_lora_rank is {kv_lora_rank}, {rule}")
    check_array(name, "slots", slots, (num_tokens, None), ("int32",))
    if out is not None:
        check_dtype(name, "out", out, dtypes)
    dtype = dtype_name((q if out is None else out).dtype)
    out = result(name, out, q, (num_tokens, num_heads, kv_lora_rank), dtype)
    kind = device_kind(q)
    stored = cache_format(cache).name
    sizes = num_heads, dtype_name(q.dtype), stored, kv_lora_rank, width - kv_lora_rank
    if kind == "cpu":
        check_values(name, "slots", as_numpy(slots), -1, as_numpy(cache)[..., 0].size)
        choice = partial(choose, name, kind)
    else:
        # kernels are loaded only where there is a device
        from fd_dsa.ops.mla.custom_op import choose_attention
        from fd_dsa.triton_runtime.device_api import traits_for

        assert not isinstance(q, np.ndarray)
        capability = traits_for(q).capability
        choice = partial(choose_attention, kind, *sizes, capability, allocator_beside(q))
    if num_tokens and num_heads:
        how = {"softmax_scale": softmax_scale, "kv_lora_rank": kv_lora_rank}
        call(name, kind, lambda: choice().provider, q, cache, slots, out, **how)
    else:
        # a provider that was asked for and cannot serve is an error for no token, too
        choice()
    return out


def dequantize(cache: Array, slots: Array, out: Array | None = None) -> Any:
    """Keys of a latent cache as float32, whatever it stores.

    Of an fp8_ds_mla record the first 512 values are float32(code) * scale, the last 64 its
    bfloat16.

    Args:
        cache: [num_slots, row]: float32 or bfloat16 (or int16, its bits), or uint8 with row = 656.
        slots: int64 [num_keys].
        out: float32 [num_keys, width of a key], contiguous; None allocates.

    Returns:
        `out`.

    Raises:
        ShapeError, DtypeError: an argument is not as above; before any work.
        ValueError: on a CPU, a slot outside the cache; on a device its key is zeros.
        ConfigError, BackendUnavailable: FD_DSA_OP_PROVIDER, see `fd_dsa.ops.providers.choose`.

    Source: FlashMLA (README, "FP8 KV cache") for the record.
    """
    name = "dequantize"
    check_array(name, "cache", cache, (None, None), CACHE_DTYPES)
    is_fp8 = cache_format(cache).is_fp8
    width = LATENT_WIDTH + ROPE_WIDTH if is_fp8 else cache.shape[1]
    _check_cache(name, cache, width)
    check_array(name, "slots", slots, (None,), ("int64",))
    out = result(name, out, cache, (slots.shape[0], width), "float32")
    kind = device_kind(cache)
    if kind == "cpu":
        check_values(name, "slots", as_numpy(slots), 0, cache.shape[0])
    function(name, choose(name, kind).provider)(cache, slots, out)
    return out


def _check_cache(operator: str, cache: Array, width: int) -> None:
    """Refuse a cache whose rows are not keys of so many values."""
    check_dtype(operator, "cache", cache, CACHE_DTYPES)
    if cache_format(cache).is_fp8:
        if width != LATENT_WIDTH + ROPE_WIDTH:
            raise ShapeError(
                f"{operator}: an fp8_ds_mla cache has keys of {LATENT_WIDTH + ROPE_WIDTH} values, "
                f"q has {width}"
            )
        width = LATENT_RECORD_BYTES
    check_shape(operator, "cache", cache, (*(None,) * (len(cache.shape) - 1), width))


def _softmax(scores: np.ndarray, mask: np.ndarray | None, sinks: np.ndarray | None) -> None:
    """Softmax of the last axis in place; a row of -inf alone becomes zeros.

    Args:
        scores: [n, heads, num_keys].
        mask: [n, num_keys]; is added to the scores of all heads; None = 0.
        sinks: [heads]; logit of one more key of each head, whose weight is dropped.
    """
    # the maximum of each row takes longer than exp, and few scores need it
    most = -np.inf if sinks is None else sinks.max()
    is_small = not fixed_order() and max(scores.max(), -scores.min(), most) < _SMALL
    top: Any = np.float32(0.0)
    if mask is not None:
        scores += mask[:, None, :]
    if not is_small:
        top = scores.max(axis=-1, keepdims=True)
        top = np.where(np.isneginf(top), np.float32(0.0), top)
        if sinks is not None:
            top = np.maximum(top, sinks[:, None])
        scores -= top
    np.exp(scores, out=scores)
    total = row_sums(scores) if fixed_order() else scores.sum(axis=-1, keepdims=True)
    if sinks is None:
        total[total == 0] = 1.0
    else:
        total += np.exp(sinks[:, None] - top)
    scores /= total


def _scaled(query: Array, factor: float) -> np.ndarray:
    return as_numpy(query) if factor == 1.0 else as_numpy(query) * np.float32(factor)


def _weighted(probabilities: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """[n, rows, width]: `probabilities` [n, rows, num_keys] times `keys`."""
    return weighted_sum(probabilities, keys) if fixed_order() else batched(probabilities, keys)


class KeyLists:
    """Slots of each query's keys, as `attend_gathered` reads them: layers that share them make one.

    Args:
        slots: int32 [num_tokens, topk]; -1 = none, valid entries first.
    """

    def __init__(self, slots: np.ndarray) -> None:
        hidden = slots < 0
        self.mask = self.is_empty = None
        if hidden.any():
            # an unused entry reads its own row's first key: finite if the row's result is
            slots = np.where(hidden, np.maximum(slots[:, :1], 0), slots)
            self.mask = np.where(hidden, _HIDDEN, _SEEN)
            if hidden[:, 0].any():
                self.is_empty = hidden[:, 0]
        self.index = slots.astype(np.int64)


@_quiet
def attend_gathered(
    q: Array,
    cache: Array,
    indices: Array,
    *,
    softmax_scale: float,
    kv_lora_rank: int,
    scratch: Scratch | None = None,
    sinks: np.ndarray | None = None,
) -> np.ndarray:
    """Attention of each query over the cache slots that its row of `indices` names.

    Args:
        q: float32 [num_tokens, num_heads, kv_lora_rank + qk_rope_head_dim]; absorbed query.
        cache: [num_slots, row]: float32 or int16 (bfloat16 bits), or fp8_ds_mla records, uint8.
        indices: slots of the cache: KeyLists, or its argument.
        softmax_scale: factor of the scores.
        kv_lora_rank: width of the value part.
        scratch: buffers to reuse between calls; None = new ones.
        sinks: float32 [num_heads]; logit of a key without a value, of each head; None = no such.

    Returns:
        float32 [num_tokens, num_heads, kv_lora_rank]; zeros where a row is all -1.
    """
    latents, query, scratch = as_numpy(cache), _scaled(q, softmax_scale), scratch or Scratch()
    lists = indices if isinstance(indices, KeyLists) else KeyLists(as_numpy(indices))
    (num_tokens, topk), width, mask = lists.index.shape, query.shape[2], lists.mask
    out = np.empty((num_tokens, query.shape[1], kv_lora_rank), np.float32)
    step = max(1, TILE_BYTES // max(1, topk * width * 4))
    for start in range(0, num_tokens, step):
        tile = slice(start, start + step)
        index = lists.index[tile]
        kv = scratch.take("latents", (*index.shape, width))
        gather_latents(latents, index.ravel(), kv.reshape(-1, width), scratch)
        probabilities = batched(query[tile], kv, transpose_y=True)
        _softmax(probabilities, None if mask is None else mask[tile], sinks)
        out[tile] = _weighted(probabilities, kv[:, :, :kv_lora_rank])
    if lists.is_empty is not None:
        out[lists.is_empty] = 0.0
    return out


@_quiet
def attend_dense(
    q: Array,
    cache: Array,
    key_slots: np.ndarray,
    mask: np.ndarray,
    *,
    softmax_scale: float,
    kv_lora_rank: int,
    scratch: Scratch | None = None,
    sinks: np.ndarray | None = None,
) -> np.ndarray:
    """The result of `attend_gathered` for neighbouring tokens that share a short list of keys.

    One GEMM of all queries with all `key_slots`, where `mask` leaves the selected ones: cheaper
    than a gather per token while the list is not much longer than the selection.

    Args:
        key_slots: int64 [num_keys]; slots of the cache.
        mask: float32 [num_tokens, num_keys]; 0 where selected, -inf elsewhere; no row all -inf.
        q, cache, softmax_scale, kv_lora_rank, scratch, sinks: as in `attend_gathered`.
    """
    latents, query, scratch = as_numpy(cache), _scaled(q, softmax_scale), scratch or Scratch()
    num_tokens, heads, width = query.shape
    kv = scratch.take("latents", (len(key_slots), width))
    gather_latents(latents, key_slots, kv, scratch)
    rows = query.reshape(1, -1, width)
    mask = as_numpy(mask)

    def attended() -> np.ndarray:
        scores = batched(rows, kv[None], transpose_y=True)
        probabilities = scores.reshape(num_tokens, heads, -1)
        _softmax(probabilities, mask, sinks)
        values = kv[None, :, :kv_lora_rank]
        return _weighted(scores, values).reshape(num_tokens, heads, -1)

    # a hidden key that is not finite makes NaN of its score or its weight
    out = attended()
    if np.isfinite(out).all():
        return out
    spoiled = ~np.isfinite(kv).all(axis=1)
    kv[spoiled] = 0.0
    out = attended()
    out[np.isfinite(mask[:, spoiled]).any(axis=1)] = np.nan
    return out


def attend_on_host(q: Array, cache: Array, slots: Array, out: Array, **options: Any) -> None:
    """See `fd_dsa.ops.mla.sparse_mla`, with a result to write; valid slots come first."""
    rows = as_numpy(cache)
    rows = rows.reshape(-1, rows.shape[-1])
    as_numpy(out)[...] = attend_gathered(q, rows, slots, **options)


def dequantize_on_host(cache: Array, slots: Array, out: Array) -> None:
    """See `fd_dsa.ops.mla.dequantize`, with a result to write."""
    gather_latents(as_numpy(cache), as_numpy(slots), as_numpy(out), Scratch())
