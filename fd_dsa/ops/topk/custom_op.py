"""Exact top-k on a device by the CUDA C++ kernel of custom_ops/, called through its C ABI.

One pass over a row: scores above a bound taken from samples are kept in shared memory, where the
best are found; a row whose bound fails is read again, digit by digit. The result is that of
`triton_kernel`, bit by bit.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np

from fd_dsa.errors import BackendUnavailable, LaunchError
from fd_dsa.ops._host import check_first_token
from fd_dsa.ops.topk.arguments import check_logits, check_selection
from fd_dsa.ops.topk.paddle_impl import positions_to_slots, select_positions
from fd_dsa.step.device import Allocate
from fd_dsa.triton_runtime.c_launch import CLaunch
from fd_dsa.triton_runtime.device import api_for_type
from fd_dsa.triton_runtime.transfers import on_host, uploaded

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
        for given, known in zip(tensors, self._tensors, strict=True):
            if given is not known:
                self._take(tensors)
                break
        rows = self._rows
        # not held: a step's scores are large, and another's may come to lie there
        rows.row_stride, rows.width = check_logits(logits), logits.shape[1]
        rows.logits = self._address("logits", logits)
        num_rows = logits.shape[0] if num_rows is None else num_rows
        check_first_token("select_slots", first_token, num_rows, slots.shape[0])
        rows.num_rows, rows.first_token = num_rows, first_token
        rows.block_size, rows.num_blocks = block_size, num_blocks
        assert self._launch is not None
        self._launch()

    def _take(self, tensors: tuple[Any, ...]) -> None:
        """Check and remember other tensors than those of the call before."""
        self._tensors = (None,) * len(_TENSORS)
        check_selection(*tensors)
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
        # held, so that nothing else can come to lie at these addresses
        self._tensors = tensors

    def _address(self, name: str, tensor: Any) -> int:
        """Where a tensor lies on the device of the slots."""
        device = self._api.device_of(tensor)
        if device != self._device:
            raise LaunchError(
                f"select_slots: {name} is on device {device}, the slots are on device "
                f"{self._device}"
            )
        return tensor.data_ptr()


def difference(kernels: Any, allocate: Allocate) -> str:
    """Which of a few small selections differs from the host's; "" for none. Waits for the device.

    Args:
        kernels: a library that offers to serve.
        allocate: makes a tensor of a shape and dtype on the device.
    """
    select, rng = SlotSelector(kernels), np.random.default_rng(0)
    for number, (width, k) in enumerate(((40, 5), (9000, 7), (20000, 2048))):
        positions = np.array([width - 1, k - 1, 0, width // 2 + k], np.int64)
        batch_ids = np.array([0, 1, -1, 1], np.int32)
        tables = rng.permutation(2 * width // 8 + 2).astype(np.int32).reshape(2, -1)
        # a plateau, a spread and two signs
        scores = rng.standard_normal((4, width)).astype(np.float32)
        scores[3] = np.maximum(np.round(scores[3]), 0)
        scores[0, ::7] *= np.float32(-1e-40)
        lengths = np.where(batch_ids < 0, 0, positions + 1)
        chosen = select_positions(scores, lengths, k)
        wanted = positions_to_slots(chosen, np.maximum(batch_ids, 0), tables, 8)
        arrays = scores, positions, batch_ids, tables
        inputs = [uploaded(allocate, array) for array in arrays]
        slots = allocate((4, k), "int32")
        select(*inputs, slots, block_size=8, num_blocks=tables.size)
        if not np.array_equal(on_host(slots, wanted), wanted):
            return f"selection {number} of the probe differs from the definition"
    return ""
