"""Triton kernels on Paddle tensors, without torch and without touching Triton's active driver.

Import this module before `triton`: on a machine without a GPU it selects Triton's interpreter,
which has to be done before Triton is loaded.
"""

from __future__ import annotations

from fd_dsa.config import choose_triton_mode

INTERPRETING: bool = choose_triton_mode()
"""True where kernels run in Triton's interpreter on CPU tensors, False where they are compiled."""

from fd_dsa.triton_runtime import versions  # noqa: E402

versions.require_supported()

from fd_dsa.triton_runtime.device import DeviceApi, register_device_api  # noqa: E402
from fd_dsa.triton_runtime.kernel import Kernel, paddle_jit  # noqa: E402

__all__ = [
    "INTERPRETING",
    "DeviceApi",
    "Kernel",
    "paddle_jit",
    "register_device_api",
]
