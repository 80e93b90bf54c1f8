"""Page-locked host memory, asynchronous copies and events: what a step needs beside launches.

The CUDA driver's own calls: a few microseconds a step, and the same for every tensor library. In a
process whose kernels are interpreted, "device" memory is host memory and a copy is done at once.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from fd_dsa.triton_runtime import INTERPRETING
from fd_dsa.triton_runtime.device import DeviceApi, api_for_type
from fd_dsa.triton_runtime.driver import cuda

_PORTABLE = 1
_RELAXED = 2
_NON_BLOCKING = 1
NO_TIMING = 2
_ASK, _RECORD, _WAIT, _QUERY = (
    "cuStreamIsCapturing",
    "cuEventRecord",
    "cuStreamWaitEvent",
    "cuEventQuery",
)
_UPLOAD, _COPY = "cuMemcpyHtoDAsync_v2", "cuMemcpyDtoDAsync_v2"
_NO_FLAGS = ctypes.c_uint(0)


class GpuTraits(NamedTuple):
    """What kernels are chosen and sized by.

    Attributes:
        capability: major * 10 + minor, 90 on Hopper.
        num_processors: multiprocessors.
    """

    capability: int
    num_processors: int


INTERPRETER = GpuTraits(90, 1)
"""What stands for a GPU in a process whose kernels are interpreted."""


def gpu_traits(device: int) -> GpuTraits:
    """Traits of a CUDA device, before there is a tensor on it.

    Raises:
        BackendUnavailable: no CUDA driver is found.
    """
    if INTERPRETING:
        return INTERPRETER
    return GpuTraits(cuda().capability(device), cuda().num_processors(device))


class RawStream:
    """A stream beside those of the tensors' library; an interpreting process needs none.

    Attributes:
        handle: the CUDA stream, 0 in an interpreting process.
        argument: the same for a call of the driver.
    """

    def __init__(self) -> None:
        self.handle, self.argument = 0, ctypes.c_void_p()

    def finish_before(self, owner: Any) -> None:
        """When `owner` goes, before what it holds does, wait for the work on the stream."""


class Event:
    """A point in the work of a device; in an interpreting process it is in the past."""

    def record(self, stream: RawStream | None = None) -> None:
        """Move the point after all work queued so far on a stream, None = the current one."""

    def precede(self, stream: RawStream | None = None) -> None:
        """What is queued on a stream from now on, None = the current one, runs after the point.

        The calling thread goes on at once. A point that was never set is in the past.
        """

    def done(self) -> bool:
        """True once the work before the point is done, or if the point was never set."""
        return True

    def wait(self) -> None:
        """Block the calling thread until `done`."""


class FixedCopy:
    """A copy between two places that never move; this class serves the interpreter.

    Attributes:
        kind: "h2d" or "d2d".
        stream: where it is queued; None = on the current stream at each time.
    """

    def __init__(self, kind: str, target: int, source: int, stream: RawStream | None) -> None:
        self.kind, self.stream = kind, stream
        self._places = target, source

    def queue(self, num_bytes: int) -> None:
        """Queue the copy of the first bytes; the calling thread goes on at once.

        The source must stay as it is until an event recorded after the copy is done.
        """
        ctypes.memmove(*self._places, num_bytes)


class Transfers:
    """Copies between NumPy arrays and tensors of one device; this class serves the interpreter."""

    def __init__(self, api: DeviceApi) -> None:
        self._api = api

    def host_buffer(self, num_bytes: int) -> np.ndarray:
        """uint8 [num_bytes] of zeros in host memory that copies can run from and to."""
        return np.zeros(num_bytes, np.uint8)

    def to_device(self, target: Any, source: np.ndarray) -> None:
        """Queue a copy of a contiguous array to the start of a contiguous tensor.

        `source` must stay as it is until an event recorded after the copy is done.
        """
        ctypes.memmove(self.address(target), source.ctypes.data, source.nbytes)

    def to_host(self, target: np.ndarray, source: Any) -> None:
        """Queue a copy from the start of a contiguous tensor that fills a contiguous array."""
        ctypes.memmove(target.ctypes.data, self.address(source), target.nbytes)

    def address(self, tensor: Any) -> int:
        """Where copies find the values of a tensor."""
        return self._api.interpreter_argument(tensor).data_ptr()

    def upload(self, target: int, source: np.ndarray, stream: RawStream | None) -> FixedCopy:
        """A copy from a `host_buffer`, which must outlive it, to an address on the device."""
        return FixedCopy("h2d", target, source.ctypes.data, stream)

    def copy(self, target: int, source: int) -> FixedCopy:
        """A copy between addresses on the device, queued on the stream that is then current."""
        return FixedCopy("d2d", target, source, None)

    def event(self) -> Event:
        """A new event, not yet recorded."""
        return Event()

    def new_stream(self) -> RawStream:
        """A stream that waits for no other one by itself; it lives as long as the object."""
        return RawStream()

    def is_capturing(self) -> bool:
        """True while the current stream is captured into a graph."""
        return False

    def num_processors(self) -> int:
        """Multiprocessors of the device, over which work is spread; the interpreter is one."""
        return INTERPRETER.num_processors

    def capability(self) -> int:
        """Compute capability of the device; the interpreter runs what is made for Hopper."""
        return INTERPRETER.capability


class CudaTransfers(Transfers):
    """Copies on the current stream of the tensors' library."""

    def __init__(self, api: DeviceApi, device: int) -> None:
        super().__init__(api)
        self._device = device
        self._capture_status = ctypes.c_int()
        self._status_place = ctypes.byref(self._capture_status)
        self._ask = cuda().function(_ASK)
        self._current = 0, ctypes.c_void_p()

    def host_buffer(self, num_bytes: int) -> np.ndarray:
        """uint8 [num_bytes] of page-locked memory, given back with the last array on it."""
        address = ctypes.c_void_p()
        size = ctypes.c_size_t(max(num_bytes, 1))
        self.call("cuMemHostAlloc", ctypes.byref(address), size, ctypes.c_uint(_PORTABLE))
        memory = (ctypes.c_uint8 * num_bytes).from_address(address.value or 0)
        self.give_back_with(memory, "cuMemFreeHost", address)
        buffer = np.frombuffer(memory, np.uint8)
        buffer.fill(0)
        return buffer

    def to_device(self, target: Any, source: np.ndarray) -> None:
        """Queue a copy; it overlaps with the host if `source` is in a `host_buffer`."""
        self.call(
            _UPLOAD,
            ctypes.c_uint64(target.data_ptr()),
            ctypes.c_void_p(source.ctypes.data),
            ctypes.c_size_t(source.nbytes),
            self.stream(),
        )

    def to_host(self, target: np.ndarray, source: Any) -> None:
        """Queue a copy; it overlaps with the host if `target` is in a `host_buffer`."""
        self.call(
            "cuMemcpyDtoHAsync_v2",
            ctypes.c_void_p(target.ctypes.data),
            ctypes.c_uint64(source.data_ptr()),
            ctypes.c_size_t(target.nbytes),
            self.stream(),
        )

    def address(self, tensor: Any) -> int:
        """Where the tensor is on the device."""
        return tensor.data_ptr()

    def upload(self, target: int, source: np.ndarray, stream: RawStream | None) -> FixedCopy:
        """A copy that costs one call of the driver."""
        return _CudaCopy(self, "h2d", target, source.ctypes.data, stream)

    def copy(self, target: int, source: int) -> FixedCopy:
        """A copy that costs one call of the driver."""
        return _CudaCopy(self, "d2d", target, source, None)

    def event(self) -> Event:
        """A new event without timing."""
        return _CudaEvent(self)

    def new_stream(self) -> RawStream:
        """A stream of the driver, which other streams never wait for by themselves."""
        return _CudaStream(self)

    def is_capturing(self) -> bool:
        """True while the current stream is captured into a graph."""
        stream = self.stream()
        # asked in every step and layer: without the detour unless the driver refuses
        if self._ask(stream, self._status_place):
            self.call(_ASK, stream, self._status_place)
        return self._capture_status.value != 0

    def num_processors(self) -> int:
        """Multiprocessors of the device."""
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

    def give_back_with(self, owner: Any, function: str, handle: ctypes.c_void_p) -> None:
        """Call a function of the driver on `handle` when `owner` goes; its error is dropped."""
        exchange, last = map(cuda().function, ("cuThreadExchangeStreamCaptureMode", function))
        weakref.finalize(owner, _give_back, exchange, last, handle)


class _CudaStream(RawStream):
    """A stream of the CUDA driver."""

    def __init__(self, transfers: CudaTransfers) -> None:
        super().__init__()
        self._transfers = transfers
        flags = ctypes.c_uint(_NON_BLOCKING)
        transfers.call("cuStreamCreate", ctypes.byref(self.argument), flags)
        self.handle = self.argument.value or 0
        transfers.give_back_with(self, "cuStreamDestroy_v2", self.argument)

    def finish_before(self, owner: Any) -> None:
        self._transfers.give_back_with(owner, "cuStreamSynchronize", self.argument)


class _CudaEvent(Event):
    """An event of the CUDA driver; each call costs one of the driver's."""

    def __init__(self, transfers: CudaTransfers) -> None:
        self._transfers = transfers
        self._handle = ctypes.c_void_p()
        transfers.call("cuEventCreate", ctypes.byref(self._handle), ctypes.c_uint(NO_TIMING))
        transfers.give_back_with(self, "cuEventDestroy_v2", self._handle)
        self._record, self._wait, self._query = map(cuda().function, (_RECORD, _WAIT, _QUERY))

    def record(self, stream: RawStream | None = None) -> None:
        argument = self._transfers.stream() if stream is None else stream.argument
        if self._record(self._handle, argument):
            self._transfers.call(_RECORD, self._handle, argument)

    def precede(self, stream: RawStream | None = None) -> None:
        argument = self._transfers.stream() if stream is None else stream.argument
        if self._wait(argument, self._handle, _NO_FLAGS):
            self._transfers.call(_WAIT, argument, self._handle, _NO_FLAGS)

    def done(self) -> bool:
        return self._query(self._handle) == 0

    def wait(self) -> None:
        self._transfers.call("cuEventSynchronize", self._handle)


class _CudaCopy(FixedCopy):
    """A copy by the CUDA driver, its arguments made beforehand. One thread at a time."""

    def __init__(
        self,
        transfers: CudaTransfers,
        kind: str,
        target: int,
        source: int,
        stream: RawStream | None,
    ) -> None:
        super().__init__(kind, target, source, stream)
        self._transfers, self._name = transfers, _UPLOAD if kind == "h2d" else _COPY
        self._function = cuda().function(self._name)
        self._arguments = ctypes.c_uint64(target), ctypes.c_uint64(source)
        self._size = ctypes.c_size_t()

    def queue(self, num_bytes: int) -> None:
        self._size.value = num_bytes
        stream = self._transfers.stream() if self.stream is None else self.stream.argument
        if self._function(*self._arguments, self._size, stream):
            self._transfers.call(self._name, *self._arguments, self._size, stream)


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
    if INTERPRETING:
        api.interpreter_argument(tensor)
        return Transfers(api)
    return CudaTransfers(api, api.device_of(tensor))


def on_host(tensor: Any, like: np.ndarray) -> np.ndarray:
    """The values of a contiguous tensor, which the calling thread waits for.

    Args:
        tensor: on a device; of the shape and dtype of `like`.
    """
    array = np.empty_like(like)
    transfers = transfers_for(tensor)
    if array.size:
        transfers.to_host(array, tensor)
    done = transfers.event()
    done.record()
    done.wait()
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
    done = transfers.event()
    done.record()
    done.wait()
    return tensor
