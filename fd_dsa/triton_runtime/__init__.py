"""Triton kernels on Paddle tensors, without torch and without touching Triton's active driver.

Import this module before `triton`: on a machine without a GPU it selects Triton's interpreter,
which has to be done before Triton is loaded.
"""

from __future__ import annotations

# first, as it decides what the import of triton in all others will do
from fd_dsa.triton_runtime.mode import INTERPRETING  # isort: skip
from fd_dsa.triton_runtime import versions  # isort: skip

versions.require_supported()

from fd_dsa.triton_runtime.bound import BoundLaunch  # noqa: E402
from fd_dsa.triton_runtime.compiler import Compiled  # noqa: E402
from fd_dsa.triton_runtime.device import DeviceApi, register_device_api  # noqa: E402
from fd_dsa.triton_runtime.kernel import Kernel, paddle_jit  # noqa: E402
from fd_dsa.triton_runtime.parameters import Pointer  # noqa: E402
from fd_dsa.triton_runtime.serving import (  # noqa: E402
    freeze,
    num_late_compilations,
    unfreeze,
    warming,
)
from fd_dsa.triton_runtime.tuning import autotune, heuristics  # noqa: E402

__all__ = [
    "INTERPRETING",
    "BoundLaunch",
    "Compiled",
    "DeviceApi",
    "Kernel",
    "Pointer",
    "autotune",
    "freeze",
    "heuristics",
    "num_late_compilations",
    "paddle_jit",
    "register_device_api",
    "unfreeze",
    "warming",
]
