"""Launches on Paddle tensors in CUDA memory, through the test plug-in, for `launch_overhead`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks._launch_kernels import BLOCK, KERNELS, Sides, sides_of, stock_call, swapped
from fd_dsa.triton_runtime.device import api_for_type

import triton


def _paddle_driver(api: Any) -> Any:
    """A driver of Triton's that knows Paddle's device and stream, made without its constructor."""
    from triton.backends.nvidia.driver import CudaDriver, CudaLauncher, CudaUtils

    class PaddleDriver(CudaDriver):
        def __init__(self) -> None:
            self.utils, self.launcher_cls = CudaUtils(), CudaLauncher
            self.get_current_device = lambda: 0
            self.set_current_device = lambda device: None
            self.get_device_capability = lambda device=0: divmod(api.capability(device), 10)
            self.get_current_stream = api.current_stream

    return PaddleDriver()


def _guarded(launch: Callable[[], None]) -> Callable[[], None]:
    """The launch inside Paddle's torch stand-in, as FastDeploy did before its #6897 and #6913."""
    import paddle

    return paddle.use_compat_guard(enable=True, silent=True)(launch)


def paddle_sides(count: int) -> dict[str, list[Any]]:
    """Label -> the calls of one number of arguments, each one checked."""
    from tests.gpu_rig import load

    rig = load("real")
    _, num_tensors, named = KERNELS[count]
    arrays = [np.random.default_rng(i).random(BLOCK, np.float32) for i in range(num_tensors)]
    first, second = _placed(arrays, rig.place), _placed(arrays, rig.place)
    api = api_for_type(type(first[0]))
    driver, call = _paddle_driver(api), stock_call(count, first)

    def guarded_call() -> None:
        triton.runtime.driver.set_active(driver)
        guarded()

    guarded = _guarded(call)
    triton_sides: Sides = {
        "triton in the torch stand-in": [guarded_call],
        "triton, active driver swapped": [swapped(call, driver)],
    }
    stream = api.current_stream(0)
    sides = sides_of(count, "paddle", (first, second), stream, triton_sides)
    expected = sum(array.astype(np.float64) for array in arrays[:-1])
    expected += sum(tuple(named.values())[1:])
    for calls in sides.values():
        calls[0]()
        np.testing.assert_allclose(first[-1].numpy(), expected, rtol=1e-5, atol=1e-4)
    return sides


def _placed(arrays: list[np.ndarray], place: Any) -> list[Any]:
    """Copies on the device."""
    import paddle

    return [paddle.to_tensor(array, place=place) for array in arrays]
