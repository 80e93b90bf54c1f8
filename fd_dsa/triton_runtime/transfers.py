"""Page-locked host memory, asynchronous copies and events: what a step needs beside launches.

The CUDA driver's own calls: a few microseconds a step, and the same for every tensor library. In a
process whose kernels are interpreted, "device" memory is host memory and a copy is done at once;
see `driver.HostLibrary`.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import numpy as np

from fd_dsa.triton_runtime.device import DeviceApi, api_for_type
from fd_dsa.triton_runtime.driver import GpuTraits, cuda
from fd_dsa.triton_runtime.mode import INTERPRETING

_PORTABLE = 1
_RELAXED = 2
_NON_BLOCKING = 1
_NO_TIMING = 2
_NO_FLAGS = ctypes.c_uint(0)
_COPIES = {
    "h2d": "cuMemcpyHtoDAsync_v2",
    "d2h": "cuMemcpyDtoHAsync_v2",
    "d2d": "cuMemcpyDtoDAsync_v2",
}


class Transfers:
    """Copies between NumPy arrays and tensors of one device, on the library's current stream.

    Attributes:
        device: its index.
        function: a function of the driver that works on the device and raises its errors.
    """

    def __init__(self, api: DeviceApi, device: int) -> None:
        self._current_stream, self.device = api.current_stream, device
        self.function = partial(cuda().function, device=device)
        self._capture_status = ctypes.c_int()
        self._ask = self.function("cuStreamIsCapturing")
        self._status_place = ctypes.byref(self._capture_status)
        self._current = 0, ctypes.c_void_p()

    def host_buffer(self, num_bytes: int) -> np.ndarray:
        """uint8 [num_bytes] of zeros, page-locked; given back with the last array on it."""
        address = ctypes.c_void_p()
        size = ctypes.c_size_t(max(num_bytes, 1))
        self.function("cuMemHostAlloc")(ctypes.byref(address), size, ctypes.c_uint(_PORTABLE))
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
        self.copy("h2d", target.data_ptr(), source.ctypes.data).queue(source.nbytes)

    def to_host(self, target: np.ndarray, source: Any) -> None:
        """Queue a copy from the start of a contiguous tensor that fills a contiguous array.

        It overlaps with the host if `target` is in a `host_buffer`.
        """
        self.copy("d2h", target.ctypes.data, source.data_ptr()).queue(target.nbytes)

    def copy(
        self, kind: str, target: int, source: int, stream: RawStream | None = None
    ) -> FixedCopy:
        """A copy between two addresses that never move; see `FixedCopy`."""
        return FixedCopy(self, kind, target, source, stream)

    def event(self) -> Event:
        """A new event, not yet recorded."""
        return Event(self)

    def new_stream(self) -> RawStream:
        """A stream that waits for no other one by itself; it lives as long as the object."""
        stream = RawStream()
        self.function("cuStreamCreate")(ctypes.byref(stream), ctypes.c_uint(_NON_BLOCKING))
        _give_back_with(stream, "cuStreamDestroy_v2", ctypes.c_void_p(stream.value))
        return stream

    def is_capturing(self) -> bool:
        """True while the current stream is captured into a graph; asked in every step and layer."""
        self._ask(self.stream(), self._status_place)
        return self._capture_status.value != 0

    @property
    def traits(self) -> GpuTraits:
        return cuda().traits(self.device)

    def stream(self) -> ctypes.c_void_p:
        """The stream that copies and events go to."""
        handle = self._current_stream(self.device)
        known = self._current
        if known[0] != handle:
            # one object, so that a thread never meets half of the change of another
            self._current = known = handle, ctypes.c_void_p(handle)
        return known[1]

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
        self._stream, self._handle = transfers.stream, ctypes.c_void_p()
        function = transfers.function
        function("cuEventCreate")(ctypes.byref(self._handle), ctypes.c_uint(_NO_TIMING))
        _give_back_with(self, "cuEventDestroy_v2", self._handle)
        names = "cuEventRecord", "cuStreamWaitEvent", "cuEventSynchronize"
        self._record, self._precede, self._wait = map(function, names)
        self._query = cuda().library.cuEventQuery

    def record(self, stream: ctypes.c_void_p | None = None) -> None:
        """Move the point after all work queued so far on a stream, None = the current one."""
        self._record(self._handle, self._stream() if stream is None else stream)

    def precede(self, stream: ctypes.c_void_p | None = None) -> None:
        """What is queued on a stream from now on, None = the current one, runs after the point.

        The calling thread goes on at once. A point that was never set is in the past.
        """
        self._precede(self._stream() if stream is None else stream, self._handle, _NO_FLAGS)

    def done(self) -> bool:
        """True once the work before the point is done, or if the point was never set."""
        return self._query(self._handle) == 0

    def wait(self) -> None:
        """Block the calling thread until `done`."""
        self._wait(self._handle)


class FixedCopy:
    """A copy between two places that never move, its arguments made beforehand. One thread at a
    time.

    Attributes:
        kind: "h2d" from a `host_buffer`, which must outlive the copy, "d2h" or "d2d".
        stream: where it is queued; None = on the current stream at each time.
    """

    def __init__(
        self, transfers: Transfers, kind: str, target: int, source: int, stream: RawStream | None
    ) -> None:
        self.kind, self.stream = kind, stream
        self._current, self._copy = transfers.stream, transfers.function(_COPIES[kind])
        self._size = ctypes.c_size_t()
        self._places = ctypes.c_uint64(target), ctypes.c_uint64(source)

    def queue(self, num_bytes: int) -> None:
        """Queue the copy of the first bytes; the calling thread goes on at once.

        The source must stay as it is until an event recorded after the copy is done.
        """
        self._size.value = num_bytes
        stream = self._current() if self.stream is None else self.stream
        self._copy(*self._places, self._size, stream)


def _give_back_with(owner: Any, function: str, handle: ctypes.c_void_p) -> None:
    """Call a function of the driver on `handle` when `owner` goes; its error is dropped."""
    weakref.finalize(owner, _give_back, cuda().library, function, handle)


def _give_back(library: Any, function: str, handle: ctypes.c_void_p) -> None:
    """Call what frees `handle`; the collector may do so while a graph is being captured."""
    mode = ctypes.c_int(_RELAXED)
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
    return Transfers(api, api.device_of(tensor))


def traits_for(tensor: Any) -> GpuTraits:
    """What kernels for the device of a tensor are chosen and sized by; see `transfers_for`."""
    return cuda().traits(api_for_type(type(tensor)).device_of(tensor))


class SideStream:
    """A stream beside the current one of a device, with one fork at a time.

    Two events serve all forks, so a fork and its join cost four driver calls and no memory. In a
    capture they become edges of the graph.

    The order of calls is `begin`, work, `end`, `join`; between `end` and `join` the current stream
    takes work that runs at the same time. One thread at a time.

    Memory. Libraries hand freed memory out again at once, for work on the stream that they think
    it belongs to. So what the work between `begin` and `end` reads or makes must be held until
    `join`, its temporaries too. Afterwards anything may be freed: later work of the current stream
    runs after the join, and later work of this one after the next `begin`.
    """

    def __init__(self, api: DeviceApi, device: int) -> None:
        self._transfers = transfers = Transfers(api, device)
        self._api, self._device = api, device
        self.stream = api.new_stream(device)
        self._handle = ctypes.c_void_p(api.stream_handle(self.stream))
        self._main = ctypes.c_void_p()
        self._before: Any = None
        self._forked, self._done = transfers.event(), transfers.event()

    def begin(self) -> None:
        """Make this stream the current one; it waits for all work of the current one so far.

        After a DeviceError the current stream is as it was.
        """
        self._main = self._transfers.stream()
        self._forked.record(self._main)
        self._forked.precede(self._handle)
        self._before = self._api.swap_stream(self._device, self.stream)

    def end(self) -> None:
        """Make the stream from before `begin` the current one again; what was queued goes on."""
        before, self._before = self._before, None
        self._api.swap_stream(self._device, before)
        self._done.record(self._handle)

    def join(self) -> None:
        """The stream from before `begin` waits for all work that was queued before `end`."""
        self._done.precede(self._main)


def side_stream_for(tensor: Any) -> SideStream | None:
    """The second stream of the device of a tensor, made at the first call; one a process.

    None in a process whose kernels are interpreted: its "devices" are host memory.
    """
    if INTERPRETING:
        return None
    api = api_for_type(type(tensor))
    return shared_side_stream(api, api.device_of(tensor))


shared_side_stream = cache(SideStream)
"""Make the side stream of a device once; `cache_clear` drops all."""


def on_host(tensor: Any, like: np.ndarray) -> np.ndarray:
    """The values of a contiguous tensor of the shape and dtype of `like`; waits for them."""
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
