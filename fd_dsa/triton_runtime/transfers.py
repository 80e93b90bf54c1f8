"""Page-locked host memory, asynchronous copies and events: what a step needs beside launches.

The CUDA driver's own calls: a few microseconds a step, and the same for every tensor library. In a
process whose kernels are interpreted, "device" memory is host memory and a copy is done at once;
see `host.HostLibrary`.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from fd_dsa.triton_runtime.device import DeviceApi, api_for_type
from fd_dsa.triton_runtime.driver import cuda

_PORTABLE = 1
_RELAXED = 2
_NON_BLOCKING = 1
_NO_TIMING = 2
_ASK, _RECORD, _WAIT, _QUERY = (
    "cuStreamIsCapturing",
    "cuEventRecord",
    "cuStreamWaitEvent",
    "cuEventQuery",
)
_COPIES = {"h2d": "cuMemcpyHtoDAsync_v2", "d2d": "cuMemcpyDtoDAsync_v2"}
_NO_FLAGS = ctypes.c_uint(0)


class GpuTraits(NamedTuple):
    """What kernels are chosen and sized by.

    Attributes:
        capability: major * 10 + minor, 90 on Hopper.
        num_processors: multiprocessors.
    """

    capability: int
    num_processors: int


def gpu_traits(device: int) -> GpuTraits:
    """Traits of a CUDA device, before there is a tensor on it.

    Raises:
        BackendUnavailable: no CUDA driver is found.
    """
    return GpuTraits(cuda().capability(device), cuda().num_processors(device))


class Transfers:
    """Copies between NumPy arrays and tensors of one device, on the library's current stream."""

    def __init__(self, api: DeviceApi, device: int) -> None:
        self._api, self._device = api, device
        self._capture_status = ctypes.c_int()
        self._status_place = ctypes.byref(self._capture_status)
        self._ask = cuda().function(_ASK)
        self._current = 0, ctypes.c_void_p()

    def host_buffer(self, num_bytes: int) -> np.ndarray:
        """uint8 [num_bytes] of zeros, page-locked; given back with the last array on it."""
        address = ctypes.c_void_p()
        size = ctypes.c_size_t(max(num_bytes, 1))
        self.call("cuMemHostAlloc", ctypes.byref(address), size, ctypes.c_uint(_PORTABLE))
        memory = (ctypes.c_uint8 * num_bytes).from_address(address.value or 0)
        _give_back_with(memory, "cuMemFreeHost", address)
        buffer = np.frombuffer(memory, np.uint8)
        buffer.fill(0)
        return buffer

    def to_device(self, target: Any, source: np.ndarray) -> None:
        """Queue a copy of a contiguous array to the start of a contiguous tensor.

        `source` must stay as it is until an event recorded after the copy is done. The copy
        overlaps with the host if `source` is in a `host_buffer`.
        """
        self.call(
            _COPIES["h2d"],
            ctypes.c_uint64(target.data_ptr()),
            ctypes.c_void_p(source.ctypes.data),
            ctypes.c_size_t(source.nbytes),
            self.stream(),
        )

    def to_host(self, target: np.ndarray, source: Any) -> None:
        """Queue a copy from the start of a contiguous tensor that fills a contiguous array.

        It overlaps with the host if `target` is in a `host_buffer`.
        """
        self.call(
            "cuMemcpyDtoHAsync_v2",
            ctypes.c_void_p(target.ctypes.data),
            ctypes.c_uint64(source.data_ptr()),
            ctypes.c_size_t(target.nbytes),
            self.stream(),
        )

    def upload(self, target: int, source: np.ndarray, stream: RawStream | None) -> FixedCopy:
        """A copy from a `host_buffer`, which must outlive it, to an address on the device."""
        return FixedCopy(self, "h2d", target, source.ctypes.data, stream)

    def copy(self, target: int, source: int) -> FixedCopy:
        """A copy between addresses on the device, queued on the stream that is then current."""
        return FixedCopy(self, "d2d", target, source, None)

    def event(self) -> Event:
        """A new event, not yet recorded."""
        return Event(self)

    def new_stream(self) -> RawStream:
        """A stream that waits for no other one by itself; it lives as long as the object."""
        stream = RawStream()
        self.call("cuStreamCreate", ctypes.byref(stream), ctypes.c_uint(_NON_BLOCKING))
        _give_back_with(stream, "cuStreamDestroy_v2", ctypes.c_void_p(stream.value))
        return stream

    def is_capturing(self) -> bool:
        """True while the current stream is captured into a graph."""
        stream = self.stream()
        # asked in every step and layer: without the detour unless the driver refuses
        if self._ask(stream, self._status_place):
            self.call(_ASK, stream, self._status_place)
        return self._capture_status.value != 0

    def num_processors(self) -> int:
        """Multiprocessors of the device, over which work is spread."""
        return cuda().num_processors(self._device)

    def capability(self) -> int:
        """Compute capability of the device."""
        return cuda().capability(self._device)

    def stream(self) -> ctypes.c_void_p:
        """The stream that copies and events go to."""
        handle = self._api.current_stream(self._device)
        known = self._current
        if known[0] != handle:
            # one object, so that a thread never meets half of the change of another
            self._current = known = handle, ctypes.c_void_p(handle)
        return known[1]

    def call(self, function: str, *arguments: Any) -> None:
        """Call the driver; a thread that has no context yet gets the device's.

        Raises:
            DeviceError: the driver reports an error; call and error are named.
        """
        cuda().call(self._device, function, *arguments)

    def finish(self) -> None:
        """Block the calling thread until all work queued so far on the current stream is done."""
        done = self.event()
        done.record()
        done.wait()


class RawStream(ctypes.c_void_p):
    """A stream of the driver, beside those of the tensors' library; null where kernels are
    interpreted.
    """

    def finish_before(self, owner: Any) -> None:
        """When `owner` goes, before what it holds does, wait for the work on the stream."""
        _give_back_with(owner, "cuStreamSynchronize", ctypes.c_void_p(self.value))


class Event:
    """A point in the work of a device; each call costs one of the driver's."""

    def __init__(self, transfers: Transfers) -> None:
        self._transfers = transfers
        self._handle = ctypes.c_void_p()
        transfers.call("cuEventCreate", ctypes.byref(self._handle), ctypes.c_uint(_NO_TIMING))
        _give_back_with(self, "cuEventDestroy_v2", self._handle)
        self._record, self._wait, self._query = map(cuda().function, (_RECORD, _WAIT, _QUERY))

    def record(self, stream: ctypes.c_void_p | None = None) -> None:
        """Move the point after all work queued so far on a stream, None = the current one."""
        stream = self._transfers.stream() if stream is None else stream
        if self._record(self._handle, stream):
            self._transfers.call(_RECORD, self._handle, stream)

    def precede(self, stream: ctypes.c_void_p | None = None) -> None:
        """What is queued on a stream from now on, None = the current one, runs after the point.

        The calling thread goes on at once. A point that was never set is in the past.
        """
        stream = self._transfers.stream() if stream is None else stream
        if self._wait(stream, self._handle, _NO_FLAGS):
            self._transfers.call(_WAIT, stream, self._handle, _NO_FLAGS)

    def done(self) -> bool:
        """True once the work before the point is done, or if the point was never set."""
        return self._query(self._handle) == 0

    def wait(self) -> None:
        """Block the calling thread until `done`."""
        self._transfers.call("cuEventSynchronize", self._handle)


class FixedCopy:
    """A copy between two places that never move, its arguments made beforehand. One thread at a
    time.

    Attributes:
        kind: "h2d" or "d2d".
        stream: where it is queued; None = on the current stream at each time.
    """

    def __init__(
        self, transfers: Transfers, kind: str, target: int, source: int, stream: RawStream | None
    ) -> None:
        self.kind, self.stream = kind, stream
        self._transfers, self._function = transfers, cuda().function(_COPIES[kind])
        self._arguments = ctypes.c_uint64(target), ctypes.c_uint64(source)
        self._size = ctypes.c_size_t()

    def queue(self, num_bytes: int) -> None:
        """Queue the copy of the first bytes; the calling thread goes on at once.

        The source must stay as it is until an event recorded after the copy is done.
        """
        self._size.value = num_bytes
        stream = self._transfers.stream() if self.stream is None else self.stream
        if self._function(*self._arguments, self._size, stream):
            self._transfers.call(_COPIES[self.kind], *self._arguments, self._size, stream)


def _give_back_with(owner: Any, function: str, handle: ctypes.c_void_p) -> None:
    """Call a function of the driver on `handle` when `owner` goes; its error is dropped."""
    exchange, last = map(cuda().function, ("cuThreadExchangeStreamCaptureMode", function))
    weakref.finalize(owner, _give_back, exchange, last, handle)


def _give_back(
    exchange: Callable[..., int], function: Callable[..., int], handle: ctypes.c_void_p
) -> None:
    """Call what frees `handle`; the collector may do so while a graph is being captured."""
    mode = ctypes.c_int(_RELAXED)
    # in any other mode of this thread freeing would end captures, also those of other libraries
    exchange(ctypes.byref(mode))
    function(handle)
    exchange(ctypes.byref(mode))


def transfers_for(tensor: Any) -> Transfers:
    """Copies to and from the device of a tensor.

    Raises:
        LaunchError: the tensor is not in the memory that kernels of this process use.
        BackendUnavailable: no library is known for its type, or no CUDA driver is found.
    """
    api = api_for_type(type(tensor))
    return Transfers(api, api.device_of(tensor))


def on_host(tensor: Any, like: np.ndarray) -> np.ndarray:
    """The values of a contiguous tensor, which the calling thread waits for.

    Args:
        tensor: on a device; of the shape and dtype of `like`.
    """
    array, transfers = np.empty_like(like), transfers_for(tensor)
    if array.size:
        transfers.to_host(array, tensor)
    transfers.finish()
    return array


def uploaded(allocate: Callable[..., Any], array: np.ndarray, dtype: str = "") -> Any:
    """A tensor with the values of an array, which are there when this returns.

    Args:
        allocate: makes a tensor of a shape and dtype on a device.
        array: contiguous or not.
        dtype: of the tensor, as wide as that of the array; "": the same.
    """
    tensor = allocate(array.shape, dtype or str(array.dtype))
    transfers = transfers_for(tensor)
    transfers.to_device(tensor, np.ascontiguousarray(array))
    transfers.finish()
    return tensor
