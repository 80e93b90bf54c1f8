"""`layers/attention/ops`: the compiled operators under the names that backends use."""

from __future__ import annotations

from typing import Any

from fastdeploy.model_executor.ops import gpu


def get_block_shape_and_split_kv_block(*args: Any) -> Any:
    """Calls the tree's operator, whichever form it has."""
    return gpu.get_block_shape_and_split_kv_block(*args)


def init_kv_signal_per_query(*args: Any) -> Any:
    return gpu.init_kv_signal_per_query(*args)


def init_signal_layerwise(*args: Any) -> Any:
    return gpu.init_signal_layerwise(*args)


def open_shm_and_get_meta_signal(*args: Any) -> Any:
    return gpu.open_shm_and_get_meta_signal(*args)
