"""Device provider: the metadata of a step by one launch, in buffers that never move."""

from __future__ import annotations

from typing import Any

import numpy as np

from fd_dsa.device.allocation import Allocate
from fd_dsa.device.staging import StagedInputs
from fd_dsa.device.transfers import on_host, transfers_for
from fd_dsa.environment import switch
from fd_dsa.errors import DtypeError, ShapeError
from fd_dsa.step import checks
from fd_dsa.step.checks import INPUTS, INT32_MAX, Counts, StepHints, StepLimits
from fd_dsa.step.forward_meta import ForwardMeta
from fd_dsa.step.metadata_kernels import decode_step_metadata_kernel, mixed_step_metadata_kernel
from fd_dsa.step.views import FIELDS, StepViews, new_buffers
from fd_dsa.tensor import StepArray

# lanes and warps of a program: rows of a decode-only step, tokens of any other
DECODE_TILE, DECODE_WARPS = 32, 1
MIXED_TILE, MIXED_WARPS = 64, 8
# rows summed at a time; from fewer than a tile's tokens Triton 3.3 cannot compile a gather
_MIN_ROW_TILE, _MAX_ROW_TILE = MIXED_TILE, 1024

_SCALARS = ("num_rows", "num_padded_tokens", "row_stride")
Buffers = dict[str, StepArray | None]


class DeviceProvider:
    """Steps in the memory of a GPU, by two kernels that are compiled here.

    The first launch of each kernel, here, writes an empty step, so that the buffers hold padding
    from the beginning. A step clears all rows after its own, and all tokens that an earlier step
    may have left. The host does not see the replays of a captured launch. Each replay writes the
    tokens of its capture and no others, and any later step may follow a replay.

    Args:
        limits, int32_position_ids: as in `new_buffers`.
        allocate: makes tensors on the device.
    """

    def __init__(
        self, limits: StepLimits, allocate: Allocate, int32_position_ids: bool = False
    ) -> None:
        self._limits, self._allocate = limits, allocate
        buffers = new_buffers(limits, allocate, int32_position_ids)
        self._views = StepViews(buffers, lambda tensor: tensor)
        self._forms = tuple(
            BoundStepKernel(limits, buffers, has_prefill) for has_prefill in (False, True)
        )
        self._tokens, self._windows = _Extent(), _Extent()
        empty = (buffers["cu_seqlens_q"],) * len(INPUTS)
        for form in self._forms:
            form.launch(empty, 0, limits.max_num_tokens, 0)
        a_buffer: Any = buffers["cu_seqlens_q"]
        self._int32, self._transfers = a_buffer.dtype, transfers_for(a_buffer)
        self._staging: StagedInputs | None = None
        # checks that read device tensors back
        self._reads_back = bool(switch("FD_DSA_CHECK"))

    def build(self, arrays: tuple[StepArray, ...], hints: StepHints) -> ForwardMeta:
        """Compute a step of four device tensors or NumPy arrays, as `StepMetadataBuilder.build`."""
        kinds_of = {type(array): array for array in arrays}.values()
        is_host = {isinstance(array, np.ndarray) for array in kinds_of}
        if len(is_host) != 1 or not all(hasattr(array, "shape") for array in kinds_of):
            kinds = ", ".join(type(array).__name__ for array in arrays)
            raise DtypeError(
                f"{', '.join(INPUTS)}: got {kinds}, allowed are four NumPy arrays or "
                "four tensors on the builder's device; do not mix them"
            )
        is_captured = False
        if is_host.pop():
            inputs, counts = self._stage(arrays, hints)
        else:
            is_captured = self._transfers.is_capturing()
            inputs, counts = arrays, self._check_tensors(arrays, hints, is_captured)
        self._launch(inputs, counts, is_captured)
        return self._views.forward_meta(inputs, counts)

    def _stage(self, arrays: tuple[StepArray, ...], hints: StepHints) -> tuple[Any, Counts]:
        """Check host arrays in full, and enqueue their copy to the device."""
        (*lengths, tables), counts = checks.check_host_step(arrays, self._limits, hints)
        if self._staging is None:
            rows, columns = self._limits.max_num_seqs, self._limits.max_blocks_per_seq
            self._staging = StagedInputs(self._allocate, (rows,) * 3, rows, columns)
        return self._staging.upload(lengths, tables), counts

    def _check_tensors(
        self, tensors: tuple[StepArray, ...], hints: StepHints, is_captured: bool
    ) -> Counts:
        """Check shapes, dtypes and counts of device tensors, their values with FD_DSA_CHECK=1."""
        checks.check_arrays(tensors, self._int32, self._limits)
        for name, tensor in zip(INPUTS, tensors, strict=True):
            # rows of a table may lie apart, the values of one must not
            if tensor.stride()[-1] != 1 and tensor.shape[0] and tensor.shape[-1] > 1:
                raise ShapeError(
                    f"{name}: got strides {list(tensor.stride())}, the last must be 1; "
                    "call .contiguous() first"
                )
        counts = checks.check_device_counts(self._limits, hints)
        if self._reads_back and not is_captured:
            like = [np.empty(tuple(tensor.shape), np.int32) for tensor in tensors]
            encoder, decoder, this_time, tables = (
                on_host(t.contiguous(), x) for t, x in zip(tensors, like, strict=True)
            )
            values = encoder, decoder, this_time, tables
            checks.check_values(values, self._limits, hints)
        return counts

    def _launch(self, inputs: tuple[StepArray, ...], counts: Counts, is_captured: bool) -> None:
        """Enqueue the step of four checked tensors of the same rows, or capture it."""
        _, num_prefill_tokens, _, padded = counts
        tables, has_prefill = inputs[3], num_prefill_tokens > 0
        extents = (self._tokens, self._windows) if has_prefill else (self._tokens,)
        written = padded
        if not is_captured:
            for extent in extents:
                written = max(written, extent.used)
        self._forms[has_prefill].launch(
            inputs, int(tables.shape[0]), written, int(tables.stride()[0])
        )
        for extent in extents:
            extent.follow(padded, is_captured)


class _Extent:
    """Number of tokens of some buffers that may hold more than padding.

    Attributes:
        used: tokens that the next step must clear or write.
    """

    def __init__(self) -> None:
        self.used = self._captured = 0

    def follow(self, num_tokens: int, is_captured: bool) -> None:
        """Record that a step of `num_tokens` was launched, or captured and so not launched yet."""
        if is_captured:
            self._captured = max(self._captured, num_tokens)
            num_tokens = self.used
        self.used = max(num_tokens, self._captured)


class BoundStepKernel:
    """Kernel for steps with or without prefill rows, bound to the buffers."""

    def __init__(self, limits: StepLimits, buffers: Buffers, has_prefill: bool) -> None:
        rows, kernel = limits.max_num_seqs, decode_step_metadata_kernel
        self._tile, warps, self._min_programs = DECODE_TILE, DECODE_WARPS, -(-rows // DECODE_TILE)
        if has_prefill:
            kernel, self._min_programs = mixed_step_metadata_kernel, 1
            self._tile, warps = MIXED_TILE, MIXED_WARPS
        # a decode-only step reads no encoder lengths: they are 0
        self._first = 0 if has_prefill else 1
        self._names = [f"{name}_ptr" for name in INPUTS[self._first :]]
        self._addresses: list[int] = []
        outputs = [name for name, field in FIELDS.items() if has_prefill or not field.is_window]
        row_tile = row_tile_for(rows)
        self._bound = kernel.bind(
            (1,),
            **dict.fromkeys(self._names, buffers["cu_seqlens_q"]),
            **{f"{name}_ptr": buffers[name] for name in outputs},
            num_rows=0,
            num_padded_rows=rows,
            num_padded_tokens=0,
            row_stride=0,
            num_columns=limits.max_blocks_per_seq,
            last_block=INT32_MAX if limits.num_blocks is None else limits.num_blocks - 1,
            BLOCK_SIZE=limits.block_size,
            ROW_TILE=row_tile,
            NUM_ROW_TILES=-(-rows // row_tile),
            TILE=self._tile,
            num_warps=warps,
            scalars=_SCALARS,
        )

    def launch(
        self, inputs: tuple[StepArray, ...], num_rows: int, num_padded_tokens: int, row_stride: int
    ) -> None:
        """Enqueue the kernel over rows and padded tokens."""
        read = inputs[self._first :]
        addresses = [tensor.data_ptr() for tensor in read]
        if addresses != self._addresses:
            # the bound tensors keep their memory, so no other tensor gets these addresses
            self._bound.exchange(**dict(zip(self._names, read, strict=True)))
            self._addresses = addresses
        num_programs = max(self._min_programs, -(-num_padded_tokens // self._tile))
        self._bound(num_rows, num_padded_tokens, row_stride, grid=(num_programs,))


def row_tile_for(max_num_seqs: int) -> int:
    """Return the rows that a program sums at a time: a power of two, all rows up to a limit."""
    power = 1 << (max_num_seqs - 1).bit_length()
    return min(max(power, _MIN_ROW_TILE), _MAX_ROW_TILE)
