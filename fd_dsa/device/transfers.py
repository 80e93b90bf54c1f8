"""Page-locked host memory, asynchronous copies, streams and events of the CUDA driver.

Driver calls cost a few microseconds a step and are the same for every tensor library. In a process
whose kernels are interpreted, "device" memory is host memory and a copy is done at once; see
`triton_runtime.driver.HostLibrary`.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable
from functools import partial

import numpy as np
import numpy.typing as npt

from fd_dsa.tensor import Tensor
from fd_dsa.triton_runtime.device_api import DeviceApi, api_for_type
from fd_dsa.triton_runtime.driver import GpuTraits, HostLibrary, cuda

_PORTABLE = 1
_RELAXED = 2
_NON_BLOCKING = 1
_NO_TIMING = 2
_NO_FLAGS = ctypes.c_uint(0)
UPLOAD_BYTES = 64 << 20
_COPIES = {
    "h2d": "cuMemcpyHtoDAsync_v2",
    "d2h": "cuMemcpyDtoHAsync_v2",
    "d2d": "cuMemcpyDtoDAsync_v2",
}


class Transfers:
    """Copies between NumPy arrays and tensors of one device, on the library's current stream.

    Attributes:
        device: CUDA index of the device.
        function: looks up a driver function by name. The function works on the device and raises
            the driver's errors.
    """

    def __init__(self, api: DeviceApi, device: int) -> None:
        self._current_stream, self.device = api.current_stream, device
        self.function = partial(cuda().function, device=device)
        self._capture_status = ctypes.c_int()
        self._query_capture = self.function("cuStreamIsCapturing")
        self._status_place = ctypes.byref(self._capture_status)
        self._current = 0, ctypes.c_void_p()

    def host_buffer(self, num_bytes: int, *, is_cleared: bool = True) -> npt.NDArray[np.uint8]:
        """Allocate uint8 [num_bytes], page-locked, freed with the last array on it.

        Args:
            is_cleared: True = the buffer holds zeros; False = it holds any values.
        """
        address = ctypes.c_void_p()
        size = ctypes.c_size_t(max(num_bytes, 1))
        self.function("cuMemHostAlloc")(ctypes.byref(address), size, ctypes.c_uint(_PORTABLE))
        memory = (ctypes.c_uint8 * num_bytes).from_address(address.value or 0)
        _give_back_with(memory, "cuMemFreeHost", address)
        buffer = np.frombuffer(memoryview(memory), np.uint8)
        if is_cleared:
            buffer.fill(0)
        return buffer

    def to_device(self, target: Tensor, source: np.ndarray) -> None:
        """Enqueue a copy of a contiguous array to the start of a contiguous tensor.

        `source` must not change until an event recorded after the copy is done. The copy overlaps
        with the host if `source` is in a `host_buffer`.
        """
        self.copy("h2d", target.data_ptr(), source.ctypes.data).queue(source.nbytes)

    def to_host(self, target: np.ndarray, source: Tensor) -> None:
        """Enqueue a copy that fills a contiguous array from the start of a contiguous tensor.

        The copy overlaps with the host if `target` is in a `host_buffer`.
        """
        self.copy("d2h", target.ctypes.data, source.data_ptr()).queue(target.nbytes)

    def copy(
        self, kind: str, target: int, source: int, stream: RawStream | None = None
    ) -> FixedCopy:
        """Prepare a copy between two addresses that never move."""
        return FixedCopy(self, kind, target, source, stream)

    def event(self) -> Event:
        """Create an event that is not yet recorded."""
        return Event(self)

    def new_stream(self) -> RawStream:
        """Create a stream that waits for no other stream by itself and ends with the object."""
        stream = RawStream()
        self.function("cuStreamCreate")(ctypes.byref(stream), ctypes.c_uint(_NON_BLOCKING))
        _give_back_with(stream, "cuStreamDestroy_v2", ctypes.c_void_p(stream.value))
        return stream

    def is_capturing(self) -> bool:
        """Return True while the current stream is captured into a graph.

        Each step and each layer calls this, so the arguments of the driver call are made once.
        """
        self._query_capture(self.stream(), self._status_place)
        return self._capture_status.value != 0

    @property
    def traits(self) -> GpuTraits:
        """Traits of the device, by which kernels are selected and sized."""
        return cuda().traits(self.device)

    def stream(self) -> ctypes.c_void_p:
        """Return the stream that copies and events go to."""
        handle = self._current_stream(self.device)
        known = self._current
        if known[0] != handle:
            # one assignment, so that another thread never sees half of the change
            self._current = known = handle, ctypes.c_void_p(handle)
        return known[1]

    def finish(self) -> None:
        """Block the calling thread until all work enqueued on the current stream is done."""
        done = self.event()
        done.record()
        done.wait()


class RawStream(ctypes.c_void_p):
    """Stream of the driver alongside the tensor library's streams, null if interpreted."""

    def finish_before(self, owner: object) -> None:
        """Wait for the work on the stream when `owner` is collected, before its memory is freed."""
        _give_back_with(owner, "cuStreamSynchronize", ctypes.c_void_p(self.value))


class Event:
    """Point in the work of a device. Each method costs one driver call."""

    def __init__(self, transfers: Transfers) -> None:
        self._stream, self._handle = transfers.stream, ctypes.c_void_p()
        function = transfers.function
        function("cuEventCreate")(ctypes.byref(self._handle), ctypes.c_uint(_NO_TIMING))
        _give_back_with(self, "cuEventDestroy_v2", self._handle)
        names = "cuEventRecord", "cuStreamWaitEvent", "cuEventSynchronize"
        self._record, self._precede, self._wait = map(function, names)
        self._query = cuda().library.cuEventQuery

    def record(self, stream: ctypes.c_void_p | None = None) -> None:
        """Move the point after all work enqueued on a stream, None = the current one."""
        self._record(self._handle, self._stream() if stream is None else stream)

    def precede(self, stream: ctypes.c_void_p | None = None) -> None:
        """Make later work of a stream, None = the current one, wait for the point.

        The calling thread continues at once. A point that was never set is in the past.
        """
        self._precede(self._stream() if stream is None else stream, self._handle, _NO_FLAGS)

    def done(self) -> bool:
        """Return True once the work before the point is done, or if the point was never set."""
        return self._query(self._handle) == 0

    def wait(self) -> None:
        """Block the calling thread until `done`."""
        self._wait(self._handle)


class FixedCopy:
    """Copy between two addresses that never move, with arguments made once. One thread at a time.

    Attributes:
        kind: "h2d" from a `host_buffer`, which must outlive the copy, "d2h" or "d2d".
        stream: stream of the copy; None = the current one of each call.
    """

    def __init__(
        self, transfers: Transfers, kind: str, target: int, source: int, stream: RawStream | None
    ) -> None:
        self.kind, self.stream = kind, stream
        self._current, self._copy = transfers.stream, transfers.function(_COPIES[kind])
        self._size = ctypes.c_size_t()
        self._places = ctypes.c_uint64(target), ctypes.c_uint64(source)

    def queue(self, num_bytes: int) -> None:
        """Enqueue the copy of the first bytes. The calling thread continues at once.

        The source must not change until an event recorded after the copy is done.
        """
        self._size.value = num_bytes
        stream = self._current() if self.stream is None else self.stream
        self._copy(*self._places, self._size, stream)


def _give_back_with(owner: object, function: str, handle: ctypes.c_void_p) -> None:
    """Call a driver function on `handle` when `owner` is collected, and ignore its error."""
    weakref.finalize(owner, _give_back, cuda().library, function, handle)


def _give_back(library: ctypes.CDLL | HostLibrary, function: str, handle: ctypes.c_void_p) -> None:
    """Free `handle`, also from the garbage collector during a graph capture."""
    mode = ctypes.c_int(_RELAXED)
    # in any other mode of this thread the call would end captures, also of other libraries
    library.cuThreadExchangeStreamCaptureMode(ctypes.byref(mode))
    getattr(library, function)(handle)
    library.cuThreadExchangeStreamCaptureMode(ctypes.byref(mode))


def transfers_for(tensor: Tensor) -> Transfers:
    """Return the copies to and from the device of a tensor.

    Raises:
        LaunchError: the tensor is not in the memory that kernels of this process use.
        BackendUnavailable: no library is registered for its type, or no CUDA driver is found.
    """
    api = api_for_type(type(tensor))
    return Transfers(api, api.device_of(tensor))


def on_host(tensor: Tensor, like: np.ndarray) -> np.ndarray:
    """Copy a contiguous tensor of the shape and dtype of `like` to the host, and wait."""
    array, transfers = np.empty_like(like), transfers_for(tensor)
    if array.size:
        transfers.to_host(array, tensor)
    transfers.finish()
    return array


def uploaded(allocate: Callable[..., Tensor], array: np.ndarray, dtype: str = "") -> Tensor:
    """Make a tensor with the values of an array, and wait for the copy.

    Args:
        allocate: makes a tensor of a shape and dtype on a device.
        array: contiguous or not.
        dtype: name of the tensor's dtype, as wide as the array's; "" = the array's.
    """
    tensor = allocate(array.shape, dtype or str(array.dtype))
    transfers = transfers_for(tensor)
    transfers.to_device(tensor, np.ascontiguousarray(array))
    transfers.finish()
    return tensor


class Upload:
    """Copies of files to one device, through two page-locked buffers.

    The host fills one buffer while the device reads the other one.
    """

    def __init__(self, like: Tensor) -> None:
        self._transfers = transfers_for(like)
        self._buffers = [
            (self._transfers.host_buffer(UPLOAD_BYTES), self._transfers.event()) for _ in range(2)
        ]

    def copy(self, target: Tensor, start: int, values: np.ndarray) -> None:
        """Enqueue a copy into a contiguous tensor.

        Args:
            start: index of the first value of `target` to overwrite, in memory order.
            values: contiguous, of the target's width or its bytes; may change after the call.
        """
        source = values.reshape(-1).view(np.uint8)
        address = target.data_ptr() + start * target.element_size()
        for first in range(0, len(source), UPLOAD_BYTES):
            part = source[first : first + UPLOAD_BYTES]
            buffer, copied = self._buffers[0]
            self._buffers.reverse()
            copied.wait()
            np.copyto(buffer[: len(part)], part)
            copy = self._transfers.copy("h2d", address + first, buffer.ctypes.data)
            copy.queue(len(part))
            copied.record()

    def finish(self) -> None:
        """Block the calling thread until all copies are done."""
        self._transfers.finish()
