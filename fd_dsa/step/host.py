"""The host provider: a step's metadata in vectorised NumPy over buffers that never move."""

from __future__ import annotations

import numpy as np

from fd_dsa.step.checks import (
    HostStep,
    Int32Array,
    Int64Array,
    StepHints,
    StepLimits,
    check_host_step,
)
from fd_dsa.step.forward_meta import Array, ForwardMeta
from fd_dsa.step.views import OutputBuffers, StepViews, View


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

    def build(self, arrays: tuple[Array, ...], hints: StepHints) -> ForwardMeta:
        """The step of four NumPy arrays or CPU tensors; see `StepMetadataBuilder.build`."""
        step = check_host_step(arrays, self._limits, hints)
        self._buffers.write(step)
        inputs = self._views.inputs(len(step.inputs.seq_lens_this_time))
        return self._views.forward_meta(inputs, step.counts)


class HostBuffers(OutputBuffers):
    """All arrays of a step at full capacity, and the code that fills them.

    Everything past what the last step wrote holds the values of padding: lengths 0, batch id and
    slot and block -1, position 0, window (0, 0); `cu_seqlens_*` repeat their last value there. A
    step therefore clears only what the step before it used and it does not. The two prefill
    arrays keep whatever the last step with a prefill row left in them.
    """

    def __init__(self, limits: StepLimits, int32_position_ids: bool = False) -> None:
        super().__init__(limits, np.zeros, int32_position_ids)
        rows, tokens = limits.max_num_seqs, limits.max_num_tokens
        self.seq_lens_encoder = np.zeros(rows, np.int32)
        self.seq_lens_decoder = np.zeros(rows, np.int32)
        self.seq_lens_this_time = np.zeros(rows, np.int32)
        self.block_tables = np.full((rows, limits.max_blocks_per_seq), -1, np.int32)
        self.batch_id_per_token.fill(-1)
        self.slot_mapping.fill(-1)

        self._block_size = limits.block_size
        self._row_ids = np.arange(rows, dtype=np.int32)
        self._token_ids = np.arange(tokens, dtype=np.int64)
        self._used_rows = self._used_tokens = self._used_windows = 0

    def write(self, step: HostStep) -> None:
        """Fill the buffers with a step.

        Cost: a fixed number of NumPy calls, none of them per row or per token; the two prefill
        arrays are written only if the step has a prefill token.
        """
        self._write_rows(step)
        self._write_tokens(step.counts.num_tokens)
        if step.gathered_keys is not None:
            self._write_windows(step.gathered_keys, step.counts.num_tokens)

    def _write_rows(self, step: HostStep) -> None:
        """Copy the inputs; prefix sums and decode lengths of the rows."""
        inputs, num_rows = step.inputs, len(step.seq_lens_k)
        self.seq_lens_encoder[:num_rows] = inputs.seq_lens_encoder
        self.seq_lens_decoder[:num_rows] = inputs.seq_lens_decoder
        self.seq_lens_this_time[:num_rows] = inputs.seq_lens_this_time
        self.block_tables[:num_rows] = inputs.block_tables
        _prefix_sum(self.seq_lens_this_time[:num_rows], self.cu_seqlens_q)
        self.cache_seqlens[:num_rows] = step.seq_lens_k
        if step.counts.num_prefill_tokens:
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
