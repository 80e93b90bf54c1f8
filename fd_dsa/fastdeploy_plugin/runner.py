"""Our hooks before FastDeploy's GPUModelRunner: what only a runner knows of a step.

The backend is complete without them. They add whether a step has a prefill row, spare FastDeploy
its own positions and slots, and let go of what is derived from caches and weights when these are
made again.

The tail needs no hook: the backend leaves tokens past the step's as padding after every step, so a
graph of a larger size finds slot -1 there (`padding_cudagraph_inputs` stays FastDeploy's).

Source: FastDeploy's `worker/gpu_model_runner.py` (#7367, #8041), read at 39d329f2.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, wraps
from typing import Any

from fd_dsa.errors import ConfigError
from fd_dsa.fastdeploy_plugin.backend import PluginBackend
from fd_dsa.fastdeploy_plugin.take_over import derive
from fd_dsa.fastdeploy_plugin.tree_checks import check_runner
from fd_dsa.ops._host import dtype_name
from fd_dsa.runner import DSAModelRunnerMixin

# what FastDeploy's method does, with the arguments of the call
GoOn = Callable[[], Any]


class FastDeployRunnerMixin(DSAModelRunnerMixin):
    """Goes before GPUModelRunner; a runner whose first backend is not ours is left alone."""

    backend_class = PluginBackend
    # passes of the dummy run that is going on
    _num_dummy_passes: int | None = None

    def step_hints(self) -> bool | None:
        """Whether the coming step may have a prefill row; None where the runner cannot tell.

        A dummy run is one pass over prompts in one piece, then decode passes.
        """
        if self._num_dummy_passes is not None:
            self._num_dummy_passes += 1
            if self._num_dummy_passes == 1:
                return True
        exists = getattr(self, "exist_prefill", None)
        return bool(exists()) if callable(exists) else None


def make_runner_class(upstream: type) -> type:
    """FastDeploy's runner class, checked, with our hooks before those of its methods it has."""
    check_runner(upstream)
    methods = {name: getattr(upstream, name, None) for name in _HOOKS}
    hooked = {name: _hooked(one, _HOOKS[name]) for name, one in methods.items() if one is not None}
    return derive(FastDeployRunnerMixin, upstream, **hooked)


def _hooked(method: Callable[..., Any], hook: Callable[[Any, GoOn], Any]) -> Callable[..., Any]:
    """A method that calls our hook with the runner and what FastDeploy's own does."""
    return wraps(method)(lambda self, *a, **kw: hook(self, partial(method, self, *a, **kw)))


def _count_passes(runner: Any, go_on: GoOn) -> Any:
    """A dummy run whose passes `step_hints` counts."""
    runner._num_dummy_passes = 0
    try:
        return go_on()
    finally:
        runner._num_dummy_passes = None


def _unless_made(runner: Any, go_on: GoOn) -> Any:
    """FastDeploy's positions and slots, which the backend has made already, from the same rows.

    FastDeploy's would replace ours, without a guard for unused entries: slots of padding would be
    those of the last row, which a captured graph would write to.
    """
    step = getattr(getattr(runner, "forward_meta", None), "fd_dsa_step", None)
    return go_on() if runner.dsa_backend() is None or step is None else None


def _share_one(runner: Any, go_on: GoOn) -> Any:
    """One backend for all layers, where FastDeploy makes one for each: they share each step.

    Its positions have the dtype of the runner's own buffer, for whatever else reads them.
    """
    result = go_on()
    backend = runner.dsa_backend()
    if backend is not None:
        runner.attn_backends[:] = [backend] * len(runner.attn_backends)
        backend.serve_runner(dtype_name(runner.share_inputs["position_ids_buffer"].dtype))
    return result


def _let_go(runner: Any, go_on: GoOn) -> Any:
    """What makes or drops caches: nothing of the old ones is held."""
    backend = runner.dsa_backend()
    if backend is not None:
        backend.forget_step()
    return go_on()


def _check_bytes(runner: Any, go_on: GoOn) -> Any:
    """What makes caches, which must be bytes: from #8060 on FastDeploy may make them bfloat16."""
    result = _let_go(runner, go_on)
    if runner.dsa_backend() is not None:
        for cache in runner.share_inputs["caches"]:
            if dtype_name(cache.dtype) != "uint8":
                raise ConfigError(
                    f"caches: FastDeploy has made them of {dtype_name(cache.dtype)}, DSA's are "
                    "uint8; start it with ENABLE_V1_KVCACHE_MANAGER=1, which makes such"
                )
    return result


def _refresh_weights(runner: Any, go_on: GoOn) -> Any:
    """What loads other weights: what is kept of them is read again, below running graphs too.

    After a wake-up of the caches alone the weights may still have no memory.
    """
    result = _let_go(runner, go_on)
    backend = runner.dsa_backend()
    if backend is not None and not getattr(runner, "is_weight_sleeping", False):
        backend.refresh_weights()
    return result


_HOOKS: dict[str, Callable[[Any, GoOn], Any]] = {
    "_dummy_run": _count_passes,
    "_initialize_attn_backend": _share_one,
    "_compute_position_ids_and_slot_mapping": _unless_made,
    "initialize_kv_cache": _check_bytes,
    "clear_cache": _let_go,
    "update_parameters": _refresh_weights,
    "update_weights": _refresh_weights,
    "wakeup": _refresh_weights,
}
