"""Triton kernels on Paddle tensors, without torch and without touching Triton's active driver.

Import this module before `triton`: on a machine without a GPU it selects Triton's interpreter,
which has to be done before Triton is loaded.
"""

from __future__ import annotations

# first, as it decides what the import of triton in all others will do
from fd_dsa.triton_runtime.mode import INTERPRETING  # isort: skip

from fd_dsa.triton_runtime.bound import BoundLaunch
from fd_dsa.triton_runtime.compiler import Compiled
from fd_dsa.triton_runtime.device_api import DeviceApi, register_device_api
from fd_dsa.triton_runtime.early import start_next, wait_for_inputs
from fd_dsa.triton_runtime.kernel import Kernel, paddle_jit
from fd_dsa.triton_runtime.parameters import Pointer
from fd_dsa.triton_runtime.serving import (
    freeze,
    num_late_compilations,
    unfreeze,
    warming,
)

__all__ = [
    "INTERPRETING",
    "BoundLaunch",
    "Compiled",
    "DeviceApi",
    "Kernel",
    "Pointer",
    "freeze",
    "num_late_compilations",
    "paddle_jit",
    "register_device_api",
    "start_next",
    "unfreeze",
    "wait_for_inputs",
    "warming",
]
