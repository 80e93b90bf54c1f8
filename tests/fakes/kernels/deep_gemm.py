"""DeepGEMM's indexer kernels (csrc/apis/attention.hpp), in NumPy, on SM90.

FastDeploy's "bundled" release takes one length a row. "2026" takes a length a query, which
FastDeploy does not pass, so that release refuses every call.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from fastdeploy import _counters, _fp8, _tree
from fastdeploy._arrays import host, tensor_of

NUM_SMS = 132
PAGED_HEADS = (32, 64)
_ROW_FLOATS = 256
# a test of upstream's numbers may lift the limit; the real kernels have none to lift
any_heads = False


def get_num_sms() -> int:
    """Streaming multiprocessors of the device."""
    return NUM_SMS


def _scores(q: np.ndarray, keys: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """float32 [n, m]: sum over heads of relu(q . k) * weight."""
    dots = np.einsum("nhd,md->nhm", q, keys, optimize=True)
    return np.einsum("nhm,nh->nm", np.maximum(dots, 0), weights, optimize=True)


def _check_fp8(op: str, **tensors: Any) -> None:
    for name, tensor in tensors.items():
        if str(tensor.dtype) != "paddle.float8_e4m3fn":
            raise RuntimeError(f"{op}: {name} is {tensor.dtype}, not e4m3")


def _result(logits: np.ndarray, place: Any) -> Any:
    """The logits in rows of a multiple of 256 floats."""
    rows, columns = logits.shape
    stride = -(-max(columns, 1) // _ROW_FLOATS) * _ROW_FLOATS
    padded = np.full((rows, stride), np.nan, np.float32)
    padded[:, :columns] = logits
    _counters.allocation("logits", padded.nbytes)
    return tensor_of(padded, place)[:, :columns]


def fp8_mqa_logits(
    q: Any,
    kv: tuple[Any, Any],
    weights: Any,
    starts: Any,
    ends: Any,
    clean_logits: bool = True,
    max_seqlen_k: int = 0,
) -> Any:
    """float32 [n, m]; with `max_seqlen_k` [n, max_seqlen_k], columns from the start on."""
    op = "fp8_mqa_logits"
    _counters.launch(op)
    keys, scales = kv
    _check_fp8(op, q=q, kv=keys)
    heads = q.shape[1]
    if 128 % heads or list(weights.shape) != list(q.shape[:2]):
        raise RuntimeError(f"{op}: q {q.shape}, weights {weights.shape}")
    for bound in (starts, ends):
        if str(bound.dtype) != "paddle.int32" or not bound.is_contiguous():
            raise RuntimeError(f"{op}: starts and ends are contiguous int32")
    if max_seqlen_k and clean_logits:
        raise RuntimeError(f"{op}: logits relative to the start cannot be cleaned")
    values = _fp8.decode(host(keys)) * host(scales).reshape(-1, 1)
    scores = _scores(_fp8.decode(host(q)), values, host(weights))
    columns = np.arange(max_seqlen_k or len(values))
    start, end = host(starts)[:, None], host(ends)[:, None]
    absolute = columns + start if max_seqlen_k else np.broadcast_to(columns, scores.shape)
    inside = (absolute >= start) & (absolute < end)
    taken = np.take_along_axis(scores, np.where(inside, absolute, 0), 1) if len(values) else 0.0
    outside = -np.inf if clean_logits else np.nan
    return _result(np.where(inside, taken, outside).astype(np.float32), q.place)


def _lengths(op: str, context_lens: Any) -> np.ndarray:
    """Keys that the last query of each row sees, [b]."""
    ndim = 1 if _tree.current().deep_gemm == "bundled" else 2
    if context_lens.ndim != ndim or str(context_lens.dtype) != "paddle.int32":
        raise RuntimeError(f"{op}: context_lens is {context_lens.shape}, allowed is {ndim}-D int32")
    return host(context_lens)


def get_paged_mqa_logits_metadata(context_lens: Any, block_kv: int, num_sms: int) -> Any:
    """int32 [num_sms + 1, 2]: how the pages of these lengths are shared out."""
    op = "get_paged_mqa_logits_metadata"
    _counters.launch(op)
    lengths = _lengths(op, context_lens)
    if block_kv != _fp8.BLOCK:
        raise RuntimeError(f"{op}: block_kv is {block_kv}, SM90 takes 64")
    schedule = np.zeros((num_sms + 1, 2), np.int32)
    schedule[0] = len(lengths), int(lengths.sum())
    return tensor_of(schedule, context_lens.place)


def fp8_paged_mqa_logits(
    q: Any,
    kv_cache: Any,
    weights: Any,
    context_lens: Any,
    block_table: Any,
    schedule_meta: Any,
    max_context_len: int,
    clean_logits: bool = False,
) -> Any:
    """float32 [b * next_n, max_context_len] of rows in pages."""
    op = "fp8_paged_mqa_logits"
    _counters.launch(op)
    _check_fp8(op, q=q)
    rows, next_n, heads, width = q.shape
    if heads not in PAGED_HEADS and not any_heads:
        raise RuntimeError(f"{op}: {heads} heads, allowed are 32 and 64")
    if list(kv_cache.shape[1:]) != [_fp8.BLOCK, 1, _fp8.INDEX_RECORD]:
        raise RuntimeError(f"{op}: kv_cache is {kv_cache.shape}")
    lengths = _lengths(op, context_lens)
    windows = lengths[:, None] - next_n + 1 + np.arange(next_n)
    if host(schedule_meta)[0].tolist() != [rows, int(lengths.sum())]:
        raise RuntimeError(f"{op}: the schedule was made for other lengths")
    codes, scales = _fp8.index_planes(host(kv_cache))
    queries, head_weights = _fp8.decode(host(q)), host(weights).reshape(rows, next_n, heads)
    outside = -np.inf if clean_logits else np.nan
    logits = np.full((rows, next_n, max_context_len), outside, np.float32)
    for row, window in enumerate(windows):
        length = max(int(window.max(initial=0)), 0)
        blocks = host(block_table)[row, : -(-length // _fp8.BLOCK)]
        keys = _fp8.decode(codes[blocks]) * scales[blocks][..., None]
        scores = _scores(queries[row], keys.reshape(-1, width), head_weights[row])
        for j, seen in enumerate(window):
            logits[row, j, : max(seen, 0)] = scores[j, : max(seen, 0)]
    return _result(logits.reshape(rows * next_n, -1), q.place)
