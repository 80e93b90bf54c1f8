"""Builder of the metadata that all layers of a step share, and its computation on the host."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np

from fd_dsa.device.allocation import CACHED_VIEWS, Allocate, paddle_allocator
from fd_dsa.device.host_tensor import Int32Array, Int64Array, as_tensor
from fd_dsa.errors import BackendUnavailable
from fd_dsa.step.checks import (
    Counts,
    HostInputs,
    StepHints,
    StepLimits,
    check_host_step,
    gathered_keys,
)
from fd_dsa.step.forward_meta import FIELDS, ForwardMeta
from fd_dsa.tensor import StepArray

if TYPE_CHECKING:
    from fd_dsa.step.device_provider import DeviceProvider

View = Callable[[Any], StepArray]
"""Makes an array of a step on a slice of a buffer."""
# padding of the four inputs, in their order
_PADDING = (0, 0, 0, -1)


class StepMetadataBuilder:
    """Builds the `ForwardMeta` of every step in buffers that are allocated once.

    One thread at a time, and one stream of steps.

    Args:
        max_num_seqs: maximum number of rows of a step.
        max_num_tokens: maximum number of tokens of a step, padding included.
        max_blocks_per_seq: number of columns of the block tables.
        block_size: number of tokens of a block.
        num_blocks: number of physical blocks of the cache, for the check of block ids; None = no
            upper bound.
        device: "cpu" = the arrays of a step are Paddle CPU tensors over the builder's memory.
            "numpy" = the arrays are NumPy arrays, and Paddle is never imported.
            "gpu", "gpu:0" or a custom device such as "name:0" = Paddle tensors on the device,
            written by one launch of a Triton kernel.
        allocate: makes the buffers on a device, `(shape, dtype name) -> tensor`, for tensors of
            another library that the launcher knows; None = Paddle tensors.
        int32_position_ids: True = each step has its positions as int32 too, for operators that
            take no int64. They cost no launch.

    Attributes:
        limits: sizes that every step keeps to.
        device: as given.
        num_builds: number of steps that have been built. A refused step does not count.

    Raises:
        ValueError: a size is no integer, is below 1, or does not fit int32.
        BackendUnavailable: no provider supports the device, or Paddle is missing.
    """

    def __init__(
        self,
        max_num_seqs: int,
        max_num_tokens: int,
        max_blocks_per_seq: int,
        block_size: int,
        num_blocks: int | None = None,
        device: str = "cpu",
        allocate: Allocate | None = None,
        int32_position_ids: bool = False,
    ) -> None:
        self.limits = limits = StepLimits(
            max_num_seqs, max_num_tokens, max_blocks_per_seq, block_size, num_blocks
        )
        self.device = device
        self.num_builds = 0
        self._provider: HostProvider | DeviceProvider
        view: View = _same
        if allocate is None and device in ("cpu", "numpy"):
            view = _paddle_view() if device == "cpu" else _same
            buffers = _new_buffers(limits, np.zeros, int32_position_ids)
            self._provider = HostProvider(limits, buffers, view)
        else:
            # imported here, because the kernels and their launcher need Triton
            from fd_dsa.step.device_provider import DeviceProvider

            allocate = allocate or paddle_allocator(device)
            buffers = _new_buffers(limits, allocate, int32_position_ids)
            self._provider = DeviceProvider(limits, buffers, allocate)
        # a partial of a function, not of a method: the cache then keeps no builder alive
        self._cut = lru_cache(maxsize=CACHED_VIEWS)(partial(_cut, buffers, view))

    def build(
        self,
        seq_lens_encoder: StepArray,
        seq_lens_decoder: StepArray,
        seq_lens_this_time: StepArray,
        block_tables: StepArray,
        num_padded_tokens: int | None = None,
        *,
        num_tokens: int | None = None,
        num_prefill_tokens: int | None = None,
        max_seqlen_k: int | None = None,
    ) -> ForwardMeta:
        """Compute the metadata of one step, valid until the next `build` of this builder.

        A step is checked before the first write, so a refused step changes no metadata.

        On "cpu" and "numpy" the inputs are NumPy arrays or Paddle CPU tensors, which are copied.

        Host arrays on a device: four NumPy arrays are checked as on a CPU. Then they are copied
        through page-locked memory, without a wait.

        Tensors on a device: the kernel reads them when it runs, and the metadata refers to them.
        They must keep their values until the step has run, as FastDeploy's `share_inputs` do. Only
        shapes and dtypes are checked, and `num_tokens`, `num_prefill_tokens` and `max_seqlen_k`
        are required. A table entry that is no block gives slot -1. If FD_DSA_CHECK=1 is set when
        the builder is made, each step waits for the values and checks them.

        A build from tensors can be captured in a graph. A replay reads the same tensors again, for
        the rows and the padded tokens of the capture. Rows without tokens are idle.

        After a build outside of a graph all tokens of the buffers past the step hold padding. So a
        graph of layers may read any number of tokens. A replay of a captured build clears only its
        own padded tokens. Windows are cleared only by steps with windows.

        Args:
            seq_lens_encoder: int32 [B]; tokens of a prefill row, 0 for a decode or idle row.
            seq_lens_decoder: int32 [B]; tokens of the row that are in the cache.
            seq_lens_this_time: int32 [B]; tokens of the row in this step, 0 = idle.
            block_tables: int32 [B, max_blocks_per_seq]; physical block of each logical block.
                Entries past the end of a row are copied without a check.
            num_padded_tokens: T of the token arrays; None = the number of tokens.
            num_tokens: number of tokens of the step, which must agree with the arrays. With device
                tensors it may be an upper bound, and tokens past those of the rows become padding.
            num_prefill_tokens: number of tokens of prefill rows, likewise.
            max_seqlen_k: number of keys of the longest row, or an upper bound, which the metadata
                then has.

        Returns:
            ForwardMeta with B rows and T tokens. B may be below `max_num_seqs`, and a step may
            have no token at all.

        Raises:
            DtypeError, ShapeError: an input is not int32, or shapes disagree.
            CapacityError: too many rows, tokens or blocks, or too much padding.
            ValueError: negative or inconsistent lengths, or a needed block id that is no block. Or
                a keyword is no integer, or disagrees with the arrays. Names row and value.
            BackendUnavailable: a tensor on a device for a builder of "cpu" or "numpy".
            LaunchError: a tensor that is not on the builder's device.
            RuntimeError: host arrays during a graph capture.

        Cost: a fixed number of NumPy calls, and no allocation that grows with the capacity. Device
        tensors cost one launch, without a copy, an allocation or a wait. Host arrays on a device
        cost a copy to it, which runs during the step before, and a copy within it.

        Source: PaddlePaddle/FastDeploy #7367 and #7598.
        """
        arrays = (seq_lens_encoder, seq_lens_decoder, seq_lens_this_time, block_tables)
        hints = StepHints(num_tokens, num_prefill_tokens, max_seqlen_k, num_padded_tokens)
        return self.build_from(arrays, hints)

    def build_from(self, arrays: tuple[StepArray, ...], hints: StepHints) -> ForwardMeta:
        """Build a step from the four arrays of `build`, with its keywords in one record."""
        hints.check_types()
        inputs, counts = self._provider.write(arrays, hints)
        self.num_builds += 1
        num_tokens, num_prefill_tokens, max_seqlen_k, padded = counts
        chunks, computed, scheduled, tables = inputs
        has_prefill = num_prefill_tokens > 0
        cu_q, cu_kg = self._cut(True, int(tables.shape[0]), has_prefill)
        batch_ids, positions, int32_positions, slots, windows = self._cut(
            False, padded, has_prefill
        )
        # by position: names would double the time of this call, which each step waits for
        return ForwardMeta(
            *(chunks, computed, scheduled, cu_q, tables, batch_ids, positions, int32_positions),
            *(slots, windows, cu_kg),
            *(num_prefill_tokens, num_tokens - num_prefill_tokens, max_seqlen_k),
        )


class HostProvider:
    """Steps in host memory: inputs are checked in full, copied, and computed with NumPy.

    Rows and tokens past the last step hold padding: lengths 0, batch id and slot and block -1,
    position 0, window (0, 0). `cu_seqlens_*` repeat their last value there. So a step clears only
    the range that the previous step used and this one does not. The two prefill arrays keep the
    values of the last step with a prefill row.

    Args:
        limits: sizes that every step keeps to.
        buffers: zeros at full capacity, one array for each field.
        view: makes an array of a step on a slice of an input.
    """

    def __init__(
        self, limits: StepLimits, buffers: dict[str, StepArray | None], view: View
    ) -> None:
        rows, tokens = limits.max_num_seqs, limits.max_num_tokens
        shapes = ((rows,),) * 3 + ((rows, limits.max_blocks_per_seq),)
        chunks, computed, scheduled, tables = (
            np.full(shape, fill, np.int32) for shape, fill in zip(shapes, _PADDING, strict=True)
        )
        self._inputs: HostInputs = chunks, computed, scheduled, tables
        self._buffers = SimpleNamespace(**buffers)
        self._buffers.batch_id_per_token.fill(-1)
        self._buffers.slot_mapping.fill(-1)
        self._input_views = lru_cache(maxsize=CACHED_VIEWS)(partial(_rows, self._inputs, view))
        self._limits, self._block_size = limits, limits.block_size
        self._row_ids = np.arange(rows, dtype=np.int32)
        self._token_ids = np.arange(tokens, dtype=np.int64)
        self._used_rows = self._used_tokens = self._used_windows = 0

    def write(
        self, arrays: tuple[StepArray, ...], hints: StepHints
    ) -> tuple[list[StepArray], Counts]:
        """Compute the step of four NumPy arrays or CPU tensors, as `StepMetadataBuilder.build`.

        Cost: a fixed number of NumPy calls, none of them per row or per token. The two prefill
        arrays are written only if the step has a prefill token.
        """
        inputs, counts = check_host_step(arrays, self._limits, hints)
        num_tokens, num_prefill_tokens, _, _ = counts
        self._write_rows(inputs)
        self._write_tokens(num_tokens)
        if num_prefill_tokens:
            self._write_windows(gathered_keys(inputs), num_tokens)
        return self._input_views(self._used_rows), counts

    def _write_rows(self, inputs: HostInputs) -> None:
        """Copy the inputs, and sum the tokens of the rows before each."""
        *_, scheduled, _ = inputs
        num_rows = len(scheduled)
        unused = slice(num_rows, self._used_rows)
        for buffer, array, padding in zip(self._inputs, inputs, _PADDING, strict=True):
            buffer[:num_rows] = array
            buffer[unused] = padding
        _prefix_sum(scheduled, self._buffers.cu_seqlens_q)
        self._used_rows = num_rows

    def _write_tokens(self, num_tokens: int) -> None:
        """Write row, position and slot of each token."""
        out, num_rows = self._buffers, self._used_rows
        _, computed, scheduled, tables = self._inputs
        rows: Int32Array = self._row_ids[:num_rows].repeat(scheduled[:num_rows])
        positions: Int64Array = out.position_ids[:num_tokens]
        out.batch_id_per_token[:num_tokens] = rows
        # position d_b + j of token t = cu_seqlens_q[b] + j
        first = computed[:num_rows] - out.cu_seqlens_q[:num_rows]
        np.add(first[rows], self._token_ids[:num_tokens], out=positions)
        columns = positions // self._block_size
        # block * bs + p % bs = (block - p // bs) * bs + p
        slots = tables[rows, columns] - columns
        slots *= self._block_size
        np.add(slots, positions, out=out.slot_mapping[:num_tokens])
        unused = slice(num_tokens, self._used_tokens)
        out.batch_id_per_token[unused] = -1
        out.position_ids[unused] = 0
        out.slot_mapping[unused] = -1
        if out.position_ids_int32 is not None:
            cleared = max(num_tokens, self._used_tokens)
            out.position_ids_int32[:cleared] = out.position_ids[:cleared]
        self._used_tokens = num_tokens

    def _write_windows(self, num_keys: Int64Array, num_tokens: int) -> None:
        """Write the start of each row's gathered keys, and `[ks, ke)` of each token."""
        out, num_rows = self._buffers, len(num_keys)
        _prefix_sum(num_keys, out.cu_seqlens_kg)
        rows = out.batch_id_per_token[:num_tokens]
        is_prefill = self._inputs[0][:num_rows] > 0
        windows = out.indexer_attn_mask_offsets.reshape(-1, 2)
        starts = (out.cu_seqlens_kg[:num_rows] * is_prefill)[rows]
        windows[:num_tokens, 0] = starts
        windows[:num_tokens, 1] = is_prefill[rows] * (starts + out.position_ids[:num_tokens] + 1)
        windows[num_tokens : self._used_windows] = 0
        self._used_windows = num_tokens


def _rows(inputs: HostInputs, view: View, num_rows: int) -> list[StepArray]:
    """Cut the buffers of the inputs to the rows of a step."""
    return [view(buffer[:num_rows]) for buffer in inputs]


def _prefix_sum(lengths: Int32Array | Int64Array, out: Int32Array) -> None:
    """Write exclusive prefix sums into `out`, whose rest repeats the total."""
    num_rows = len(lengths)
    np.cumsum(lengths, dtype=np.int32, out=out[1 : num_rows + 1])
    out[num_rows + 1 :] = out[num_rows]


def _new_buffers(
    limits: StepLimits,
    allocate: Callable[[tuple[int, ...], str], StepArray],
    int32_position_ids: bool,
) -> dict[str, StepArray | None]:
    """Allocate the buffers of all fields at full capacity, with None for unused int32 positions."""
    buffers: dict[str, StepArray | None] = {"position_ids_int32": None}
    for name, field in FIELDS.items():
        size = limits.max_num_seqs if field.is_by_row else limits.max_num_tokens
        if name not in buffers or int32_position_ids:
            buffers[name] = allocate((field.width * size + field.extra,), field.dtype)
    return buffers


def _cut(
    buffers: dict[str, StepArray | None], view: View, is_by_row: bool, size: int, has_prefill: bool
) -> list[StepArray | None]:
    """Cut the fields of rows or of tokens to the size of a step, with None for absent fields."""
    views: list[StepArray | None] = []
    for name, field in FIELDS.items():
        if field.is_by_row == is_by_row:
            buffer, end = buffers[name], field.width * size + field.extra
            if buffer is None or (field.is_window and not has_prefill):
                views.append(None)
            else:
                views.append(view(buffer[:end]))
    return views


def _same(buffer: StepArray) -> StepArray:
    """Return a slice of a buffer as it is."""
    return buffer


def _paddle_view() -> View:
    """Return the function that makes a Paddle tensor on the memory of a NumPy buffer."""
    try:
        import paddle  # noqa: F401
    except ImportError as error:
        raise BackendUnavailable(
            "device: 'cpu' needs Paddle, which is not installed; install fd_dsa[cpu], or build "
            "with device='numpy'"
        ) from error
    return as_tensor
