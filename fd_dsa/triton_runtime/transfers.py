"""Page-locked host memory, asynchronous copies and events: what a step needs beside launches.

The CUDA driver's own calls: a few microseconds a step, and the same for every tensor library. In a
process whose kernels are interpreted, "device" memory is host memory and a copy is done at once.
"""

from __future__ import annotations

import ctypes
import weakref
from functools import cache
from typing import Any

import numpy as np

from fd_dsa.triton_runtime import INTERPRETING
from fd_dsa.triton_runtime.device import DeviceApi, api_for_type
from fd_dsa.triton_runtime.driver import cuda

_PORTABLE = 1
_RELAXED = 2
_ASK = "cuStreamIsCapturing"
NO_TIMING = 2


class Event:
    """A point in the work of a device; in an interpreting process it lies in the past."""

    def record(self) -> None:
        """Move the point behind all work queued so far on the current stream."""

    def done(self) -> bool:
        """True once the work before the point is done, or if the point was never set."""
        return True

    def wait(self) -> None:
        """Block the calling thread until `done`."""


class Transfers:
    """Copies between NumPy arrays and tensors of one device; this class serves the interpreter."""

    def __init__(self, api: DeviceApi) -> None:
        self._api = api

    def host_buffer(self, num_bytes: int) -> np.ndarray:
        """uint8 [num_bytes] of zeros in host memory that copies can run from and to."""
        return np.zeros(num_bytes, np.uint8)

    def to_device(self, target: Any, source: np.ndarray) -> None:
        """Queue a copy of a contiguous array to the start of a contiguous tensor.

        `source` must stay as it is until an event recorded behind the copy is done.
        """
        address = self._api.interpreter_argument(target).data_ptr()
        ctypes.memmove(address, source.ctypes.data, source.nbytes)

    def to_host(self, target: np.ndarray, source: Any) -> None:
        """Queue a copy from the start of a contiguous tensor that fills a contiguous array."""
        address = self._api.interpreter_argument(source).data_ptr()
        ctypes.memmove(target.ctypes.data, address, target.nbytes)

    def event(self) -> Event:
        """A new event, not yet recorded."""
        return Event()

    def is_capturing(self) -> bool:
        """True while the current stream is captured into a graph."""
        return False


class CudaTransfers(Transfers):
    """Copies on the current stream of the tensors' library."""

    def __init__(self, api: DeviceApi, device: int) -> None:
        super().__init__(api)
        self._device = device
        self._capture_status = ctypes.c_int()
        self._ask = cuda().function(_ASK)

    def host_buffer(self, num_bytes: int) -> np.ndarray:
        """uint8 [num_bytes] of page-locked memory, given back with the last array on it."""
        address = ctypes.c_void_p()
        size = ctypes.c_size_t(max(num_bytes, 1))
        self.call("cuMemHostAlloc", ctypes.byref(address), size, ctypes.c_uint(_PORTABLE))
        memory = (ctypes.c_uint8 * num_bytes).from_address(address.value or 0)
        weakref.finalize(memory, _give_back, "cuMemFreeHost", address)
        buffer = np.frombuffer(memory, np.uint8)
        buffer.fill(0)
        return buffer

    def to_device(self, target: Any, source: np.ndarray) -> None:
        """Queue a copy; it overlaps with the host if `source` lies in a `host_buffer`."""
        self.call(
            "cuMemcpyHtoDAsync_v2",
            ctypes.c_uint64(target.data_ptr()),
            ctypes.c_void_p(source.ctypes.data),
            ctypes.c_size_t(source.nbytes),
            self.stream(),
        )

    def to_host(self, target: np.ndarray, source: Any) -> None:
        """Queue a copy; it overlaps with the host if `target` lies in a `host_buffer`."""
        self.call(
            "cuMemcpyDtoHAsync_v2",
            ctypes.c_void_p(target.ctypes.data),
            ctypes.c_uint64(source.data_ptr()),
            ctypes.c_size_t(target.nbytes),
            self.stream(),
        )

    def event(self) -> Event:
        """A new event without timing."""
        return _CudaEvent(self)

    def is_capturing(self) -> bool:
        """True while the current stream is captured into a graph."""
        status, stream = self._capture_status, self.stream()
        # asked in every step and layer: without the detour unless the driver refuses
        if self._ask(stream, ctypes.byref(status)):
            self.call(_ASK, stream, ctypes.byref(status))
        return status.value != 0

    def stream(self) -> ctypes.c_void_p:
        """The stream that copies and events go to."""
        return ctypes.c_void_p(self._api.current_stream(self._device))

    def call(self, function: str, *arguments: Any) -> None:
        """Call the driver; a thread that has no context yet gets the device's.

        Raises:
            DeviceError: the driver reports an error; call and error are named.
        """
        cuda().call(self._device, function, *arguments)


class _CudaEvent(Event):
    """An event of the CUDA driver."""

    def __init__(self, transfers: CudaTransfers) -> None:
        self._transfers = transfers
        self._handle = ctypes.c_void_p()
        transfers.call("cuEventCreate", ctypes.byref(self._handle), ctypes.c_uint(NO_TIMING))
        weakref.finalize(self, _give_back, "cuEventDestroy_v2", self._handle)

    def record(self) -> None:
        self._transfers.call("cuEventRecord", self._handle, self._transfers.stream())

    def done(self) -> bool:
        return bool(_library().cuEventQuery(self._handle) == 0)

    def wait(self) -> None:
        self._transfers.call("cuEventSynchronize", self._handle)


def _give_back(function: str, handle: ctypes.c_void_p) -> None:
    """Call what frees `handle`; the collector may do so while a graph is being captured."""
    library, mode = _library(), ctypes.c_int(_RELAXED)
    # in any other mode of this thread freeing would end captures, also those of other libraries
    library.cuThreadExchangeStreamCaptureMode(ctypes.byref(mode))
    getattr(library, function)(handle)
    library.cuThreadExchangeStreamCaptureMode(ctypes.byref(mode))


def transfers_for(tensor: Any) -> Transfers:
    """Copies to and from the device of a tensor.

    Raises:
        LaunchError: the tensor is not in the memory that kernels of this process use.
        BackendUnavailable: no library is known for its type, or no CUDA driver is found.
    """
    api = api_for_type(type(tensor))
    if INTERPRETING:
        api.interpreter_argument(tensor)
        return Transfers(api)
    return CudaTransfers(api, api.device_of(tensor))


@cache
def _library() -> ctypes.CDLL:
    """The driver library, started."""
    cuda()
    return ctypes.CDLL("libcuda.so.1")
