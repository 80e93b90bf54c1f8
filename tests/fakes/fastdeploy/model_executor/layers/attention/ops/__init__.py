"""`layers/attention/ops`: the signals of disaggregation, by name only."""

from __future__ import annotations

from typing import Any

import paddle


def init_kv_signal_per_query(
    seq_lens_encoder: Any,
    seq_lens_this_time: Any,
    seq_lens_decoder: Any,
    rank: int,
    num_layers: int,
) -> Any:
    """Signals that a prefill instance sends of each request's layers."""
    return paddle.zeros([1], "int32")


def init_signal_layerwise(kv_signal_metadata: Any, layer_id: int) -> Any:
    """The signal of one layer."""
    return paddle.zeros([1], "int32")


def open_shm_and_get_meta_signal(rank: int, device_id: int, keep_pd_step_flag: bool) -> Any:
    """The shared memory in which the signals are kept."""
    return paddle.zeros([1], "int32")
