"""Triton kernels on Paddle tensors, without torch and without touching Triton's active driver.

Import this module before `triton`: on a machine without a GPU it selects Triton's interpreter
before Triton is loaded.
"""

from __future__ import annotations

# first, because it decides the mode of Triton before other modules import it
from fd_dsa.triton_runtime.mode import INTERPRETING, TRITON_VERSION  # isort: skip

from fd_dsa.triton_runtime.compile_ahead import compile_ahead
from fd_dsa.triton_runtime.compile_freeze import (
    freeze,
    num_late_compilations,
    unfreeze,
    warming,
)
from fd_dsa.triton_runtime.compiler import Compiled
from fd_dsa.triton_runtime.device_api import DeviceApi, register_device_api
from fd_dsa.triton_runtime.kernel import Kernel, paddle_jit
from fd_dsa.triton_runtime.launch import BoundLaunch, next_power_of_2
from fd_dsa.triton_runtime.parameters import Pointer
from fd_dsa.triton_runtime.pdl import start_next, wait_for_inputs

__all__ = [
    "INTERPRETING",
    "TRITON_VERSION",
    "BoundLaunch",
    "Compiled",
    "DeviceApi",
    "Kernel",
    "Pointer",
    "compile_ahead",
    "freeze",
    "next_power_of_2",
    "num_late_compilations",
    "paddle_jit",
    "register_device_api",
    "start_next",
    "unfreeze",
    "wait_for_inputs",
    "warming",
]
