"""Interfaces to tensor libraries, which tell device and stream of a launch. Paddle's is built in.

The first tensor argument selects the library of a launch.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from operator import methodcaller
from typing import Any

from fd_dsa.environment import has_nvidia_gpu
from fd_dsa.errors import BackendUnavailable, LaunchError
from fd_dsa.tensor import Tensor
from fd_dsa.triton_runtime.driver import GpuTraits, cuda
from fd_dsa.triton_runtime.mode import INTERPRETING

# calls of Paddle's places: whether a place is of this kind, and the index of its device
_GPU = methodcaller("is_gpu_place"), methodcaller("gpu_device_id")
_CUSTOM = methodcaller("is_custom_place"), methodcaller("custom_device_id")
# number of addresses that are remembered of a device; then all are forgotten
_MAX_ADDRESSES = 1 << 16


class DeviceApi:
    """Interface to a tensor library, a base class for other libraries."""

    def device_of(self, tensor: Tensor) -> int:
        """Return the index of the CUDA device that holds a tensor.

        Raises:
            LaunchError: the tensor is elsewhere. The message says where.
        """
        raise NotImplementedError

    def are_on(self, tensors: Sequence[Tensor], addresses: Sequence[int], device: int) -> bool:
        """Return True if a device holds all of these tensors. Every launch asks.

        Args:
            tensors: any number of them.
            addresses: their addresses.
            device: index of the device.

        Raises:
            LaunchError: a tensor is not on any device.
        """
        return all(self.device_of(tensor) == device for tensor in tensors)

    def current_device(self) -> int:
        """Return the index of the thread's current device. Launches ask if there are several."""
        return cuda().current_device()

    def current_stream(self, device: int) -> int:
        """Return the handle of the library's current stream of a device in this thread."""
        raise NotImplementedError

    def new_stream(self, device: int) -> Any:
        """Make a stream that waits for no other stream by itself, for the life of the process."""
        raise NotImplementedError

    def stream_handle(self, stream: Any) -> int:
        """Return the CUDA handle of a stream of the library."""
        raise NotImplementedError

    def swap_stream(self, device: int, stream: Any) -> Any:
        """Make a stream of the library the current one of a device. Returns the previous one."""
        raise NotImplementedError


class PaddleApi(DeviceApi):
    """Paddle tensors in GPU memory, or in CUDA memory of a custom device of Paddle."""

    def __init__(self) -> None:
        from paddle.base import core, framework, libpaddle

        # Paddle describes no part of its core
        self._core: Any = core
        self._expected_place = framework._current_expected_place_
        # Paddle's current place, and the index of its device
        self._current: tuple[object, int] = None, 0
        self._custom_type: str | None = None
        self._memory_bytes = core.device_memory_stat_current_value
        # by device: bytes that Paddle holds, addresses that were found on the device since then
        self._found: dict[int, tuple[int, set[int]]] = defaultdict(lambda: (-1, set()))
        raw_stream = getattr(libpaddle, "_get_current_raw_stream", None)
        if raw_stream is not None:
            # from Paddle 3.3 on this native call without a stream object takes half the time
            self.current_stream = raw_stream  # type: ignore[method-assign]

    def device_of(self, tensor: Tensor) -> int:
        place = tensor.place
        if place.is_gpu_place():
            return place.gpu_device_id()
        if place.is_custom_place():
            self._custom_type = place.custom_device_type()
            return place.custom_device_id()
        if not has_nvidia_gpu():
            raise BackendUnavailable(
                f"the tensor is on {place}, and no GPU is visible; triton was imported before "
                "fd_dsa.triton_runtime, or TRITON_INTERPRET is 0, so that kernels cannot run in "
                "Triton's interpreter either: import fd_dsa.triton_runtime first"
            )
        raise LaunchError(f"the tensor is on {place}, but kernels run on GPU memory")

    def are_on(self, tensors: Sequence[Tensor], addresses: Sequence[int], device: int) -> bool:
        """Return True if a device holds all of these tensors.

        Paddle takes a good part of a launch to tell the places of its tensors. An address that was
        found on a device stays there until Paddle returns its memory to the driver.
        """
        held_bytes = self._memory_bytes("Reserved", device)
        before, found = self._found[device]
        if held_bytes != before:
            # the host or another device may have got what Paddle returned; a thread that still
            # asks for places notes them in the old set
            found = set()
            self._found[device] = held_bytes, found
        if found.issuperset(addresses):
            return True
        places = [tensor.place for tensor in tensors]
        is_held, index_of = _GPU if self._custom_type is None else _CUSTOM
        if not all(map(is_held, places)):
            return False
        if cuda().num_devices > 1 and any(index != device for index in map(index_of, places)):
            return False
        if len(found) > _MAX_ADDRESSES:
            found.clear()
        # an empty tensor has no memory, whatever its address is
        found.update(a for a, t in zip(addresses, tensors, strict=True) if 0 not in t.shape)
        return True

    def current_device(self) -> int:
        """Return Paddle's current device, or the CUDA driver's if Paddle's is the CPU."""
        place, (known, index) = self._expected_place(), self._current
        if place is known:
            return index
        if isinstance(place, self._core.CPUPlace):
            return super().current_device()
        self._current = place, place.get_device_id()
        return self._current[1]

    def current_stream(self, device: int) -> int:
        """Return Paddle's current stream, which in a capture is the captured stream."""
        if self._custom_type is None:
            return self._core._get_current_stream(device).cuda_stream
        return self._core._get_current_custom_device_stream(self._custom_type, device).raw_stream

    def new_stream(self, device: int) -> Any:
        """Make a stream of Paddle's core."""
        import paddle

        # the first GEMM of the process binds Paddle's cuBLAS handles to its current stream for
        # good, so a GEMM runs on the main stream first
        core, kind = self._core, self._custom_type
        place = core.CUDAPlace(device) if kind is None else core.CustomPlace(kind, device)
        one = paddle.ones([1, 1], "float32", device=place)
        paddle.matmul(one, one)
        return paddle.device.Stream(place, priority=2).stream_base

    def stream_handle(self, stream: Any) -> int:
        """Return `raw_stream`, which older releases of Paddle call `cuda_stream` on a GPU."""
        return getattr(stream, "raw_stream", None) or stream.cuda_stream

    def swap_stream(self, device: int, stream: Any) -> Any:
        """Swap streams by the calls below `paddle.device.set_stream`, at a fraction of its time."""
        core, kind = self._core, self._custom_type
        if kind is None:
            return core._set_current_stream(stream)
        before = core._get_current_custom_device_stream(kind, device)
        core._set_current_custom_device_stream(kind, device, stream)
        return before


class HostApi(DeviceApi):
    """Tensors in host memory, as device 0 of a process that interprets its kernels."""

    def device_of(self, tensor: Tensor) -> int:
        """Return 0 for a CPU tensor."""
        if not tensor.place.is_cpu_place():
            raise LaunchError(
                f"the tensor is on {tensor.place}, but kernels run in Triton's interpreter in "
                "this process, which reads CPU tensors only"
            )
        return 0

    def current_stream(self, device: int) -> int:
        """Return 0, because work is done at once."""
        return 0


DEVICE_APIS: dict[type, DeviceApi] = {}


def register_device_api(tensor_type: type, api: DeviceApi) -> None:
    """Launch kernels on tensors of this type and its subclasses through `api`."""
    for known in [t for t in DEVICE_APIS if issubclass(t, tensor_type)]:
        del DEVICE_APIS[known]
    DEVICE_APIS[tensor_type] = api


def api_for_type(tensor_type: type) -> DeviceApi:
    """Return the interface to tensors of this type.

    Raises:
        BackendUnavailable: the type is not registered.
    """
    for base in tensor_type.__mro__:
        if base in DEVICE_APIS:
            DEVICE_APIS[tensor_type] = api = DEVICE_APIS[base]
            return api
        if base.__module__.partition(".")[0] == "paddle" and hasattr(base, "data_ptr"):
            DEVICE_APIS[base] = HostApi() if INTERPRETING else PaddleApi()
            return api_for_type(tensor_type)
    raise BackendUnavailable(
        f"no device interface for {tensor_type.__module__}.{tensor_type.__qualname__}; "
        "launches take paddle.Tensor, or types given to register_device_api"
    )


def traits_for(tensor: Tensor) -> GpuTraits:
    """Return the traits of the device of a tensor, which kernels are selected and sized by.

    Raises:
        LaunchError: the tensor is not in the memory that kernels of this process use.
        BackendUnavailable: its type is not registered, or the CUDA driver is missing.
    """
    return cuda().traits(api_for_type(type(tensor)).device_of(tensor))
