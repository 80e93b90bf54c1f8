"""Operators for attention over selected keys in MLA's absorbed form, and for dequantization.

The functions after the public ones run them on a CPU, in NumPy.
"""

from __future__ import annotations

from dataclasses import dataclass
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
from fd_dsa.ops.host_gemm import batched
from fd_dsa.ops.host_rows import gather_latents
from fd_dsa.ops.providers import activation_dtypes, call, device_kind, function, select_provider
from fd_dsa.tensor import Array

__all__ = ["dequantize", "sparse_mla"]

TILE_BYTES = 8 << 20
"""Maximum bytes of the latents that one pass gathers."""
# a row that attends to an infinite or NaN key becomes NaN, and the sampler reports it
_quiet = np.errstate(invalid="ignore", over="ignore")
# magnitude of scores whose exp is far from the limits of float32
_SMALL = np.float32(40.0)
# lists up to this length form one group
_FEW_KEYS = 32
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
    """Attend to the cache slots that each token's row names.

    out[t, h] = sum_s softmax_s(softmax_scale * q[t, h] . kv[s]) * kv[s, :kv_lora_rank]

    Args:
        q: float32, on a device also bfloat16, [num_tokens, num_heads, kv_lora_rank + rope_dim];
            absorbed queries whose last part is rotated.
        cache: the layer's latent cache, [..., row] with one row for each slot: float32, bfloat16 or
            int16 (bfloat16 bits) of the width of q, or uint8 with row = 656, fp8_ds_mla records.
        slots: int32 [num_tokens, topk]; unused entries are -1, after all others.
        softmax_scale: factor of the scores.
        kv_lora_rank: width of the value part; 512 for records.
        out: [num_tokens, num_heads, kv_lora_rank] float32, on a device also bfloat16, contiguous;
            None allocates, with the dtype of q.

    Returns:
        `out`, with zeros for a row without a slot.

    Raises:
        ShapeError, DtypeError: an argument is not as above, before any work.
        ValueError: on a CPU, a slot below -1 or past the cache. A device ignores such a slot.
        ConfigError, BackendUnavailable: FD_DSA_OP_PROVIDER, see `providers.select_provider`.

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
        selected = partial(select_provider, name, kind)
    else:
        # imported only if there is a device, because it loads kernels
        from fd_dsa.ops.mla.tensor_core import select_attention
        from fd_dsa.triton_runtime.device_api import traits_for

        assert not isinstance(q, np.ndarray)
        capability = traits_for(q).capability
        selected = partial(select_attention, kind, *sizes, capability, allocator_beside(q))
    if num_tokens and num_heads:
        how = {"softmax_scale": softmax_scale, "kv_lora_rank": kv_lora_rank}
        call(name, kind, lambda: selected().provider, q, cache, slots, out, **how)
    else:
        # a provider that was asked for and cannot serve is an error for no token, too
        selected()
    return out


def dequantize(cache: Array, slots: Array, out: Array | None = None) -> Any:
    """Return keys of a latent cache of any format as float32.

    The first 512 values of an fp8_ds_mla record are float32(code) * scale. The last 64 values are
    its bfloat16 numbers.

    Args:
        cache: [num_slots, row]: float32, bfloat16, int16 (bfloat16 bits), or uint8 with row = 656.
        slots: int64 [num_keys].
        out: float32 [num_keys, width of a key], contiguous; None allocates.

    Returns:
        `out`.

    Raises:
        ShapeError, DtypeError: an argument is not as above, before any work.
        ValueError: on a CPU, a slot outside the cache. On a device the key of such a slot is zeros.
        ConfigError, BackendUnavailable: FD_DSA_OP_PROVIDER, see `providers.select_provider`.

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
    function(name, select_provider(name, kind).provider)(cache, slots, out)
    return out


def _check_cache(operator: str, cache: Array, width: int) -> None:
    """Check that the rows of a cache are keys of `width` values."""
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
    """Apply the softmax to the last axis in place. A row of only -inf becomes zeros.

    Args:
        scores: float32 [n, heads, num_keys].
        mask: float32 [n, num_keys], added to the scores of all heads; None = 0.
        sinks: float32 [heads], logit of one more key of each head, whose weight is dropped.
    """
    # the maximum of each row takes longer than exp, and few scores need it
    max_sink = -np.inf if sinks is None else sinks.max()
    is_small = not fixed_order() and max(scores.max(), -scores.min(), max_sink) < _SMALL
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
    """Return queries times the factor of the scores."""
    return as_numpy(query) if factor == 1.0 else as_numpy(query) * np.float32(factor)


def _weighted(probabilities: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """Multiply `probabilities` [n, rows, num_keys] by `keys`: [n, rows, width]."""
    return weighted_sum(probabilities, keys) if fixed_order() else batched(probabilities, keys)


@dataclass(frozen=True, slots=True)
class KeyGroup:
    """Queries with a similar number of keys.

    Attributes:
        tokens: all queries, or the places of these, int64 [n].
        index: int64 [n, longest list of the group], slots without -1.
        mask: float32 like `index`, 0 or -inf; None if all entries are valid.
    """

    tokens: slice | np.ndarray
    index: np.ndarray
    mask: np.ndarray | None


class KeyLists:
    """Slots of each query's keys in the form of `attend_gathered`, shared by layers.

    A query gathers as many keys as the longest list of its group, which is at most twice as long
    as its own or `_FEW_KEYS`. So one long row does not slow down the short rows of a batch.

    Args:
        slots: int32 [num_tokens, topk], -1 = no key. The first entry of a row with keys is one.

    Attributes:
        groups: all queries, by the length of their lists.
        is_empty: bool [num_tokens], True for a row without a slot; None if every row has one.
    """

    def __init__(self, slots: np.ndarray) -> None:
        self.is_empty: np.ndarray | None = None
        self.groups: list[KeyGroup] = []
        if not len(slots):
            return
        seen = slots >= 0
        if seen.all():
            self.groups.append(KeyGroup(slice(None), slots.astype(np.int64), None))
            return
        is_empty = ~seen[:, 0]
        if is_empty.any():
            self.is_empty = is_empty
        ends = np.where(is_empty, 1, slots.shape[1] - seen[:, ::-1].argmax(axis=1))
        # an unused entry reads the row's first key, which is finite if the row's result is
        index = np.where(seen, slots, np.maximum(slots[:, :1], 0)).astype(np.int64)
        sizes = np.ceil(np.log2(np.maximum(ends, _FEW_KEYS)))
        found = np.unique(sizes)
        for size in found:
            at = slice(None) if len(found) == 1 else (sizes == size).nonzero()[0]
            width = ends[at].max()
            is_full = seen[at, :width]
            mask = None if is_full.all() else np.where(is_full, _SEEN, _HIDDEN)
            self.groups.append(KeyGroup(at, index[at, :width], mask))


@_quiet
def attend_gathered(
    q: Array,
    cache: Array,
    indices: Array | KeyLists,
    *,
    softmax_scale: float,
    kv_lora_rank: int,
    scratch: Scratch | None = None,
    sinks: np.ndarray | None = None,
) -> np.ndarray:
    """Attend to the cache slots that each query's row of `indices` names.

    Args:
        q: float32 [num_tokens, num_heads, kv_lora_rank + qk_rope_head_dim], absorbed queries.
        cache: [num_slots, row]: float32, int16 (bfloat16 bits) or uint8 (fp8_ds_mla records).
        indices: KeyLists, or the slots to make them of.
        softmax_scale: factor of the scores.
        kv_lora_rank: width of the value part.
        scratch: buffers to reuse between calls; None = new ones.
        sinks: float32 [num_heads], logit of a key without a value, for each head; None = without.

    Returns:
        float32 [num_tokens, num_heads, kv_lora_rank], zeros for a row without a slot.
    """
    latents, query, scratch = as_numpy(cache), _scaled(q, softmax_scale), scratch or Scratch()
    lists = indices if isinstance(indices, KeyLists) else KeyLists(as_numpy(indices))
    num_tokens, heads, width = query.shape
    out = np.empty((num_tokens, heads, kv_lora_rank), np.float32)
    for group in lists.groups:
        own, (count, num_keys) = query[group.tokens], group.index.shape
        found = out if len(lists.groups) == 1 else np.empty((count, *out.shape[1:]), np.float32)
        step = max(1, TILE_BYTES // (num_keys * width * 4))
        for start in range(0, count, step):
            tile = slice(start, start + step)
            index = group.index[tile]
            kv = scratch.take("latents", (*index.shape, width))
            gather_latents(latents, index.ravel(), kv.reshape(-1, width), scratch)
            probabilities = batched(own[tile], kv, transpose_y=True)
            _softmax(probabilities, None if group.mask is None else group.mask[tile], sinks)
            found[tile] = _weighted(probabilities, kv[:, :, :kv_lora_rank])
        if found is not out:
            out[group.tokens] = found
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
    """Attend as `attend_gathered` for neighbouring tokens that share a short list of keys.

    One GEMM multiplies all queries by all keys, and `mask` hides keys that are not selected. This
    is cheaper than a gather for each token if the list is not much longer than the selection.

    Args:
        key_slots: int64 [num_keys], slots of the cache.
        mask: float32 [num_tokens, num_keys], 0 for selected keys, else -inf. Each row has a 0.
        q, cache, softmax_scale, kv_lora_rank, scratch, sinks: see `attend_gathered`.
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
    """Attend as `sparse_mla`, on a CPU, to `out`. Valid slots are first."""
    rows = as_numpy(cache)
    rows = rows.reshape(-1, rows.shape[-1])
    as_numpy(out)[...] = attend_gathered(q, rows, slots, **options)


def dequantize_on_host(cache: Array, slots: Array, out: Array) -> None:
    """Dequantize as `dequantize`, on a CPU, to `out`."""
    gather_latents(as_numpy(cache), as_numpy(slots), as_numpy(out), Scratch())
