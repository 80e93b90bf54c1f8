"""torch tensors as memory for the kernels: what the launcher asks of a framework.

For tests and benchmarks only: the package itself never imports torch.
"""

from __future__ import annotations

import ctypes
from functools import cache

import torch

from fd_dsa.errors import LaunchError
from fd_dsa.triton_runtime import DeviceApi, register_device_api
from fd_dsa.triton_runtime.driver import cuda

_NON_BLOCKING = 1


class TorchDeviceApi(DeviceApi):
    """Device and stream of torch tensors in CUDA memory.

    Args:
        high_priority: the device prefers blocks of the kernels of new streams.
    """

    def __init__(self, high_priority: bool = False) -> None:
        self._priority = -1 if high_priority else 0
        # as in torch's compiler; a Stream object costs more than the launch's own checks
        self.current_stream = torch._C._cuda_getCurrentRawStream

    def device_of(self, tensor: torch.Tensor) -> int:
        """Return number of the GPU that holds `tensor`.

        Raises:
            LaunchError: the tensor is not in CUDA memory; the message names its place.
        """
        if not tensor.is_cuda:
            raise LaunchError(f"kernels run on CUDA memory, got a torch tensor on {tensor.device}")
        return tensor.device.index

    def current_device(self) -> int:
        """Return number of this thread's GPU."""
        return torch.cuda.current_device()

    def new_stream(self, device: int) -> torch.cuda.Stream:
        """Return a new stream outside of torch's pool, which reuses its few streams."""
        handle, priority = ctypes.c_void_p(), ctypes.c_int(self._priority)
        arguments = ctypes.byref(handle), ctypes.c_uint(_NON_BLOCKING), priority
        cuda().call(device, "cuStreamCreateWithPriority", *arguments)
        return torch.cuda.ExternalStream(handle.value or 0, device)

    def stream_handle(self, stream: torch.cuda.Stream) -> int:
        """Return the CUDA handle."""
        return stream.cuda_stream

    def swap_stream(self, device: int, stream: torch.cuda.Stream) -> torch.cuda.Stream:
        """Make `stream` the current one. Returns the stream before."""
        before = torch.cuda.current_stream(device)
        torch.cuda.set_stream(stream)
        return before


@cache
def register() -> None:
    """Register torch tensors with the launcher, once per process."""
    register_device_api(torch.Tensor, TorchDeviceApi())
