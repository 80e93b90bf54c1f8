"""Where tensors live: one small interface per tensor library, Paddle's built in.

The library of a launch is that of its first tensor argument.
"""

from __future__ import annotations

from typing import Any

from fd_dsa.environment import has_nvidia_gpu
from fd_dsa.errors import BackendUnavailable, LaunchError
from fd_dsa.tensor import Tensor
from fd_dsa.triton_runtime.driver import GpuTraits, cuda
from fd_dsa.triton_runtime.mode import INTERPRETING


class DeviceApi:
    """What the launcher asks of a tensor library; subclass it for another one."""

    def device_of(self, tensor: Tensor) -> int:
        """Index of the CUDA device that holds the tensor.

        Raises:
            LaunchError: the tensor is elsewhere; the message says where.
        """
        raise NotImplementedError

    def current_device(self) -> int:
        """Index of the calling thread's current device, asked only where there are several."""
        return cuda().current_device()

    def current_stream(self, device: int) -> int:
        """The library's current stream of a device in this thread: a CUDA stream handle."""
        raise NotImplementedError

    def new_stream(self, device: int) -> Any:
        """A stream of the library that waits for no other one by itself; for the whole process."""
        raise NotImplementedError

    def stream_handle(self, stream: Any) -> int:
        """The CUDA handle of a stream of the library."""
        raise NotImplementedError

    def swap_stream(self, device: int, stream: Any) -> Any:
        """Make a stream of the library the device's current one; returns the one before."""
        raise NotImplementedError


class PaddleApi(DeviceApi):
    """Paddle tensors in GPU memory, or in CUDA memory of a custom device of Paddle."""

    def __init__(self) -> None:
        from paddle.base import core, libpaddle

        # Paddle describes no part of its core
        self._core: Any = core
        self._custom_type: str | None = None
        raw_stream = getattr(libpaddle, "_get_current_raw_stream", None)
        if raw_stream is not None:
            # from Paddle 3.3 on: one native call without a stream object, half the time
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

    def current_device(self) -> int:
        """Paddle's current device; the CUDA driver's where that is the CPU."""
        import paddle

        place = paddle.framework._current_expected_place_()
        if isinstance(place, self._core.CPUPlace):
            return super().current_device()
        return place.get_device_id()

    def current_stream(self, device: int) -> int:
        """Paddle's current stream; in a capture, the captured one."""
        if self._custom_type is None:
            return self._core._get_current_stream(device).cuda_stream
        return self._core._get_current_custom_device_stream(self._custom_type, device).raw_stream

    def new_stream(self, device: int) -> Any:
        """The stream as Paddle's core knows it."""
        import paddle

        # a GEMM on the current stream first: Paddle's cuBLAS handles stay for good on the
        # stream that is current when the first GEMM of the process makes them
        core, kind = self._core, self._custom_type
        place = core.CUDAPlace(device) if kind is None else core.CustomPlace(kind, device)
        one = paddle.ones([1, 1], "float32", device=place)
        paddle.matmul(one, one)
        return paddle.device.Stream(place, priority=2).stream_base

    def stream_handle(self, stream: Any) -> int:
        """`raw_stream`, which older releases of Paddle call `cuda_stream` on a GPU."""
        return getattr(stream, "raw_stream", None) or stream.cuda_stream

    def swap_stream(self, device: int, stream: Any) -> Any:
        """Paddle's own calls below `paddle.device.set_stream`, at a fraction of its time."""
        core, kind = self._core, self._custom_type
        if kind is None:
            return core._set_current_stream(stream)
        before = core._get_current_custom_device_stream(kind, device)
        core._set_current_custom_device_stream(kind, device, stream)
        return before


class HostApi(DeviceApi):
    """Tensors in host memory, in a process whose kernels are interpreted; device 0."""

    def device_of(self, tensor: Tensor) -> int:
        """0, if the tensor is a CPU's."""
        if not tensor.place.is_cpu_place():
            raise LaunchError(
                f"the tensor is on {tensor.place}, but kernels run in Triton's interpreter in "
                "this process, which reads CPU tensors only"
            )
        return 0

    def current_stream(self, device: int) -> int:
        """Work is done at once."""
        return 0


DEVICE_APIS: dict[type, DeviceApi] = {}


def register_device_api(tensor_type: type, api: DeviceApi) -> None:
    """Launch kernels on tensors of this type, and of types derived from it, through `api`."""
    for known in [t for t in DEVICE_APIS if issubclass(t, tensor_type)]:
        del DEVICE_APIS[known]
    DEVICE_APIS[tensor_type] = api


def api_for_type(tensor_type: type) -> DeviceApi:
    """The interface to tensors of this type.

    Raises:
        BackendUnavailable: no library was registered for it.
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
    """Return the traits of the device of a tensor, which kernels are chosen and sized by.

    Raises:
        LaunchError: the tensor is not in the memory that kernels of this process use.
        BackendUnavailable: no library is registered for its type, or no CUDA driver is found.
    """
    return cuda().traits(api_for_type(type(tensor)).device_of(tensor))
