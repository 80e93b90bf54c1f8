"""What stands for the CUDA driver where kernels are interpreted: host memory, work done at once."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

# compute capability of Hopper, for which kernels are made; one multiprocessor
_ATTRIBUTES = {75: 9, 76: 0, 16: 1}


class HostLibrary:
    """Functions of `libcuda.so.1`, as `Driver` calls them, for one device.

    Those that are not here succeed and do nothing: whatever an event or a stream could wait for is
    done. Kernels are not loaded: `InterpretedVariant` runs them.
    """

    def __init__(self) -> None:
        self._buffers: dict[int, Any] = {}

    def __getattr__(self, name: str) -> Callable[..., int]:
        if not name.startswith("cu"):
            raise AttributeError(name)
        return lambda *arguments: 0

    def cuDeviceGetCount(self, count: Any) -> int:
        count._obj.value = 1
        return 0

    def cuDeviceGetAttribute(self, value: Any, attribute: int, device: int) -> int:
        value._obj.value = _ATTRIBUTES[attribute]
        return 0

    def cuMemHostAlloc(self, address: Any, size: Any, flags: Any) -> int:
        buffer = ctypes.create_string_buffer(size.value)
        address._obj.value = ctypes.addressof(buffer)
        self._buffers[address._obj.value] = buffer
        return 0

    def cuMemFreeHost(self, address: Any) -> int:
        del self._buffers[address.value]
        return 0

    def cuMemcpyHtoDAsync_v2(self, target: Any, source: Any, size: Any, stream: Any) -> int:
        places = map(self.host_address, (target.value, source.value))
        ctypes.memmove(*places, size.value)
        return 0

    cuMemcpyDtoHAsync_v2 = cuMemcpyDtoDAsync_v2 = cuMemcpyHtoDAsync_v2

    def host_address(self, address: int) -> int:
        """Where host code finds what is at an address of the device."""
        return address
