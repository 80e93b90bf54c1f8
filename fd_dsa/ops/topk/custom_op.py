"""Exact top-k on a device by the CUDA C++ kernel of custom_ops/, called through its C ABI.

One pass over a row: scores above a bound taken from samples are kept in shared memory, where the
best are found; a row whose bound fails is read again, digit by digit. The result is that of
`triton_kernel`, bit by bit.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache
from typing import Any

from fd_dsa import custom_ops
from fd_dsa.errors import BackendUnavailable, LaunchError
from fd_dsa.ops.probes import Memory, topk_case
from fd_dsa.ops.providers import CUSTOM_OP, choose
from fd_dsa.ops.topk import triton_kernel
from fd_dsa.step.device import Allocate
from fd_dsa.triton_runtime import INTERPRETING
from fd_dsa.triton_runtime.c_launch import CLaunch
from fd_dsa.triton_runtime.device import api_for_type

_TENSORS = ("position_ids", "batch_ids", "block_tables", "out")
_NUMBERS = (
    "num_rows",
    "width",
    "k",
    "first_token",
    "table_width",
    "block_size",
    "num_blocks",
)


class TopkRows(ctypes.Structure):
    """FdDsaTopk of custom_ops/csrc/topk.h, which says what each field is."""

    _fields_ = (
        *((n, ctypes.c_void_p) for n in ("logits", "lengths", "position_ids", "batch_ids")),
        *((n, ctypes.c_void_p) for n in ("block_tables", "out")),
        ("row_stride", ctypes.c_int64),
        *((n, ctypes.c_int32) for n in _NUMBERS),
    )


class SlotSelector:
    """`select_slots` of a loaded library; one of these serves one thread at a time.

    Args:
        kernels: the library.

    Raises:
        BackendUnavailable: it is of another release.
    """

    def __init__(self, kernels: Any) -> None:
        if kernels.fd_dsa_topk_bytes() != ctypes.sizeof(TopkRows):
            raise BackendUnavailable(
                "fd_dsa_ops: its top-k takes another structure than this fd_dsa passes; build it "
                "again: make custom-ops"
            )
        self._kernels, self._rows = kernels, TopkRows()
        self._tensors: tuple[Any, ...] = (None,) * len(_TENSORS)
        self._api: Any = None
        self._launch: CLaunch | None = None
        self._device = -1

    def __call__(
        self,
        logits: Any,
        position_ids: Any,
        batch_id_per_token: Any,
        block_tables: Any,
        slots: Any,
        *,
        block_size: int,
        num_blocks: int,
        first_token: int = 0,
        num_rows: int | None = None,
    ) -> None:
        """See `triton_kernel.select_slots`: the same arguments, results and errors.

        Raises:
            DeviceError: the CUDA runtime refuses the launch, or earlier work has failed.

        Cost: one launch; no allocation, no wait.
        """
        tensors = position_ids, batch_id_per_token, block_tables, slots
        for tensor, known in zip(tensors, self._tensors, strict=True):
            if tensor is not known:
                self._take(tensors)
                break
        rows = self._rows
        # not held: a step's scores are large, and another step may reuse their memory
        rows.row_stride, rows.width = logits.stride()[0], logits.shape[1]
        rows.logits = self._address("logits", logits)
        rows.num_rows = logits.shape[0] if num_rows is None else num_rows
        rows.first_token = first_token
        rows.block_size, rows.num_blocks = block_size, num_blocks
        assert self._launch is not None
        self._launch()

    def _take(self, tensors: tuple[Any, ...]) -> None:
        """Remember other tensors than those of the call before."""
        self._tensors = (None,) * len(_TENSORS)
        slots, rows = tensors[3], self._rows
        api = api_for_type(type(slots))
        device = api.device_of(slots)
        if (api, device) != (self._api, self._device):
            self._launch = CLaunch(self._kernels, "fd_dsa_topk_cuda", rows, api, device)
            self._api, self._device = api, device
        for name, tensor in zip(_TENSORS, tensors, strict=True):
            if not tensor.is_contiguous():
                raise LaunchError(
                    f"select_slots: {name} of shape {list(tensor.shape)} is not contiguous; call "
                    ".contiguous() first"
                )
            setattr(rows, name, self._address(name, tensor))
        rows.k, rows.table_width = slots.shape[1], tensors[2].shape[1]
        # held, so that no other tensor gets these addresses
        self._tensors = tensors

    def _address(self, name: str, tensor: Any) -> int:
        """Address of a tensor on the device of the slots."""
        device = self._api.device_of(tensor)
        if device != self._device:
            raise LaunchError(
                f"select_slots: {name} is on device {device}, the slots are on device "
                f"{self._device}"
            )
        return tensor.data_ptr()


_differences: dict[Any, str] = {}


def difference(kernels: Any, allocate: Allocate) -> str:
    """Which of a few selections is wrong; "" for none.

    The thread waits for the device at the first call for a library.
    """
    if kernels not in _differences:
        case = topk_case((40, 5), (9000, 7), (20000, 2048))
        _differences[kernels] = case.difference(SlotSelector(kernels), Memory(allocate))
    return _differences[kernels]


def why_not_compiled() -> str:
    """Why no compiled kernel reads the tensors of this process; "" if it does."""
    return "Triton kernels are interpreted here, on host memory" if INTERPRETING else ""


def slot_selector(kind: str, allocate: Allocate) -> Callable[..., None]:
    """A `select_slots` for tensors in the memory of `allocate`, for one thread at a time.

    A kernel of fd_dsa_ops is compared with the definition first, for which the thread waits.

    Args:
        kind: of device, as `providers.device_kind` names it.

    Raises:
        ConfigError, BackendUnavailable: see `providers.choose`.
    """
    conditions = {CUSTOM_OP: why_not_compiled}
    choice = choose("topk", kind, conditions, lambda kernels: difference(kernels, allocate))
    if choice.provider == CUSTOM_OP:
        return SlotSelector(custom_ops.build().kernels)
    return triton_kernel.select_slots


@cache
def _selector(kernels: Any) -> SlotSelector:
    """The one of `select_slots`."""
    return SlotSelector(kernels)


def select_slots(*tensors: Any, **options: Any) -> None:
    """See `SlotSelector.__call__`; one thread at a time."""
    _selector(custom_ops.build().kernels)(*tensors, **options)
