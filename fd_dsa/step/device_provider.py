"""Device provider: the metadata of a step by one launch, in buffers that never move.

In a decode-only step each lane takes a row and writes its few tokens where the rows before it end.
So no lane searches for its row, and the block-table entry is loaded while the lengths are still
being summed. With prefill rows each lane takes a token. It finds its row by counting the rows that
end at or before it, so a long chunk is spread over many programs.

There is no barrier inside a launch, so every program sums the row lengths itself. Shapes, types and
values of the results are those of `ForwardMeta`.

Source: PaddlePaddle/FastDeploy #7367 (positions and slots) and #7598 (windows), whose kernels give
one thread to a row. The windows here reach back over cached prefixes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from fd_dsa.device.allocation import Allocate
from fd_dsa.device.staging import StagedInputs
from fd_dsa.device.transfers import on_host, transfers_for
from fd_dsa.environment import switch
from fd_dsa.errors import DtypeError, ShapeError
from fd_dsa.step import checks
from fd_dsa.step.checks import INPUTS, INT32_MAX, Counts, StepHints, StepLimits
from fd_dsa.step.forward_meta import FIELDS
from fd_dsa.tensor import StepArray
from fd_dsa.triton_runtime import paddle_jit

import triton
import triton.language as tl

# lanes and warps of a program: rows of a decode-only step, tokens of any other
DECODE_TILE, DECODE_WARPS = 32, 1
MIXED_TILE, MIXED_WARPS = 64, 8
# rows summed at a time; from fewer than a tile's tokens Triton 3.3 cannot compile a gather
_MIN_ROW_TILE, _MAX_ROW_TILE = MIXED_TILE, 1024

_SCALARS = ("num_rows", "num_padded_tokens", "row_stride")
_NUMBERS = (
    "num_rows",
    "num_padded_rows",
    "num_padded_tokens",
    "row_stride",
    "num_columns",
    "last_block",
)
# a decode-only step does not read the first
_INPUT_POINTERS = (
    "num_chunk_tokens_ptr",
    "num_computed_tokens_ptr",
    "num_scheduled_tokens_ptr",
    "block_tables_ptr",
)

Buffers = dict[str, StepArray | None]


class DeviceProvider:
    """Steps in the memory of a GPU, by two kernels that the constructor compiles.

    The first launch of each kernel writes an empty step, so that the buffers hold padding from the
    beginning. A step clears all rows after its own, and all tokens that an earlier step may have
    left. The host does not see the replays of a captured launch. Each replay writes only the tokens
    of its capture, and any step may come after it.

    Args:
        limits: sizes that every step keeps to.
        buffers: tensors at full capacity, one for each field.
        allocate: makes tensors on the device.
    """

    def __init__(self, limits: StepLimits, buffers: Buffers, allocate: Allocate) -> None:
        self._limits, self._allocate = limits, allocate
        self._kernels = tuple(
            BoundStepKernel(limits, buffers, has_prefill) for has_prefill in (False, True)
        )
        self._tokens, self._windows = _Extent(), _Extent()
        empty = (buffers["cu_seqlens_q"],) * len(INPUTS)
        for kernel in self._kernels:
            kernel.launch(empty, 0, limits.max_num_tokens, 0)
        a_buffer: Any = buffers["cu_seqlens_q"]
        self._int32, self._transfers = a_buffer.dtype, transfers_for(a_buffer)
        self._staging: StagedInputs | None = None
        # checks that read device tensors back
        self._reads_back = bool(switch("FD_DSA_CHECK"))

    def write(self, arrays: tuple[StepArray, ...], hints: StepHints) -> tuple[Any, Counts]:
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
        inputs: Sequence[StepArray] = arrays
        if is_host.pop():
            inputs, counts = self._stage(arrays, hints)
        else:
            is_captured = self._transfers.is_capturing()
            counts = self._check_tensors(arrays, hints, is_captured)
        self._launch(inputs, counts, is_captured)
        return inputs, counts

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
            # kernels know the distance of two rows, and take the values of a row to be adjacent
            if tensor.stride()[-1] != 1 and tensor.shape[0] and tensor.shape[-1] > 1:
                raise ShapeError(
                    f"{name}: got strides {list(tensor.stride())}, the last must be 1; "
                    "call .contiguous() first"
                )
        counts = checks.check_device_counts(self._limits, hints)
        if self._reads_back and not is_captured:
            like = [np.empty(tuple(tensor.shape), np.int32) for tensor in tensors]
            chunks, computed, scheduled, tables = (
                on_host(t.contiguous(), x) for t, x in zip(tensors, like, strict=True)
            )
            values = chunks, computed, scheduled, tables
            checks.check_values(values, self._limits, hints)
        return counts

    def _launch(self, inputs: Sequence[StepArray], counts: Counts, is_captured: bool) -> None:
        """Enqueue the step of four checked tensors of the same rows, or capture it."""
        _, num_prefill_tokens, _, padded = counts
        tables, has_prefill = inputs[3], num_prefill_tokens > 0
        extents = (self._tokens, self._windows) if has_prefill else (self._tokens,)
        written = padded
        if not is_captured:
            for extent in extents:
                written = max(written, extent.used)
        self._kernels[has_prefill].launch(
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
        # a decode-only step has no prefill chunks
        self._first = 0 if has_prefill else 1
        self._names = _INPUT_POINTERS[self._first :]
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
        self, inputs: Sequence[StepArray], num_rows: int, num_padded_tokens: int, row_stride: int
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


@triton.jit
def _lengths(num_scheduled_tokens_ptr, rows, num_rows, num_padded_tokens):
    """Load the tokens of each row within 0..num_padded_tokens, 0 past the last row."""
    lengths = tl.load(num_scheduled_tokens_ptr + rows, mask=rows < num_rows, other=0)
    return tl.minimum(tl.maximum(lengths, 0), num_padded_tokens)


@triton.jit
def _slots(tables, rows, positions, live, BLOCK_SIZE: tl.constexpr):
    """Return the cache slot of each position, -1 if the table has no valid block for it.

    `tables`: address of the block tables, distance of two rows, number of columns, and last block
    of the cache.
    """
    block_tables_ptr, row_stride, num_columns, last_block = tables
    columns = positions // BLOCK_SIZE
    live = live & (positions >= 0) & (columns < num_columns)
    entries = block_tables_ptr + rows.to(tl.int64) * row_stride + columns
    blocks = tl.load(entries, mask=live, other=-1)
    slots = blocks.to(tl.int64) * BLOCK_SIZE + positions % BLOCK_SIZE
    return tl.where((blocks >= 0) & (blocks <= last_block), slots, -1)


@triton.jit
def _store_tokens(outputs, int32_ptr, tokens, rows, positions, slots, mask):
    """Store row, position (int32 too, if there is a buffer) and slot of each token."""
    batch_id_per_token_ptr, position_ids_ptr, slot_mapping_ptr = outputs
    tl.store(batch_id_per_token_ptr + tokens, rows, mask)
    tl.store(position_ids_ptr + tokens, positions.to(tl.int64), mask)
    if int32_ptr is not None:
        tl.store(int32_ptr + tokens, positions, mask)
    tl.store(slot_mapping_ptr + tokens, slots, mask)


@paddle_jit(do_not_specialize=_NUMBERS, do_not_specialize_on_alignment=_INPUT_POINTERS[1:])
def decode_step_metadata_kernel(
    num_computed_tokens_ptr,
    num_scheduled_tokens_ptr,
    block_tables_ptr,
    batch_id_per_token_ptr,
    position_ids_ptr,
    position_ids_int32_ptr,
    slot_mapping_ptr,
    cu_seqlens_q_ptr,
    num_rows,
    num_padded_rows,
    num_padded_tokens,
    row_stride,
    num_columns,
    last_block,
    BLOCK_SIZE: tl.constexpr,
    ROW_TILE: tl.constexpr,
    NUM_ROW_TILES: tl.constexpr,
    TILE: tl.constexpr,
):
    """Write rows [TILE * program, TILE * (program + 1)), and padding in that range of tokens."""
    tables = (block_tables_ptr, row_stride, num_columns, last_block)
    # Triton 3.3 takes no None in a tuple
    int32_ptr = position_ids_int32_ptr
    outputs = (batch_id_per_token_ptr, position_ids_ptr, slot_mapping_ptr)
    first = tl.program_id(0) * TILE
    rows = first + tl.arange(0, TILE)
    lengths = _lengths(num_scheduled_tokens_ptr, rows, num_rows, num_padded_tokens)
    cached = tl.load(num_computed_tokens_ptr + rows, rows < num_rows, other=0)
    slots = _slots(tables, rows, cached, lengths > 0, BLOCK_SIZE)
    before = 0
    num_tokens = 0
    for tile in range(NUM_ROW_TILES):
        others = tile * ROW_TILE + tl.arange(0, ROW_TILE)
        counts = _lengths(num_scheduled_tokens_ptr, others, num_rows, num_padded_tokens)
        before += tl.sum(tl.where(others < first, counts, 0))
        num_tokens += tl.sum(counts)
    ends = before + tl.cumsum(lengths)
    starts = ends - lengths

    exists = rows < num_padded_rows
    tl.store(cu_seqlens_q_ptr + rows, 0, rows == 0)
    tl.store(cu_seqlens_q_ptr + rows + 1, ends, exists)

    written = (lengths > 0) & (starts >= 0) & (starts < num_padded_tokens)
    _store_tokens(outputs, int32_ptr, starts, rows, cached, slots, written)
    for draft in range(1, tl.max(lengths)):
        tokens = starts + draft
        positions = cached + draft
        written = (lengths > draft) & (tokens >= 0) & (tokens < num_padded_tokens)
        slots = _slots(tables, rows, positions, written, BLOCK_SIZE)
        _store_tokens(outputs, int32_ptr, tokens, rows, positions, slots, written)

    tokens = first + tl.arange(0, TILE)
    padding = (tokens >= num_tokens) & (tokens < num_padded_tokens)
    zeros = tl.zeros((TILE,), tl.int32)
    _store_tokens(outputs, int32_ptr, tokens, zeros - 1, zeros, zeros - 1, padding)


@paddle_jit(do_not_specialize=_NUMBERS, do_not_specialize_on_alignment=_INPUT_POINTERS)
def mixed_step_metadata_kernel(
    num_chunk_tokens_ptr,
    num_computed_tokens_ptr,
    num_scheduled_tokens_ptr,
    block_tables_ptr,
    batch_id_per_token_ptr,
    position_ids_ptr,
    position_ids_int32_ptr,
    slot_mapping_ptr,
    cu_seqlens_q_ptr,
    indexer_attn_mask_offsets_ptr,
    cu_seqlens_kg_ptr,
    num_rows,
    num_padded_rows,
    num_padded_tokens,
    row_stride,
    num_columns,
    last_block,
    BLOCK_SIZE: tl.constexpr,
    ROW_TILE: tl.constexpr,
    NUM_ROW_TILES: tl.constexpr,
    TILE: tl.constexpr,
):
    """Write tokens [TILE * program, TILE * (program + 1)), and in the first program all rows."""
    tables = (block_tables_ptr, row_stride, num_columns, last_block)
    # Triton 3.3 takes no None in a tuple
    int32_ptr = position_ids_int32_ptr
    outputs = (batch_id_per_token_ptr, position_ids_ptr, slot_mapping_ptr)
    tokens = tl.program_id(0) * TILE + tl.arange(0, TILE)
    token_rows = tl.zeros((TILE,), tl.int32)
    # position of a token = its index + shift of its row
    shifts = tl.zeros((TILE,), tl.int32)
    # where the row's gathered keys start; -1 for a decode row
    windows = tl.full((TILE,), -1, tl.int32)
    num_tokens = 0
    num_keys = 0
    for tile in range(NUM_ROW_TILES):
        rows = tile * ROW_TILE + tl.arange(0, ROW_TILE)
        lengths = _lengths(num_scheduled_tokens_ptr, rows, num_rows, num_padded_tokens)
        cached = tl.load(num_computed_tokens_ptr + rows, rows < num_rows, other=0)
        is_prefill = tl.load(num_chunk_tokens_ptr + rows, rows < num_rows, other=0) > 0
        gathered = lengths + tl.where(is_prefill, cached, 0)
        ends = num_tokens + tl.cumsum(lengths)
        starts = ends - lengths
        key_ends = num_keys + tl.cumsum(gathered)
        key_starts = key_ends - gathered

        if tl.program_id(0) == 0:
            exists = rows < num_padded_rows
            tl.store(cu_seqlens_q_ptr + rows, 0, rows == 0)
            tl.store(cu_seqlens_q_ptr + rows + 1, ends, exists)
            tl.store(cu_seqlens_kg_ptr + rows, 0, rows == 0)
            tl.store(cu_seqlens_kg_ptr + rows + 1, key_ends, exists)

        # rows of this tile that end at or before the token
        done = tl.sum((ends[:, None] <= tokens[None, :]).to(tl.int32), axis=0)
        row = tl.minimum(done, ROW_TILE - 1)
        here = (tokens >= num_tokens) & (done < ROW_TILE)
        shifts = tl.where(here, tl.gather(cached - starts, row, 0), shifts)
        windows = tl.where(here, tl.gather(tl.where(is_prefill, key_starts, -1), row, 0), windows)
        token_rows += done
        if tile + 1 < NUM_ROW_TILES:
            num_tokens += tl.sum(lengths)
            num_keys += tl.sum(gathered)

    # a token past the last one has counted all rows, and the empty lanes of the last tile
    live = token_rows < num_rows
    positions = tl.where(live, tokens + shifts, 0)
    slots = _slots(tables, token_rows, positions, live, BLOCK_SIZE)
    has_window = live & (windows >= 0)
    ks = tl.where(has_window, windows, 0)
    ke = tl.where(has_window, windows + positions + 1, 0)
    exists = tokens < num_padded_tokens
    _store_tokens(
        outputs, int32_ptr, tokens, tl.where(live, token_rows, -1), positions, slots, exists
    )
    pairs = 2 * tokens[:, None] + tl.arange(0, 2)[None, :]
    tl.store(indexer_attn_mask_offsets_ptr + pairs, tl.join(ks, ke), exists[:, None])
