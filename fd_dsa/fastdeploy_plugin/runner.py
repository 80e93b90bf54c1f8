"""Hooks of FastDeploy's GPUModelRunner: the host's knowledge of a step.

The hooks do five things:

- tell the backend if a step may have a prefill row;
- share one backend among all layers;
- keep FastDeploy from replacing the backend's positions and slots;
- make caches of bytes;
- release references to caches before they are freed, and read weights again after a reload.

The tail of a padded graph needs no hook. The backend leaves padding past a step's tokens, so a
graph of a larger size finds slot -1 there.

Source: FastDeploy's `worker/gpu_model_runner.py` (#7367, #8041, #8060), read at 39d329f2.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fd_dsa.errors import ConfigError
from fd_dsa.fastdeploy_plugin.backend import PluginBackend
from fd_dsa.fastdeploy_plugin.settings import replaced
from fd_dsa.ops.arrays import dtype_name
from fd_dsa.runner import DSAModelRunnerMixin


class FastDeployRunnerMixin(DSAModelRunnerMixin):  # type: ignore[misc]
    """Hooks of a GPUModelRunner, from which `take_over` derives the runner's class."""

    backend_class = PluginBackend
    model_config: Any
    share_inputs: Any
    # passes of the dummy run in progress, None outside of a dummy run
    _num_dummy_passes: int | None = None

    def step_hints(self) -> bool | None:
        """Return True if the next step may have a prefill row, None if that is unknown.

        A dummy run is one pass over whole prompts, then decode passes.
        """
        if self._num_dummy_passes is not None:
            self._num_dummy_passes += 1
            if self._num_dummy_passes == 1:
                return True
        exists = getattr(self, "exist_prefill", None)
        return bool(exists()) if callable(exists) else None

    def _dummy_run(self, *args: object, **kwargs: object) -> Any:
        """Count the passes of a dummy run for `step_hints`."""
        self._num_dummy_passes = 0
        try:
            return super()._dummy_run(*args, **kwargs)
        finally:
            self._num_dummy_passes = None

    def _initialize_attn_backend(self, *args: object, **kwargs: object) -> Any:
        """Share one backend among all layers, for which FastDeploy makes one each (#8041).

        Positions get the dtype of the runner's own buffer, because FastDeploy may read them too.
        """
        result = super()._initialize_attn_backend(*args, **kwargs)
        self.attn_backends[:] = self.attn_backends[:1] * len(self.attn_backends)
        dtype = dtype_name(self.share_inputs["position_ids_buffer"].dtype)
        self.attn_backends[0].serve_runner(dtype)
        return result

    def _compute_position_ids_and_slot_mapping(self, *args: object, **kwargs: object) -> Any:
        """Keep the backend's positions and slots, which it has made from the same rows.

        FastDeploy would replace them. Its slots of padding are slots of the last row, to which a
        captured graph would write.
        """

    def initialize_kv_cache(self, *args: object, **kwargs: object) -> Any:
        """Make the caches as bytes, with each of FastDeploy's cache managers.

        V0's loop that creates caches uses the model's dtype for them (#8060).

        Raises:
            ConfigError: the caches are not two tensors of bytes a layer.
        """
        self._drop_step_state()
        with replaced(self.model_config, dtype="uint8"):
            result = super().initialize_kv_cache(*args, **kwargs)
        found = [dtype_name(cache.dtype) for cache in self.share_inputs["caches"]]
        if found != ["uint8"] * 2 * self.model_config.num_hidden_layers:
            raise ConfigError(
                f"caches: FastDeploy has made {len(found)} of {', '.join(sorted(set(found)))}; DSA "
                f"needs two of uint8 for each of {self.model_config.num_hidden_layers} layers; "
                "start it without quantization of the KV cache"
            )
        return result

    def clear_cache(self, *args: object, **kwargs: object) -> Any:
        """Release the newest step, which refers to the caches."""
        self._drop_step_state()
        return super().clear_cache(*args, **kwargs)

    def update_parameters(self, *args: object, **kwargs: object) -> Any:
        """Read the copies of weights again after RL has loaded other weights."""
        return self._refreshed(super().update_parameters, args, kwargs)

    def update_weights(self, *args: object, **kwargs: object) -> Any:
        """Read the copies of weights again after a transfer of other weights."""
        return self._refreshed(super().update_weights, args, kwargs)

    def wakeup(self, *args: object, **kwargs: object) -> Any:
        """Read the copies of weights again after a wake-up."""
        return self._refreshed(super().wakeup, args, kwargs)

    def _refreshed(
        self, load: Callable[..., object], args: tuple[object, ...], kwargs: dict[str, object]
    ) -> Any:
        """Load by FastDeploy, then refresh the copies of weights, which running graphs read.

        After a wake-up of the caches only, the weights may still have no memory.
        """
        self._drop_step_state()
        result = load(*args, **kwargs)
        if not getattr(self, "is_weight_sleeping", False):
            self.attn_backends[0].refresh_weights()
        return result

    def _drop_step_state(self) -> None:
        """Release the backend's newest step, which refers to the caches."""
        self.attn_backends[0].drop_step_state()
