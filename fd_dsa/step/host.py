"""The host provider: a step's metadata in vectorised NumPy over buffers that never move."""

from __future__ import annotations

from typing import Any

import numpy as np

from fd_dsa.step import checks
from fd_dsa.step.checks import Int32Array, Int64Array, StepInputs, StepLimits, StepTotals
from fd_dsa.step.counts import GivenCounts, check_host_counts
from fd_dsa.step.forward_meta import Array, ForwardMeta
from fd_dsa.step.views import StepViews, View, input_views


class HostProvider:
    """Steps in host memory: inputs checked in full, copied, and worked on with NumPy.

    Args:
        limits: sizes that every step keeps to.
        view: how a NumPy buffer becomes an array of the step, sharing its memory.
        int32_position_ids: whether positions are written as int32 too.
    """

    def __init__(self, limits: StepLimits, view: View, int32_position_ids: bool = False) -> None:
        self._limits = limits
        self._buffers = HostBuffers(limits, int32_position_ids)
        self._views = StepViews(self._buffers, view)
        self._inputs = input_views(self._buffers, view)

    def build(self, arrays: tuple[Array, ...], given: GivenCounts) -> ForwardMeta:
        """The step of four NumPy arrays or CPU tensors; see `StepMetadataBuilder.build`."""
        inputs = host_inputs(arrays)
        checks.check_layout(inputs, self._limits)
        totals = checks.check_values(inputs, self._limits)
        counts = check_host_counts(totals, self._limits, given)
        self._buffers.write(inputs, totals)
        return self._views.forward_meta(self._inputs(len(inputs.seq_lens_this_time)), counts)


def host_inputs(arrays: tuple[Any, ...]) -> StepInputs:
    """The four inputs as NumPy arrays over the same memory.

    Raises:
        BackendUnavailable: a tensor on a device.
        DtypeError: neither array nor tensor.
    """
    return StepInputs(*map(checks.host_array, StepInputs._fields, arrays))


class HostBuffers:
    """All arrays of a step at full capacity, and the code that fills them.

    Everything past what the last step wrote holds the values of padding: lengths 0, batch id and
    slot and block -1, position 0, window (0, 0); `cu_seqlens_*` repeat their last value there. A
    step therefore clears only what the step before it used and it does not. The two prefill
    arrays keep whatever the last step with a prefill row left in them.

    The four inputs are sections of one int32 buffer, so that one copy would move them all.
    """

    def __init__(self, limits: StepLimits, int32_position_ids: bool = False) -> None:
        rows, tokens = limits.max_num_seqs, limits.max_num_tokens
        columns = limits.max_blocks_per_seq
        self.packed_inputs = np.zeros(rows * (3 + columns), np.int32)
        lengths = self.packed_inputs[: 3 * rows].reshape(3, rows)
        self.seq_lens_encoder, self.seq_lens_decoder, self.seq_lens_this_time = lengths
        self.block_tables = self.packed_inputs[3 * rows :].reshape(rows, columns)
        self.block_tables.fill(-1)

        self.cu_seqlens_q = np.zeros(rows + 1, np.int32)
        self.cache_seqlens = np.zeros(rows, np.int32)
        self.batch_id_per_token = np.full(tokens, -1, np.int32)
        self.position_ids = np.zeros(tokens, np.int64)
        self.position_ids_int32 = np.zeros(tokens, np.int32) if int32_position_ids else None
        self.slot_mapping = np.full(tokens, -1, np.int64)
        self.cu_seqlens_kg = np.zeros(rows + 1, np.int32)
        self.indexer_attn_mask_offsets = np.zeros(2 * tokens, np.int32)

        self._block_size = limits.block_size
        self._row_ids = np.arange(rows, dtype=np.int32)
        self._token_ids = np.arange(tokens, dtype=np.int64)
        self._used_rows = self._used_tokens = self._used_windows = 0

    def write(self, inputs: StepInputs, totals: StepTotals) -> None:
        """Fill the buffers with a step that has passed all checks.

        Cost: a fixed number of NumPy calls, none of them per row or per token; the two prefill
        arrays are written only if the step has a prefill token.
        """
        self._write_rows(inputs, totals)
        self._write_tokens(totals.num_tokens)
        if totals.gathered_keys is not None:
            self._write_windows(totals.gathered_keys, totals.num_tokens)

    def _write_rows(self, inputs: StepInputs, totals: StepTotals) -> None:
        """Copy the inputs; prefix sums and decode lengths of the rows."""
        num_rows = len(inputs.seq_lens_this_time)
        self.seq_lens_encoder[:num_rows] = inputs.seq_lens_encoder
        self.seq_lens_decoder[:num_rows] = inputs.seq_lens_decoder
        self.seq_lens_this_time[:num_rows] = inputs.seq_lens_this_time
        self.block_tables[:num_rows] = inputs.block_tables
        _prefix_sum(self.seq_lens_this_time[:num_rows], self.cu_seqlens_q)
        self.cache_seqlens[:num_rows] = totals.seq_lens_k
        if totals.num_prefill_tokens:
            self.cache_seqlens[:num_rows] *= self.seq_lens_encoder[:num_rows] == 0
        if num_rows < self._used_rows:
            unused = slice(num_rows, self._used_rows)
            self.seq_lens_encoder[unused] = 0
            self.seq_lens_decoder[unused] = 0
            self.seq_lens_this_time[unused] = 0
            self.cache_seqlens[unused] = 0
            self.block_tables[unused] = -1
        self._used_rows = num_rows

    def _write_tokens(self, num_tokens: int) -> None:
        """Row, position and slot of each token."""
        num_rows, block_size = self._used_rows, self._block_size
        rows: Int32Array = self._row_ids[:num_rows].repeat(self.seq_lens_this_time[:num_rows])
        positions: Int64Array = self.position_ids[:num_tokens]
        self.batch_id_per_token[:num_tokens] = rows
        # position d_b + j of token t = cu_seqlens_q[b] + j
        first = self.seq_lens_decoder[:num_rows] - self.cu_seqlens_q[:num_rows]
        np.add(first[rows], self._token_ids[:num_tokens], out=positions)
        columns = positions // block_size
        # block * bs + p % bs = (block - p // bs) * bs + p
        slots = self.block_tables[rows, columns] - columns
        slots *= block_size
        np.add(slots, positions, out=self.slot_mapping[:num_tokens])
        if num_tokens < self._used_tokens:
            unused = slice(num_tokens, self._used_tokens)
            self.batch_id_per_token[unused] = -1
            self.position_ids[unused] = 0
            self.slot_mapping[unused] = -1
        if self.position_ids_int32 is not None:
            cleared = max(num_tokens, self._used_tokens)
            self.position_ids_int32[:cleared] = self.position_ids[:cleared]
        self._used_tokens = num_tokens

    def _write_windows(self, gathered_keys: Int64Array, num_tokens: int) -> None:
        """Where each row's gathered keys start, and `[ks, ke)` of each token."""
        num_rows = len(gathered_keys)
        _prefix_sum(gathered_keys, self.cu_seqlens_kg)
        rows = self.batch_id_per_token[:num_tokens]
        is_prefill = self.seq_lens_encoder[:num_rows] > 0
        row_start = self.cu_seqlens_kg[:num_rows] * is_prefill
        windows = self.indexer_attn_mask_offsets.reshape(-1, 2)
        starts = row_start[rows]
        windows[:num_tokens, 0] = starts
        windows[:num_tokens, 1] = is_prefill[rows] * (starts + self.position_ids[:num_tokens] + 1)
        windows[num_tokens : self._used_windows] = 0
        self._used_windows = num_tokens


def _prefix_sum(lengths: Int32Array | Int64Array, out: Int32Array) -> None:
    """Exclusive prefix sums into `out`, whose rest repeats the total."""
    num_rows = len(lengths)
    np.cumsum(lengths, dtype=np.int32, out=out[1 : num_rows + 1])
    out[num_rows + 1 :] = out[num_rows]
