"""Operators of prefill/decode disaggregation: they only say that they ran."""

from __future__ import annotations

from typing import Any

import paddle

from fastdeploy import _counters


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
