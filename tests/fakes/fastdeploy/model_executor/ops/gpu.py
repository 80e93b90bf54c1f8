"""The compiled operators that the runner and FastDeploy's own layers call, in NumPy and in place.

custom_ops/gpu_ops: get_position_ids*.cu, fused_rotary_position_encoding.cu, and the signals of
disaggregation, which only count. Those of FastDeploy's own DSA path are not here.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import paddle

from fastdeploy import _counters, _tree
from fastdeploy._arrays import host, writable


def _check_dtype(op: str, name: str, tensor: Any, expected: str) -> None:
    found = str(tensor.dtype).rpartition(".")[2]
    if found != expected:
        raise ValueError(f"{op}: {name} is {found}, the kernel takes {expected}")


def get_position_ids_and_mask_encoder_batch(
    seq_lens_encoder: Any, seq_lens_decoder: Any, seq_lens_this_time: Any, position_ids: Any
) -> None:
    """Positions of each row's tokens in a buffer of the step (#7367)."""
    op = "get_position_ids_and_mask_encoder_batch"
    _counters.launch(op)
    _check_dtype(op, "position_ids", position_ids, _tree.current().position_dtype)
    starts, counts = (host(x).reshape(-1) for x in (seq_lens_decoder, seq_lens_this_time))
    found = [start + np.arange(count) for start, count in zip(starts, counts, strict=False)]
    with writable(position_ids) as positions:
        # what would be past the buffer is dropped
        values = np.concatenate([np.empty(0, np.int64), *found])[: len(positions)]
        positions[: len(values)] = values


def fused_rotary_position_encoding(
    query: Any, key: Any, position_ids: Any, cos_sin_cache: Any, rotary_dim: int, is_neox: bool
) -> None:
    """Rotate the first `rotary_dim` values of each head of both tensors, in place.

    Args:
        query, key: [T, ..., head_dim]; rows past the positions stay.
        position_ids: [T], in the dtype of the tree's position operator.
        cos_sin_cache: [positions, rotary_dim], cos then sin.
        is_neox: must be False: pairs are neighbours.
    """
    op = "fused_rotary_position_encoding"
    _counters.launch(op)
    _check_dtype(op, "position_ids", position_ids, _tree.current().position_dtype)
    assert not is_neox, "the double pairs neighbours, as all of FastDeploy's callers do"
    angles = host(cos_sin_cache)[host(position_ids).reshape(-1)]
    first, second = slice(0, rotary_dim, 2), slice(1, rotary_dim, 2)
    for tensor in (query, key):
        shape = (len(angles), *[1] * (tensor.ndim - 2), rotary_dim // 2)
        cos, sin = (x.reshape(shape) for x in np.split(angles.astype(np.float32), 2, axis=-1))
        with writable(tensor) as values:
            rows = values[: len(angles)]
            a, b = rows[..., first].copy(), rows[..., second].copy()
            rows[..., first], rows[..., second] = a * cos - b * sin, b * cos + a * sin


def init_kv_signal_per_query(
    seq_lens_encoder: Any,
    seq_lens_this_time: Any,
    seq_lens_decoder: Any,
    rank: int,
    num_layers: int,
) -> Any:
    """Signals that a prefill instance sends of each request's layers."""
    _counters.launch("init_kv_signal_per_query")
    return paddle.zeros([1], "int32")


def init_signal_layerwise(kv_signal_metadata: Any, layer_id: int) -> Any:
    """The signal of one layer."""
    _counters.launch("init_signal_layerwise")
    return paddle.zeros([1], "int32")


def open_shm_and_get_meta_signal(rank: int, device_id: int, keep_pd_step_flag: bool) -> Any:
    """The shared memory in which the signals are kept."""
    _counters.launch("open_shm_and_get_meta_signal")
    return paddle.zeros([1], "int32")
