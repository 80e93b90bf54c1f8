"""`layers/attention/ops`: the compiled operators under the names that backends use."""

from fastdeploy.model_executor.ops.gpu import (
    init_kv_signal_per_query,
    init_signal_layerwise,
    open_shm_and_get_meta_signal,
)

__all__ = ["init_kv_signal_per_query", "init_signal_layerwise", "open_shm_and_get_meta_signal"]
