"""Kernels of custom_ops/ through their C ABI: their structures, and the probe before one serves."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any, ClassVar

from fd_dsa.custom_ops import build_command
from fd_dsa.device.allocation import Allocate
from fd_dsa.device.transfers import Transfers
from fd_dsa.errors import BackendUnavailable, DeviceError, LaunchError
from fd_dsa.ops.probes import Case, Memory
from fd_dsa.tensor import Tensor
from fd_dsa.triton_runtime import INTERPRETING
from fd_dsa.triton_runtime.device_api import api_for_type
from fd_dsa.triton_runtime.driver import cuda


class LibraryKernel:
    """A kernel of a loaded library; one of these serves one thread at a time.

    A call raises LaunchError for a tensor that is not contiguous, or not on the device of the
    others, and DeviceError where the CUDA runtime refuses the launch, or earlier work has failed.

    Attributes:
        launcher: name of its C function.
        size: name of the C function that gives the bytes of its structure.
        structure: what it is called with.
        cases: small cases on which it has to agree with the definition before it serves.
        job: the structure that the next launch reads.

    Raises:
        BackendUnavailable: the library is of another release.
    """

    launcher: ClassVar[str]
    size: ClassVar[str]
    structure: ClassVar[type[ctypes.Structure]]
    cases: ClassVar[Callable[[], Iterable[Case]]]

    def __init__(self, kernels: ctypes.CDLL) -> None:
        # a library of an earlier release has no function of this name
        if getattr(kernels, self.size, int)() != ctypes.sizeof(self.structure):
            raise BackendUnavailable(
                f"fd_dsa_ops: {self.launcher} takes another structure than this fd_dsa passes; "
                f"build it again: {build_command()}"
            )
        self._kernels, self.job = kernels, self.structure()
        self._function, self._argument = getattr(kernels, self.launcher), ctypes.byref(self.job)
        self._stream: Callable[[], ctypes.c_void_p]
        self._api: Any = None
        self._device = -1

    def bind(self, tensor: Tensor) -> None:
        """Launch on the device of a tensor."""
        api = api_for_type(type(tensor))
        device = api.device_of(tensor)
        if (api, device) != (self._api, self._device):
            self._api, self._device, self._stream = api, device, Transfers(api, device).stream

    def launch(self) -> None:
        """Queue the kernel on the current stream of the device that was bound last.

        The structure is read during the call, so it may change between two calls.
        """
        driver = cuda()
        # the runtime takes the device of the thread's context, or the first where it has none
        if driver.num_devices > 1 and driver.current_device() != self._device:
            with driver.context(self._device):
                code = self._function(self._argument, self._stream())
        else:
            code = self._function(self._argument, self._stream())
        if code:
            text = self._kernels.fd_dsa_cuda_error
            text.restype = ctypes.c_char_p
            raise DeviceError(f"{self.launcher}: CUDA error {code}: {text(code).decode()}")

    def _address(
        self, name: str, tensor: Tensor, *, multiple: int = 1, may_have_gaps: bool = False
    ) -> int:
        """Address of a tensor on the device of the launch, a multiple of some bytes."""
        device = self._api.device_of(tensor)
        if device != self._device:
            raise LaunchError(
                f"{self.launcher}: {name} is on device {device}, others are on {self._device}"
            )
        if not may_have_gaps and not tensor.is_contiguous():
            raise LaunchError(
                f"{self.launcher}: {name} of shape {list(tensor.shape)} is not contiguous; call "
                ".contiguous() first"
            )
        address = int(tensor.data_ptr())
        if address % multiple:
            raise LaunchError(
                f"{self.launcher}: {name} begins off a multiple of {multiple} bytes; copy it first"
            )
        return address


shared_kernel = cache(lambda kind, kernels: kind(kernels))
"""The kernel of a type and a library that callers without one of their own share."""

_differences: dict[tuple[Any, Any], str] = {}


def difference(kind: Any, kernels: ctypes.CDLL | None, allocate: Allocate) -> str:
    """How a kernel's results differ from the definition; "" if they do not.

    The thread waits for the device at the first call for a kernel and a library.
    """
    if (kind, kernels) not in _differences:
        kernel, memory = kind(kernels), Memory(allocate)
        differences = (case.difference(kernel, memory) for case in kind.cases())
        _differences[kind, kernels] = next(filter(None, differences), "")
    return _differences[kind, kernels]


def why_not_compiled() -> str:
    """Why no compiled kernel reads the tensors of this process; "" if it does."""
    return "Triton kernels are interpreted here, on host memory" if INTERPRETING else ""
