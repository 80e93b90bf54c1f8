"""Device time by the driver's events, for tensors of any library."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

from fd_dsa.triton_runtime.driver import cuda


def device_us(device: int, call: Callable[[], Any], stream: int) -> float:
    """Return the device time of the work that a call enqueues, microseconds.

    The host waits for the end of the work.
    """
    driver, elapsed_ms = cuda(), ctypes.c_float()
    begin, end = ctypes.c_void_p(), ctypes.c_void_p()
    try:
        for event in (begin, end):
            driver.call(device, "cuEventCreate", ctypes.byref(event), 0)
        driver.call(device, "cuEventRecord", begin, ctypes.c_void_p(stream))
        call()
        driver.call(device, "cuEventRecord", end, ctypes.c_void_p(stream))
        driver.call(device, "cuEventSynchronize", end)
        driver.call(device, "cuEventElapsedTime", ctypes.byref(elapsed_ms), begin, end)
    finally:
        for event in (begin, end):
            driver.library.cuEventDestroy_v2(event)
    return elapsed_ms.value * 1e3
