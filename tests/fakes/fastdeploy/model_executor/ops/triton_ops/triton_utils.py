"""enable_compat_on_triton_kernel (`model_executor/ops/triton_ops/triton_utils.py`).

Three public forms: a proxy of torch switched on and off around every launch ("guard"); nothing
where torch is not installed ("no_torch", #6913, else as before); Triton's active driver exchanged
around every launch ("driver_swap", #6897). The wrapper knows `kernel[grid](...)` alone.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, distribution
from typing import Any

import paddle

from fastdeploy import _tree


def _torch_is_installed() -> bool:
    """By the distribution's metadata: a torch that cannot be imported counts too."""
    try:
        distribution("torch")
    except PackageNotFoundError:
        return False
    return True


class _Wrapper:
    """`kernel[grid]` of a Triton kernel; nothing else of it."""

    def __init__(self, kernel: Any, around: Callable[[Callable[..., Any]], Callable[..., Any]]):
        self.kernel, self._around = kernel, around

    def __getitem__(self, grid: Any) -> Callable[..., Any]:
        return self._around(self.kernel[grid])


def _guarded(launcher: Callable[..., Any]) -> Callable[..., Any]:
    """The launch with imports of torch redirected: sys.meta_path changes twice a launch."""

    def launch(*args: Any, **kwargs: Any) -> Any:
        with paddle.use_compat_guard(enable=True, silent=True):
            return launcher(*args, **kwargs)

    return launch


def _paddle_driver() -> Any:
    """A second driver, made while imports of torch are redirected."""
    with paddle.use_compat_guard(enable=True, silent=True):
        from triton.backends.nvidia.driver import CudaDriver

        return CudaDriver()


def _swapping(driver: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def around(launcher: Callable[..., Any]) -> Callable[..., Any]:
        def launch(*args: Any, **kwargs: Any) -> Any:
            from triton.runtime.driver import driver as active

            active.set_active(driver)
            try:
                return launcher(*args, **kwargs)
            finally:
                # the default driver, not the one that was active before
                active.reset_active()

        return launch

    return around


def enable_compat_on_triton_kernel(kernel: Any) -> Any:
    """The kernel, wrapped as the tree wraps it."""
    form = _tree.current().triton_wrapper
    if form == "guard":
        return _Wrapper(kernel, _guarded)
    if not _torch_is_installed():
        return kernel
    return _Wrapper(kernel, _swapping(_paddle_driver()))
