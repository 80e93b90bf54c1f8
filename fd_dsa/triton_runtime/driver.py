"""The CUDA driver through ctypes: contexts, modules, launches. Nothing is compiled for it.

A launch is one call of `cuLaunchKernelEx` with four pointers that were made before, which costs
about as much from ctypes as from C, and is the same for every version of Triton.
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

# no context was made yet, none is the thread's, and a handle or function of another one
_NO_CONTEXT, _WRONG_CONTEXT = (3, 201), (201, 400, 709)
_PROCESSORS, _MAJOR, _MINOR, _SHARED_OPTIN = 16, 75, 76, 97
_FUNCTION_SHARED_BYTES = 1
_FUNCTION_MAX_DYNAMIC_SHARED = 8
# a kernel may use this much shared memory without asking
_SHARED_BYTES_WITHOUT_OPTIN = 48 << 10


LEAST_CAPABILITY = 80
"""The least compute capability that kernels are compiled for: Triton's own."""
FP8_CAPABILITY = 89
"""The least compute capability with instructions of e4m3 numbers."""


class GpuTraits(NamedTuple):
    """What kernels are chosen and sized by.

    Attributes:
        capability: major * 10 + minor, 90 on Hopper.
        num_processors: multiprocessors.
        shared_bytes: shared memory that a block may use.
    """

    capability: int
    num_processors: int
    shared_bytes: int


class HostLibrary:
    """What stands for `libcuda.so.1` where kernels are interpreted: one device in host memory.

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
        # Hopper, for which kernels are made, with one multiprocessor
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
        """Where host code finds what is at an address of the device."""
        return address


class Driver:
    """The loaded driver library; one a process.

    Attributes:
        library: its functions as they are; arguments are ready ctypes objects.
        num_devices: CUDA devices that this process sees.
    """

    def __init__(self, library: ctypes.CDLL | HostLibrary) -> None:
        """Initialise `libcuda.so.1`, or what stands for it; BackendUnavailable without a device."""
        self.library = library
        self._contexts: dict[int, int] = {}
        self._traits: dict[int, GpuTraits] = {}
        code = library.cuInit(0)
        if code:
            raise BackendUnavailable(f"the CUDA driver cannot start: {self._error_text(code)}")
        self.num_devices = self._integer("cuDeviceGetCount")

    def _error_text(self, code: int) -> str:
        """`CUDA error 201: invalid device context`, for a code that the driver returned."""
        text = ctypes.c_char_p()
        self.library.cuGetErrorString(code, ctypes.byref(text))
        return f"CUDA error {code}: {(text.value or b'unknown').decode()}"

    def check(self, code: int, what: str) -> None:
        """Raise DeviceError, with the driver's text, if it returned an error."""
        if code:
            raise DeviceError(f"{what}: {self._error_text(code)}")

    def function(self, name: str, device: int) -> Callable[..., None]:
        """A function of the driver that works on a device and raises its errors.

        A thread without a context gets the device's; another context is put back afterwards.
        """
        function = getattr(self.library, name)

        def call(*arguments: object) -> None:
            code = function(*arguments)
            if code:
                self.recover(code, device, name, function, arguments)

        return call

    def call(self, device: int, name: str, *arguments: object) -> None:
        """Call a function of the driver once; see `function`."""
        self.function(name, device)(*arguments)

    def recover(
        self,
        code: int,
        device: int,
        what: str,
        function: Callable[..., int],
        arguments: tuple[object, ...],
    ) -> None:
        """Call again if it failed because another context, or none, is the thread's.

        Any other error of the call, or of earlier work on the device, is a DeviceError.
        """
        if code in _WRONG_CONTEXT:
            with self.context(device):
                code = function(*arguments)
        self.check(code, what)

    def _integer(self, function: str, *args: object) -> int:
        """The int that a driver function writes to its first argument."""
        value = ctypes.c_int()
        self.check(getattr(self.library, function)(ctypes.byref(value), *args), function)
        return value.value

    def _attribute(self, device: int, number: int) -> int:
        return self._integer("cuDeviceGetAttribute", number, self._integer("cuDeviceGet", device))

    def current_device(self) -> int:
        """Device of the calling thread's context; 0 where the thread has none."""
        device = ctypes.c_int()
        code = self.library.cuCtxGetDevice(ctypes.byref(device))
        if code in _NO_CONTEXT:
            return 0
        self.check(code, "cuCtxGetDevice")
        return device.value

    def traits(self, device: int) -> GpuTraits:
        """What kernels for a device are chosen and sized by; no tensor has to be there yet."""
        if device not in self._traits:
            major, minor, num_processors, shared_bytes = (
                self._attribute(device, number)
                for number in (_MAJOR, _MINOR, _PROCESSORS, _SHARED_OPTIN)
            )
            self._traits[device] = GpuTraits(major * 10 + minor, num_processors, shared_bytes)
        return self._traits[device]

    @contextmanager
    def context(self, device: int) -> Iterator[None]:
        """The device's primary context, the one all libraries share, as this thread's inside.

        Afterwards the thread has the context that it had; if it had none, it keeps this one.
        """
        before, own = ctypes.c_void_p(), ctypes.c_void_p(self._primary_context(device))
        self.library.cuCtxGetCurrent(ctypes.byref(before))
        self.check(self.library.cuCtxSetCurrent(own), f"context of device {device}")
        try:
            yield
        finally:
            if before.value:
                self.library.cuCtxSetCurrent(before)

    def _primary_context(self, device: int) -> int:
        """Handle of the device's primary context, which stays alive from now on."""
        if device not in self._contexts:
            context, number = ctypes.c_void_p(), self._integer("cuDeviceGet", device)
            code = self.library.cuDevicePrimaryCtxRetain(ctypes.byref(context), number)
            self.check(code, f"context of device {device}")
            # of two threads that ask at once both get the same one
            self._contexts[device] = context.value or 0
        return self._contexts[device]

    def load(self, compiled: Compiled, device: int) -> int:
        """Load a compiled kernel and everything its launch needs; the context is left as it was.

        Returns:
            The driver's handle of the kernel, good for the life of the process.

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
                # lazy loading would load at the first launch, which may be inside a capture
                call("cuFuncLoad", function)
        return function.value or 0


@cache
def cuda() -> Driver:
    """The driver of this process, started at first use.

    Raises:
        BackendUnavailable: no driver library, or no usable device.
    """
    try:
        return Driver(open_library())
    except OSError as error:
        raise BackendUnavailable(
            "no CUDA driver (libcuda.so.1) on this machine: kernels can be compiled ahead by "
            "kernel.warmup(..., capability=90), but not launched"
        ) from error


def open_library() -> ctypes.CDLL | HostLibrary:
    """The driver library, or what stands for it; tests put another one in its place."""
    return HostLibrary() if INTERPRETING else ctypes.CDLL("libcuda.so.1")
