"""FlashMLA's Python interface (flash_mla/flash_mla_interface.py), in NumPy.

Sparse attention only. A schedule is a holder that the first call fills and that all layers of a
step can share.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from fastdeploy import _counters, _fp8, _tree
from fastdeploy._arrays import host, tensor_of

# csrc/api/sparse_fwd.h and sparse_decode.h
HEADS = (64, 128)
WIDTH, LATENT = 576, 512
# a test of upstream's numbers may lift the limit; the real kernels have none to lift
any_heads = False


class FlashMLASchedMeta:
    """A schedule, empty until the first call that it is given to."""

    def __init__(self) -> None:
        self.config: tuple[Any, ...] | None = None


def _attend(
    q: np.ndarray, keys: np.ndarray, chosen: np.ndarray, scale: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Output, largest logit and log-sum-exp of each token and head.

    A token without a key has output 0 and a log-sum-exp of +inf.
    """
    num_tokens, num_heads = q.shape[:2]
    out = np.zeros((num_tokens, num_heads, LATENT), np.float32)
    largest = np.full((num_tokens, num_heads), -np.inf, np.float32)
    lse = np.full((num_tokens, num_heads), np.inf, np.float32)
    for t in range(num_tokens):
        seen = keys[chosen[t][(chosen[t] >= 0) & (chosen[t] < len(keys))]]
        if len(seen):
            logits = scale * (q[t] @ seen.T)
            largest[t] = logits.max(-1)
            weights = np.exp(logits - largest[t][:, None])
            total = weights.sum(-1, keepdims=True)
            out[t] = weights / total @ seen[:, :LATENT]
            lse[t] = largest[t] + np.log(total[:, 0])
    return out, largest, lse


def _check_query(op: str, q: Any, ndim: int) -> None:
    heads, width = q.shape[-2:]
    if q.ndim != ndim or width != WIDTH or str(q.dtype) != f"paddle.{_tree.dtype()}":
        raise RuntimeError(f"{op}: q is {q.dtype} {q.shape}")
    if heads not in HEADS and not any_heads:
        raise RuntimeError(f"Unsupported h_q: {heads}")


def _check_indices(op: str, indices: Any, shape: tuple[int, ...]) -> None:
    if str(indices.dtype) != "paddle.int32" or tuple(indices.shape[: len(shape)]) != shape:
        raise RuntimeError(f"{op}: indices is {indices.dtype} {indices.shape}, not int32 {shape}")


def flash_mla_sparse_fwd(
    q: Any,
    kv: Any,
    indices: Any,
    sm_scale: float,
) -> tuple[Any, Any, Any]:
    """Attention of tokens over chosen rows of `kv`.

    Args:
        q: bfloat16 [s_q, h_q, 576]; kv: bfloat16 [s_kv, 1, 576].
        indices: int32 [s_q, 1, topk]; below 0 or past the keys = none.

    Returns:
        output [s_q, h_q, 512], largest logits and log-sum-exp [s_q, h_q].
    """
    op = "flash_mla_sparse_fwd"
    _counters.launch(op)
    _check_query(op, q, 3)
    if list(kv.shape[1:]) != [1, WIDTH]:
        raise RuntimeError(f"{op}: kv {kv.shape}")
    _check_indices(op, indices, (q.shape[0], 1))
    out, largest, lse = _attend(host(q), host(kv)[:, 0], host(indices)[:, 0], sm_scale)
    return (
        tensor_of(out, q.place, q.dtype),
        tensor_of(largest, q.place),
        tensor_of(lse, q.place),
    )


def get_mla_metadata() -> tuple[FlashMLASchedMeta, None]:
    """An empty holder."""
    return FlashMLASchedMeta(), None


def flash_mla_with_kvcache(
    q: Any,
    k_cache: Any,
    block_table: Any,
    cache_seqlens: Any,
    head_dim_v: int,
    tile_scheduler_metadata: Any,
    num_splits: Any,
    softmax_scale: float,
    causal: bool,
    is_fp8_kvcache: bool,
    indices: Any,
) -> tuple[Any, Any]:
    """Attention of [b, s_q, h_q, 576] queries over chosen slots of the cache.

    Args:
        indices: int32 [b, s_q, topk] slots, -1 = none.
        tile_scheduler_metadata: a holder; its first call makes the schedule, all later ones
            must be of the same sizes.

    Returns:
        output [b, s_q, h_q, 512] and log-sum-exp [b, h_q, s_q].
    """
    op, holder = "flash_mla_with_kvcache", tile_scheduler_metadata
    if not isinstance(holder, FlashMLASchedMeta) or num_splits is not None:
        raise RuntimeError(f"{op}: needs the holder of get_mla_metadata")
    config = (*q.shape[:3], k_cache.shape[1], indices.shape[-1], is_fp8_kvcache)
    if holder.config is None:
        _counters.launch("flash_mla_schedule")
        holder.config = config
    assert holder.config == config, f"schedule of {holder.config} used for {config}"
    _counters.launch(op)
    _check_query(op, q, 4)
    if causal or not is_fp8_kvcache:
        raise RuntimeError(f"{op}: sparse attention is not causal and takes an fp8 cache")
    if list(k_cache.shape[1:]) != [_fp8.BLOCK, 1, _fp8.RECORD] or head_dim_v != LATENT:
        raise RuntimeError(f"{op}: k_cache is {k_cache.shape}, head_dim_v {head_dim_v}")
    if str(k_cache.dtype) not in ("paddle.uint8", "paddle.int8", "paddle.float8_e4m3fn"):
        raise RuntimeError(f"{op}: k_cache is {k_cache.dtype}")
    rows, tokens, heads = q.shape[:3]
    _check_indices(op, indices, (rows, tokens))
    chosen = host(indices).reshape(rows * tokens, -1)
    used, place = np.unique(chosen, return_inverse=True)
    records = host(k_cache).view(np.uint8).reshape(-1, _fp8.RECORD)
    # only the records that someone chose are decoded
    keys = _fp8.latent_values(records[used[used >= 0]])
    place = place.reshape(chosen.shape) - int((used < 0).sum())
    out, _, lse = _attend(host(q).reshape(rows * tokens, heads, -1), keys, place, softmax_scale)
    shape = (rows, tokens, heads)
    return (
        tensor_of(out.reshape(*shape, LATENT), q.place, q.dtype),
        tensor_of(lse.reshape(shape).transpose(0, 2, 1), q.place),
    )
