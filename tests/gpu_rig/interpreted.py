"""Triton's interpreter on the device memory of the fake and guard forms."""

from __future__ import annotations

from typing import Any

import paddle

from fd_dsa.triton_runtime import driver, register_device_api
from fd_dsa.triton_runtime.device_api import HostApi
from fd_dsa.triton_runtime.driver import HostLibrary


class RigApi(HostApi):
    """Paddle tensors in host memory that Paddle treats as a device's, and a CPU's."""

    def device_of(self, tensor: Any) -> int:
        return 0


class RigLibrary(HostLibrary):
    """Reaches the memory of a rig under the addresses that host code may use."""

    def __init__(self, rig: Any) -> None:
        super().__init__()
        self.host_address = rig.readable


def register(rig: Any) -> None:
    """Tell the launcher how kernels and copies reach the memory of this rig."""
    driver.open_library = lambda: RigLibrary(rig)
    driver.cuda.cache_clear()
    register_device_api(paddle.Tensor, RigApi())
