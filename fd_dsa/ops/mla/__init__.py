"""Attention over the selected keys only, in MLA's absorbed (latent) form."""

from __future__ import annotations

from typing import Any

from fd_dsa.errors import ShapeError
from fd_dsa.ops._fp8 import LATENT_RECORD_BYTES, LATENT_WIDTH, ROPE_WIDTH
from fd_dsa.ops._host import (
    Scratch,
    as_numpy,
    check_array,
    check_dtype,
    check_shape,
    check_values,
)
from fd_dsa.ops.mla.paddle_impl import attend_dense, attend_gathered

__all__ = ["masked_mla", "sparse_mla"]


def sparse_mla(
    q: Any,
    cache: Any,
    indices: Any,
    *,
    softmax_scale: float,
    kv_lora_rank: int,
    scratch: Scratch | None = None,
) -> Any:
    """Attention of each query over the cache slots that its row of `indices` names.

    out[t, h] = sum_s softmax_s(softmax_scale * q[t, h] . kv[s]) * kv[s, :kv_lora_rank]

    Args:
        q: float32 [num_tokens, num_heads, kv_lora_rank + qk_rope_head_dim]; absorbed query.
        cache: [num_slots, kv_lora_rank + qk_rope_head_dim] float32 or int16 (bfloat16 bits), or
            uint8 [num_slots, 656], fp8_ds_mla records.
        indices: int32 [num_tokens, topk]; physical slots, -1 = none, valid entries first.
        softmax_scale: factor of the scores.
        kv_lora_rank: width of the value part.
        scratch: buffers to reuse between calls.

    Returns:
        float32 [num_tokens, num_heads, kv_lora_rank], a NumPy array; zeros where a row is all -1.

    Raises:
        ShapeError, DtypeError, ValueError (a slot below -1 or past the cache): before any work.
    """
    name = "sparse_mla"
    check_array(name, "q", q, (None, None, None), ("float32",))
    _check_cache(name, cache, q.shape[2], kv_lora_rank)
    check_array(name, "indices", indices, (q.shape[0], None), ("int32",))
    slots = as_numpy(indices)
    check_values(name, "indices", slots, -1, cache.shape[0])
    return attend_gathered(q, cache, slots, softmax_scale, kv_lora_rank, scratch or Scratch())


def masked_mla(
    q: Any,
    cache: Any,
    key_slots: Any,
    mask: Any,
    *,
    softmax_scale: float,
    kv_lora_rank: int,
    scratch: Scratch | None = None,
) -> Any:
    """The same result as `sparse_mla` for neighbouring tokens that share a short list of keys.

    One product of all queries with all `key_slots`, where `mask` leaves the selected ones: cheaper
    than a gather per token while the list is not much longer than the selection.

    Args:
        q, cache, softmax_scale, kv_lora_rank, scratch: as in `sparse_mla`.
        key_slots: int64 [num_keys]; physical slots, all in the cache.
        mask: float32 [num_tokens, num_keys]; 0 where selected, -inf elsewhere; no row all -inf.

    Returns:
        float32 [num_tokens, num_heads, kv_lora_rank], a NumPy array.

    Raises:
        ShapeError, DtypeError, ValueError (a slot outside the cache): before any work.
    """
    name = "masked_mla"
    check_array(name, "q", q, (None, None, None), ("float32",))
    _check_cache(name, cache, q.shape[2], kv_lora_rank)
    check_array(name, "key_slots", key_slots, (None,), ("int64",))
    check_array(name, "mask", mask, (q.shape[0], key_slots.shape[0]), ("float32",))
    slots = as_numpy(key_slots)
    check_values(name, "key_slots", slots, 0, cache.shape[0])
    return attend_dense(q, cache, slots, mask, softmax_scale, kv_lora_rank, scratch or Scratch())


def _check_cache(operator: str, cache: Any, width: int, kv_lora_rank: int) -> None:
    """Refuse a cache whose rows are not keys of the queries' width, or a value part beyond it."""
    check_dtype(operator, "cache", cache, ("float32", "int16", "uint8"))
    if str(cache.dtype).endswith("uint8"):
        if width != LATENT_WIDTH + ROPE_WIDTH:
            raise ShapeError(
                f"{operator}: an fp8_ds_mla cache has keys of {LATENT_WIDTH + ROPE_WIDTH} values, "
                f"q has {width}"
            )
        if kv_lora_rank != LATENT_WIDTH:
            raise ShapeError(
                f"{operator}: kv_lora_rank is {kv_lora_rank}, an fp8_ds_mla cache has "
                f"{LATENT_WIDTH}"
            )
        width = LATENT_RECORD_BYTES
    check_shape(operator, "cache", cache, (None, width))
    if not 0 < kv_lora_rank <= width:
        raise ShapeError(
            f"{operator}: kv_lora_rank is {kv_lora_rank}, allowed is 1 to {width}, the width of q"
        )
