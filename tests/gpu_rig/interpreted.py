"""Triton's interpreter on the device memory of the fake and guard forms."""

from __future__ import annotations

from typing import Any

import paddle

from fd_dsa.triton_runtime import DeviceApi, register_device_api


class _Readable:
    """A device tensor as the interpreter may read and write it."""

    def __init__(self, tensor: Any, address: int) -> None:
        self.dtype, self.shape, self._address = tensor.dtype, tensor.shape, address

    def data_ptr(self) -> int:
        return self._address


class HostMemoryApi(DeviceApi):
    """Paddle tensors in host memory that Paddle treats as a device's."""

    def __init__(self, rig: Any) -> None:
        self._rig = rig

    def interpreter_argument(self, tensor: Any) -> Any:
        """The tensor under the address that host code may use; CPU tensors as they are."""
        if tensor.place.is_cpu_place():
            return tensor
        return _Readable(tensor, self._rig.readable(tensor.data_ptr()))


def register(rig: Any) -> None:
    """Tell the launcher how kernels reach the memory of this rig."""
    register_device_api(paddle.Tensor, HostMemoryApi(rig))
