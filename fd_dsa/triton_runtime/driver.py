"""The CUDA driver through ctypes: contexts, modules, launches. Nothing is compiled for it.

A launch is one call of `cuLaunchKernelEx` with four pointers that were made before, which costs
about as much from ctypes as from C, and is the same for every version of Triton.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

from fd_dsa.errors import BackendUnavailable, DeviceError, LaunchError
from fd_dsa.triton_runtime.compiler import Compiled
from fd_dsa.triton_runtime.host import HostLibrary
from fd_dsa.triton_runtime.mode import INTERPRETING

INVALID_CONTEXT = 201
_NO_CONTEXT = (3, INVALID_CONTEXT)
_DEVICE_CAPABILITY = (75, 76)
_DEVICE_PROCESSORS = 16
_DEVICE_SHARED_OPTIN = 97
_FUNCTION_SHARED_BYTES = 1
_FUNCTION_MAX_DYNAMIC_SHARED = 8
_FUNCTION_LARGE_CLUSTERS = 14
# a kernel may use this much shared memory without asking
_SHARED_BYTES_WITHOUT_OPTIN = 48 << 10


class Driver:
    """The loaded driver library; one a process."""

    def __init__(self, library: Any) -> None:
        """Initialise the driver.

        Args:
            library: `ctypes.CDLL("libcuda.so.1")`, or something with the same functions.

        Raises:
            BackendUnavailable: there is no usable device.
        """
        self._library = library
        self._contexts: dict[int, int] = {}
        code = library.cuInit(0)
        if code:
            raise BackendUnavailable(f"the CUDA driver cannot start: {self.error_text(code)}")
        # no argument types: all arguments of a launch are ready ctypes objects
        self.launch = library.cuLaunchKernelEx
        self.num_devices = self._integer("cuDeviceGetCount")

    def error_text(self, code: int) -> str:
        """`CUDA error 201: invalid device context`, for a code that the driver returned."""
        text = ctypes.c_char_p()
        self._library.cuGetErrorString(code, ctypes.byref(text))
        return f"CUDA error {code}: {(text.value or b'unknown').decode()}"

    def check(self, code: int, what: str) -> None:
        """Raise if the driver returned an error.

        Raises:
            DeviceError: with the driver's text.
        """
        if code:
            raise DeviceError(f"{what}: {self.error_text(code)}")

    def function(self, name: str) -> Callable[..., int]:
        """A function of the driver as it is; arguments are ready ctypes objects."""
        return getattr(self._library, name)

    def call(self, device: int, function: str, *arguments: Any) -> None:
        """Call the driver; a thread that has no context yet gets the device's.

        Raises:
            DeviceError: the driver reports an error; call and error are named.
        """
        code = getattr(self._library, function)(*arguments)
        if code == INVALID_CONTEXT:
            self.bind_context(device)
            code = getattr(self._library, function)(*arguments)
        self.check(code, function)

    def _integer(self, function: str, *args: Any) -> int:
        """The int that a driver function writes to its first argument."""
        value = ctypes.c_int()
        self.check(getattr(self._library, function)(ctypes.byref(value), *args), function)
        return value.value

    def current_device(self) -> int:
        """Device of the calling thread's context; 0 where the thread has none."""
        device = ctypes.c_int()
        code = self._library.cuCtxGetDevice(ctypes.byref(device))
        if code in _NO_CONTEXT:
            return 0
        self.check(code, "cuCtxGetDevice")
        return device.value

    def capability(self, device: int) -> int:
        """Compute capability of a device, major * 10 + minor."""
        major, minor = (
            self._integer("cuDeviceGetAttribute", name, self._device(device))
            for name in _DEVICE_CAPABILITY
        )
        return major * 10 + minor

    def num_processors(self, device: int) -> int:
        """Multiprocessors of a device."""
        return self._integer("cuDeviceGetAttribute", _DEVICE_PROCESSORS, self._device(device))

    def _device(self, index: int) -> int:
        """The driver's handle of a device."""
        return self._integer("cuDeviceGet", index)

    @contextmanager
    def context(self, device: int) -> Iterator[None]:
        """The device's primary context, the one all libraries share, as this thread's inside.

        Afterwards the thread has the context that it had; if it had none, it keeps this one.
        """
        before = ctypes.c_void_p()
        self._library.cuCtxGetCurrent(ctypes.byref(before))
        self.bind_context(device)
        try:
            yield
        finally:
            if before.value:
                self._library.cuCtxSetCurrent(before)

    def bind_context(self, device: int) -> None:
        """Make the device's primary context this thread's, for good."""
        context = ctypes.c_void_p(self._primary_context(device))
        self.check(self._library.cuCtxSetCurrent(context), f"context of device {device}")

    def _primary_context(self, device: int) -> int:
        """Handle of the device's primary context, which stays alive from now on."""
        if device not in self._contexts:
            context = ctypes.c_void_p()
            place = ctypes.byref(context)
            code = self._library.cuDevicePrimaryCtxRetain(place, self._device(device))
            self.check(code, f"context of device {device}")
            # of two threads that ask at once both get the same one
            self._contexts[device] = context.value or 0
        return self._contexts[device]

    def time_us(self, call: Callable[[], None], stream: int) -> float:
        """Microseconds of device time of what one call queues on a stream; waits for it."""
        library, events = self._library, [ctypes.c_void_p(), ctypes.c_void_p()]
        for event in events:
            self.check(library.cuEventCreate(ctypes.byref(event), 0), "cuEventCreate")
        try:
            handle, elapsed_ms = ctypes.c_void_p(stream), ctypes.c_float()
            self.check(library.cuEventRecord(events[0], handle), "cuEventRecord")
            call()
            self.check(library.cuEventRecord(events[1], handle), "cuEventRecord")
            self.check(library.cuEventSynchronize(events[1]), "cuEventSynchronize")
            code = library.cuEventElapsedTime(ctypes.byref(elapsed_ms), *events)
            self.check(code, "cuEventElapsedTime")
        finally:
            for event in events:
                library.cuEventDestroy_v2(event)
        return elapsed_ms.value * 1e3

    def load(self, compiled: Compiled, device: int) -> int:
        """Load a compiled kernel and everything its launch needs; the context is left as it was.

        Returns:
            The driver's handle of the kernel, good for the life of the process.

        Raises:
            LaunchError: the kernel needs more shared memory than the device has.
            DeviceError: the driver refuses the image.
        """
        library, what = self._library, f"loading kernel {compiled.name}"
        module, function = ctypes.c_void_p(), ctypes.c_void_p()
        limit = self._integer("cuDeviceGetAttribute", _DEVICE_SHARED_OPTIN, self._device(device))
        if compiled.shared_bytes > limit:
            raise LaunchError(
                f"kernel {compiled.name}: needs {compiled.shared_bytes} bytes of shared memory a "
                f"block, device {device} has {limit}; use smaller tiles or fewer stages"
            )
        with self.context(device):
            self.check(library.cuModuleLoadData(ctypes.byref(module), compiled.image), what)
            name = compiled.name.encode()
            code = library.cuModuleGetFunction(ctypes.byref(function), module, name)
            self.check(code, what)
            if compiled.shared_bytes > _SHARED_BYTES_WITHOUT_OPTIN:
                own = self._integer("cuFuncGetAttribute", _FUNCTION_SHARED_BYTES, function)
                dynamic = limit - own
                code = library.cuFuncSetAttribute(function, _FUNCTION_MAX_DYNAMIC_SHARED, dynamic)
                self.check(code, what)
            if compiled.num_ctas > 8:
                self.check(library.cuFuncSetAttribute(function, _FUNCTION_LARGE_CLUSTERS, 1), what)
            load_now = getattr(library, "cuFuncLoad", None)
            if load_now is not None:
                # lazy loading would load at the first launch, which may be inside a capture
                self.check(load_now(function), what)
        return function.value or 0


@cache
def cuda() -> Driver:
    """The driver of this process, started at first use.

    Raises:
        BackendUnavailable: no driver library, or no usable device.
    """
    try:
        return Driver(_open_library())
    except OSError as error:
        raise BackendUnavailable(
            "no CUDA driver (libcuda.so.1) on this machine: kernels can be compiled ahead by "
            "kernel.warmup(..., capability=90), but not launched"
        ) from error


def _open_library() -> Any:
    """The driver library, or what stands for it; tests put another one in its place."""
    return HostLibrary() if INTERPRETING else ctypes.CDLL("libcuda.so.1")
