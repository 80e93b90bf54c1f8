"""Exact top-k on a device by the CUDA C++ kernel of custom_ops/, called through its C ABI.

The kernel estimates a bound from samples of a row. One pass keeps the scores above the bound in
shared memory and selects the best of them. If the bound fails, the row is read again, digit by
digit. The result has the same bits as that of `triton_kernel`.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable
from typing import Any

from fd_dsa import custom_ops
from fd_dsa.device.allocation import Allocate
from fd_dsa.ops.key_bounds import NO_WINDOWS, PromptWindows
from fd_dsa.ops.library_kernel import LibraryKernel, difference, interpreter_refusal, shared_kernel
from fd_dsa.ops.probes import Case, topk_case
from fd_dsa.ops.providers import CUSTOM_OP, SelectedProvider, select_provider
from fd_dsa.ops.topk import triton_kernel
from fd_dsa.tensor import Tensor

_TENSORS = ("position_ids", "batch_ids", "block_tables", "out")
_WINDOWS = ("window_offsets", "key_starts", "seq_lens_encoder")
_NUMBERS = (
    "num_rows",
    "width",
    "k",
    "first_token",
    "table_width",
    "block_size",
    "num_blocks",
    "starts_early",
)


class TopkRows(ctypes.Structure):
    """Structure FdDsaTopk of custom_ops/csrc/topk.h, which documents the fields."""

    _fields_ = (
        *((n, ctypes.c_void_p) for n in ("logits", "lengths", "position_ids", "batch_ids")),
        *((n, ctypes.c_void_p) for n in ("block_tables", *_WINDOWS, "out")),
        ("row_stride", ctypes.c_int64),
        *((n, ctypes.c_int32) for n in _NUMBERS),
    )


class SlotSelector(LibraryKernel):
    """Kernel of a loaded library with the arguments of `triton_kernel.select_slots`."""

    launcher, size, structure = "fd_dsa_topk_cuda", "fd_dsa_topk_bytes", TopkRows
    _tensors: tuple[Any, ...] = (None,) * len(_TENSORS + _WINDOWS)

    @classmethod
    def cases(cls) -> Iterable[Case]:
        """Return cases of rows that one pass selects, and of rows that are read again."""
        return [topk_case((40, 5), (9000, 7), (20000, 2048))]

    def __call__(
        self,
        logits: Tensor,
        *tensors: Tensor,
        block_size: int,
        num_blocks: int,
        windows: PromptWindows = NO_WINDOWS,
        first_token: int = 0,
        num_rows: int | None = None,
    ) -> None:
        """Select as `triton_kernel.select_slots`, at the same cost."""
        read = tensors + windows
        for tensor, known in zip(read, self._tensors, strict=True):
            if tensor is not known:
                self._set_tensors(read)
                break
        rows = self.job
        # no reference to a step's scores, so that another step can reuse their memory
        rows.row_stride, rows.width = logits.stride()[0], logits.shape[1]
        rows.logits = self._address("logits", logits, may_have_gaps=True)
        rows.num_rows = logits.shape[0] if num_rows is None else num_rows
        rows.first_token = first_token
        rows.block_size, rows.num_blocks = block_size, num_blocks
        self.launch()

    def _set_tensors(self, tensors: tuple[Tensor, ...]) -> None:
        """Write the addresses of new tensors to the structure."""
        self._tensors = (None,) * len(tensors)
        slots, rows = tensors[3], self.job
        self.bind(slots)
        self._set_addresses(**dict(zip(_TENSORS + _WINDOWS, tensors, strict=True)))
        rows.k, rows.table_width = slots.shape[1], tensors[2].shape[1]
        # references, so that the allocator does not reuse these addresses
        self._tensors = tensors


def select_topk(kind: str, allocate: Allocate) -> SelectedProvider:
    """Select the provider of top-k for a kind of device.

    The first call compares a kernel of fd_dsa_ops with the definition, and waits for the device.
    """
    conditions = {CUSTOM_OP: interpreter_refusal()}
    return select_provider(
        "topk", kind, conditions, lambda k: difference(SlotSelector, k, allocate)
    )


def slot_selector(kind: str, allocate: Allocate) -> Callable[..., None]:
    """Return the selected `select_slots`, for one thread at a time."""
    if select_topk(kind, allocate).provider == CUSTOM_OP:
        return SlotSelector(custom_ops.build().kernels)
    return triton_kernel.select_slots


def select_slots(*tensors: Tensor, **options: Any) -> None:
    """Select by the kernel that all callers share, one thread at a time."""
    shared_kernel(SlotSelector, custom_ops.build().kernels)(*tensors, **options)
