"""The CUDA driver through ctypes: contexts, modules and launches, without a compiler.

A launch is one call of `cuLaunchKernelEx` with four pointers that exist before it. The call takes
about the same time from ctypes as from C, and does not depend on the version of Triton.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

from fd_dsa.errors import BackendUnavailable, DeviceError, LaunchError
from fd_dsa.triton_runtime.compiler import Compiled
from fd_dsa.triton_runtime.mode import INTERPRETING

# errors if the process or thread has no context, or a handle belongs to another context
_NO_CONTEXT, _WRONG_CONTEXT = (3, 201), (201, 400, 709)
_PROCESSORS, _MAJOR, _MINOR, _SHARED_OPTIN = 16, 75, 76, 97
_FUNCTION_SHARED_BYTES = 1
_FUNCTION_MAX_DYNAMIC_SHARED = 8
# more shared memory than this needs an attribute of the kernel
_SHARED_BYTES_WITHOUT_OPTIN = 48 << 10


MIN_CAPABILITY = 80
"""Minimum compute capability of Triton, and so of all kernels."""
FP8_CAPABILITY = 89
"""Minimum compute capability with instructions for e4m3 numbers."""


class GpuTraits(NamedTuple):
    """Traits of a GPU, by which kernels are selected and sized.

    Attributes:
        capability: major * 10 + minor, 90 on Hopper.
        num_processors: number of multiprocessors.
        shared_bytes: maximum shared memory of a block.
    """

    capability: int
    num_processors: int
    shared_bytes: int


class HostLibrary:
    """Stand-in for `libcuda.so.1` if kernels are interpreted, with one device in host memory.

    Functions that are not defined here succeed without work, because all that an event or a stream
    could wait for is complete. `InterpretedVariant` runs kernels, so they are not loaded.
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
        # a Hopper GPU with one multiprocessor, so that kernels run in their usual form
        hopper = {_MAJOR: 9, _MINOR: 0, _PROCESSORS: 1, _SHARED_OPTIN: 227 << 10}
        value._obj.value = hopper[attribute]
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
        to, origin = map(self.host_address, (target.value, source.value))
        ctypes.memmove(to, origin, size.value)
        return 0

    cuMemcpyDtoHAsync_v2 = cuMemcpyDtoDAsync_v2 = cuMemcpyHtoDAsync_v2

    def host_address(self, address: int) -> int:
        """Return the address at which host code reads an address of the device."""
        return address


class Driver:
    """Loaded driver library of the process.

    Attributes:
        library: functions of the driver, whose arguments are ctypes objects.
        num_devices: number of CUDA devices that this process sees.

    Raises:
        BackendUnavailable: there is no usable device.
    """

    def __init__(self, library: ctypes.CDLL | HostLibrary) -> None:
        self.library = library
        self._contexts: dict[int, int] = {}
        self._traits: dict[int, GpuTraits] = {}
        code = library.cuInit(0)
        if code:
            raise BackendUnavailable(f"the CUDA driver cannot start: {self._error_text(code)}")
        self.num_devices = self._integer("cuDeviceGetCount")

    def _error_text(self, code: int) -> str:
        """Return `CUDA error 201: invalid device context` for such a code of the driver."""
        text = ctypes.c_char_p()
        self.library.cuGetErrorString(code, ctypes.byref(text))
        return f"CUDA error {code}: {(text.value or b'unknown').decode()}"

    def check(self, code: int, what: str) -> None:
        """Raise DeviceError, with the driver's text, if it returned an error."""
        if code:
            raise DeviceError(f"{what}: {self._error_text(code)}")

    def function(self, name: str, device: int) -> Callable[..., None]:
        """Return a function of the driver that works on a device and raises its errors.

        A thread without a context gets the device's. Another context of the thread is put back
        afterwards.
        """
        function = getattr(self.library, name)

        def call(*arguments: object) -> None:
            code = function(*arguments)
            if code:
                self.recover(code, device, name, function, arguments)

        return call

    def call(self, device: int, name: str, *arguments: object) -> None:
        """Call a function of the driver once, as `function` describes."""
        self.function(name, device)(*arguments)

    def recover(
        self,
        code: int,
        device: int,
        what: str,
        function: Callable[..., int],
        arguments: tuple[object, ...],
    ) -> None:
        """Call a function again if it failed because the thread lacks the device's context.

        Any other error of the call, or of earlier work on the device, is a DeviceError.
        """
        if code in _WRONG_CONTEXT:
            with self.context(device):
                code = function(*arguments)
        self.check(code, what)

    def _integer(self, function: str, *args: object) -> int:
        """Return the int that a driver function writes to its first argument."""
        value = ctypes.c_int()
        self.check(getattr(self.library, function)(ctypes.byref(value), *args), function)
        return value.value

    def _attribute(self, device: int, number: int) -> int:
        return self._integer("cuDeviceGetAttribute", number, self._integer("cuDeviceGet", device))

    def current_device(self) -> int:
        """Return the device of the calling thread's context, 0 if it has no context."""
        device = ctypes.c_int()
        code = self.library.cuCtxGetDevice(ctypes.byref(device))
        if code in _NO_CONTEXT:
            return 0
        self.check(code, "cuCtxGetDevice")
        return device.value

    def traits(self, device: int) -> GpuTraits:
        """Return the traits of a device."""
        if device not in self._traits:
            major, minor, num_processors, shared_bytes = (
                self._attribute(device, number)
                for number in (_MAJOR, _MINOR, _PROCESSORS, _SHARED_OPTIN)
            )
            self._traits[device] = GpuTraits(major * 10 + minor, num_processors, shared_bytes)
        return self._traits[device]

    @contextmanager
    def context(self, device: int) -> Iterator[None]:
        """Make the primary context of a device, which all libraries share, current inside.

        Afterwards the thread has its earlier context again. Without one it keeps this context.
        """
        before, own = ctypes.c_void_p(), ctypes.c_void_p(self._primary_context(device))
        self.library.cuCtxGetCurrent(ctypes.byref(before))
        self.check(self.library.cuCtxSetCurrent(own), f"context of device {device}")
        try:
            yield
        finally:
            if before.value:
                self.library.cuCtxSetCurrent(before)

    def run_on(self, device: int, function: Callable[..., int], *arguments: object) -> int:
        """Call a function of another CUDA library on a device, and return its status.

        Such functions use the device of the thread's context, or the first one without a context.
        """
        if self.num_devices > 1 and self.current_device() != device:
            with self.context(device):
                return function(*arguments)
        return function(*arguments)

    def _primary_context(self, device: int) -> int:
        """Return the handle of the device's primary context, which then stays alive."""
        if device not in self._contexts:
            context, number = ctypes.c_void_p(), self._integer("cuDeviceGet", device)
            code = self.library.cuDevicePrimaryCtxRetain(ctypes.byref(context), number)
            self.check(code, f"context of device {device}")
            # two threads at once get the same context
            self._contexts[device] = context.value or 0
        return self._contexts[device]

    def load(self, compiled: Compiled, device: int) -> int:
        """Load a compiled kernel, without a change of the thread's context.

        Returns:
            Handle of the kernel, valid for the life of the process.

        Raises:
            LaunchError: the kernel needs more shared memory than the device has.
            DeviceError: the driver refuses the image.
        """
        module, function = ctypes.c_void_p(), ctypes.c_void_p()
        limit = self._attribute(device, _SHARED_OPTIN)
        if compiled.shared_bytes > limit:
            raise LaunchError(
                f"kernel {compiled.name}: needs {compiled.shared_bytes} bytes of shared memory a "
                f"block, device {device} has {limit}; use smaller tiles or fewer stages"
            )

        def call(name: str, *arguments: object) -> None:
            self.check(getattr(self.library, name)(*arguments), f"loading kernel {compiled.name}")

        with self.context(device):
            call("cuModuleLoadData", ctypes.byref(module), compiled.image)
            name = compiled.name.encode()
            call("cuModuleGetFunction", ctypes.byref(function), module, name)
            if compiled.shared_bytes > _SHARED_BYTES_WITHOUT_OPTIN:
                own = self._integer("cuFuncGetAttribute", _FUNCTION_SHARED_BYTES, function)
                call("cuFuncSetAttribute", function, _FUNCTION_MAX_DYNAMIC_SHARED, limit - own)
            if hasattr(self.library, "cuFuncLoad"):
                # otherwise the first launch loads the kernel, and it may be inside a capture
                call("cuFuncLoad", function)
        return function.value or 0


@cache
def cuda() -> Driver:
    """Return the driver of this process, which the first call starts.

    Raises:
        BackendUnavailable: the driver library or a usable device is missing.
    """
    try:
        return Driver(open_library())
    except OSError as error:
        raise BackendUnavailable(
            "no CUDA driver (libcuda.so.1) on this machine: kernels can be compiled ahead by "
            "kernel.warmup(..., capability=90), but not launched"
        ) from error


def open_library() -> ctypes.CDLL | HostLibrary:
    """Open the driver library or its stand-in. Tests replace this function."""
    return HostLibrary() if INTERPRETING else ctypes.CDLL("libcuda.so.1")
