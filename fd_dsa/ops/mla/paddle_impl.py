"""Sparse MLA on a CPU: latents gathered by NumPy, products and softmax by Paddle."""

from __future__ import annotations

from typing import Any

import numpy as np

from fd_dsa.ops.arrays import Scratch, as_numpy
from fd_dsa.ops.fixed_order import fixed_order, row_sums, weighted_sum
from fd_dsa.ops.gather import gather_latents
from fd_dsa.ops.host_gemm import batched
from fd_dsa.tensor import Array

TILE_BYTES = 8 << 20
"""Memory of the latents that one pass gathers."""
# a row that attends to an infinite or NaN key becomes NaN, which is for the sampler to report
_quiet = np.errstate(invalid="ignore", over="ignore")
# scores whose exp is far from a float32's least and most
_SMALL = np.float32(40.0)
_HIDDEN, _SEEN = np.float32(-np.inf), np.float32(0.0)


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


def attend_slots(q: Array, cache: Array, slots: Array, out: Array, **options: Any) -> None:
    """See `fd_dsa.ops.mla.sparse_mla`, with a result to write; valid slots come first."""
    rows = as_numpy(cache)
    rows = rows.reshape(-1, rows.shape[-1])
    as_numpy(out)[...] = attend_gathered(q, rows, slots, **options)


def dequantize(cache: Array, slots: Array, out: Array) -> None:
    """See `fd_dsa.ops.mla.dequantize`, with a result to write."""
    gather_latents(as_numpy(cache), as_numpy(slots), as_numpy(out), Scratch())
