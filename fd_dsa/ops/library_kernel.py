"""Launches of the kernels of custom_ops/ through their C ABI."""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Callable
from functools import cache
from typing import Any, ClassVar, TypeVar

from fd_dsa import custom_ops
from fd_dsa.device.allocation import Allocate
from fd_dsa.device.transfers import Transfers
from fd_dsa.environment import launches_overlap
from fd_dsa.errors import BackendUnavailable, DeviceError, LaunchError
from fd_dsa.ops.fixed_order import row_dependence_refusal
from fd_dsa.ops.probes import Memory
from fd_dsa.tensor import Tensor
from fd_dsa.triton_runtime import INTERPRETING
from fd_dsa.triton_runtime.compile_ahead import MODE
from fd_dsa.triton_runtime.device_api import api_for_type, traits_for
from fd_dsa.triton_runtime.driver import cuda

logger = logging.getLogger(__name__)
_HOPPER = 90


class LibraryKernel:
    """Kernel of a loaded library, for one thread at a time.

    A call raises LaunchError for a tensor with gaps, and for one on another device than the others.
    It raises DeviceError if the CUDA runtime rejects the launch, or if earlier work has failed.

    Attributes:
        launcher: name of the kernel's C function.
        size: name of the C function that returns the size of the structure.
        structure: type of the C function's argument. If it has a field `starts_early`, a launch may
            begin before the previous one has ended.
        job: structure that the next launch reads.

    Raises:
        BackendUnavailable: the library is of another release.
    """

    launcher: ClassVar[str]
    size: ClassVar[str]
    structure: ClassVar[type[ctypes.Structure]]

    def __init__(self, kernels: ctypes.CDLL) -> None:
        # a library of an earlier release may lack the function
        if getattr(kernels, self.size, int)() != ctypes.sizeof(self.structure):
            raise BackendUnavailable(
                f"fd_dsa_ops: {self.launcher} expects another structure than this fd_dsa passes; "
                f"build it again: {custom_ops.build_command()}"
            )
        self._kernels, self.job = kernels, self.structure()
        if "starts_early" in (field[0] for field in self.structure._fields_):
            self.job.starts_early = launches_overlap()
        self._function, self._argument = getattr(kernels, self.launcher), ctypes.byref(self.job)
        self._stream: Callable[[], ctypes.c_void_p]
        self._api: Any = None
        self._device = -1

    def bind(self, tensor: Tensor) -> None:
        """Set the device of the next launches to that of a tensor."""
        api = api_for_type(type(tensor))
        device = api.device_of(tensor)
        if (api, device) != (self._api, self._device):
            self._api, self._device, self._stream = api, device, Transfers(api, device).stream

    def launch(self) -> None:
        """Enqueue the kernel on the current stream of the device that was bound last.

        The call reads the structure, so the structure may change between two calls.
        """
        if MODE.ahead is not None:
            # its inputs may be results of kernels that did not run
            return
        code = cuda().run_on(self._device, self._function, self._argument, self._stream())
        if code:
            text = self._kernels.fd_dsa_cuda_error
            text.restype = ctypes.c_char_p
            raise DeviceError(f"{self.launcher}: CUDA error {code}: {text(code).decode()}")

    def _address(
        self, name: str, tensor: Tensor, *, multiple: int = 1, may_have_gaps: bool = False
    ) -> int:
        """Return the address of a tensor, after checks of device, gaps and alignment."""
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
                f"{self.launcher}: {name} is not aligned to {multiple} bytes; copy it first"
            )
        return address

    def _set_addresses(self, multiple: int = 1, /, **tensors: Tensor | None) -> None:
        """Write the addresses of tensors to the fields of these names, null for None.

        Args:
            multiple: alignment of the addresses in bytes.
        """
        for name, tensor in tensors.items():
            address = None if tensor is None else self._address(name, tensor, multiple=multiple)
            setattr(self.job, name, address)


Kernel = TypeVar("Kernel", bound=LibraryKernel)
shared_kernel = cache(lambda kind, kernels: kind(kernels))
"""Kernel of a type and a library, shared by callers without one of their own."""

_differences: dict[tuple[Any, Any], str] = {}


def difference(kind: Any, kernels: ctypes.CDLL | None, allocate: Allocate) -> str:
    """Return the difference of a kernel's results from the definition, or "".

    The first call for a kernel and a library waits for the device. Only top-k and sparse MLA are
    checked in this way.

    Args:
        kind: type of the kernel, whose `cases()` returns the self-checks.
    """
    if (kind, kernels) not in _differences:
        kernel, memory = kind(kernels), Memory(allocate)
        differences = (case.difference(kernel, memory) for case in kind.cases())
        _differences[kind, kernels] = next(filter(None, differences), "")
    return _differences[kind, kernels]


def interpreter_refusal() -> str:
    """Return the reason why compiled kernels cannot read this process's tensors, or ""."""
    return "Triton kernels are interpreted here, on host memory" if INTERPRETING else ""


def unsupported_reason(tensor: Tensor) -> str:
    """Return why a kernel for Hopper does not support the device of a tensor, or ""."""
    capability = traits_for(tensor).capability
    return "" if capability == _HOPPER else f"the GPU is of capability {capability}, not {_HOPPER}"


def hopper_kernel(
    kind: Callable[..., Kernel],
    tensor: Tensor,
    served: str,
    *,
    depends_on_rows: bool = True,
    refusal: str = "",
) -> Kernel | None:
    """Return a kernel for Hopper, None to use Triton's.

    Args:
        kind: type of the kernel.
        tensor: argument of the kernel, on its device.
        served: what the kernel serves, for the log, which has a line for each choice.
        depends_on_rows: True if its order of sums, or its use, depends on the number of rows.
        refusal: reason of the caller to use Triton's, or "".
    """
    reason = row_dependence_refusal() if depends_on_rows else ""
    reason = reason or interpreter_refusal() or unsupported_reason(tensor) or refusal
    found: Kernel | None = _chosen(kind, custom_ops.build().kernels, reason, served)
    return found


@cache
def _chosen(kind: Any, kernels: ctypes.CDLL | None, reason: str, served: str) -> Any:
    """Return the kernel of a library, None if there is a reason against it."""
    found = None
    if not reason and kernels is None:
        reason = f"{custom_ops.PACKAGE} is {custom_ops.build().state}"
    if not reason:
        try:
            found = shared_kernel(kind, kernels)
        except BackendUnavailable as error:
            reason = str(error)
    provider = "custom_op" if found else f"triton (not custom_op: {reason})"
    logger.info("%s: %s", served, provider)
    return found
