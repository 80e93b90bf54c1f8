"""Attention over the selected keys only, in MLA's absorbed (latent) form."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from fd_dsa.cache_formats import LATENT_RECORD_BYTES, LATENT_WIDTH, ROPE_WIDTH
from fd_dsa.errors import ShapeError
from fd_dsa.ops.arrays import (
    CACHE_DTYPES,
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
from fd_dsa.ops.providers import activation_dtypes, call, choose, device_kind, function
from fd_dsa.tensor import Array

__all__ = ["dequantize", "sparse_mla"]


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
