"""Host provider: the metadata of a step by vectorised NumPy, in buffers that never move."""

from __future__ import annotations

from functools import lru_cache, partial
from types import SimpleNamespace

import numpy as np

from fd_dsa.device.allocation import CACHED_VIEWS
from fd_dsa.device.host_tensor import Int32Array, Int64Array
from fd_dsa.step.checks import (
    HostInputs,
    StepHints,
    StepLimits,
    check_host_step,
    gathered_keys,
)
from fd_dsa.step.forward_meta import ForwardMeta
from fd_dsa.step.views import StepViews, View, new_buffers
from fd_dsa.tensor import Array, StepArray

# padding of the four inputs, in their order
_PADDING = (0, 0, 0, -1)


class HostProvider:
    """Steps in host memory: inputs are checked in full, copied, and computed with NumPy.

    Rows and tokens past the last step hold padding: lengths 0, batch id and slot and block -1,
    position 0, window (0, 0). `cu_seqlens_*` repeat their last value there. A step therefore
    clears only the range that the step before it used and it does not. The two prefill arrays
    keep the values of the last step with a prefill row.

    Args:
        limits, int32_position_ids: as in `new_buffers`.
        view: as in `StepViews`.
    """

    def __init__(self, limits: StepLimits, view: View, int32_position_ids: bool = False) -> None:
        rows, tokens = limits.max_num_seqs, limits.max_num_tokens
        shapes = ((rows,),) * 3 + ((rows, limits.max_blocks_per_seq),)
        encoder, decoder, this_time, tables = (
            np.full(shape, fill, np.int32) for shape, fill in zip(shapes, _PADDING, strict=True)
        )
        self._inputs: HostInputs = encoder, decoder, this_time, tables
        buffers = new_buffers(limits, np.zeros, int32_position_ids)
        self._buffers = SimpleNamespace(**buffers)
        self._buffers.batch_id_per_token.fill(-1)
        self._buffers.slot_mapping.fill(-1)
        self._views = StepViews(buffers, view)
        self._input_views = lru_cache(maxsize=CACHED_VIEWS)(partial(_rows, self._inputs, view))
        self._limits, self._block_size = limits, limits.block_size
        self._row_ids = np.arange(rows, dtype=np.int32)
        self._token_ids = np.arange(tokens, dtype=np.int64)
        self._used_rows = self._used_tokens = self._used_windows = 0

    def build(self, arrays: tuple[Array, ...], hints: StepHints) -> ForwardMeta:
        """Compute the step of four NumPy arrays or CPU tensors, as `StepMetadataBuilder.build`.

        Cost: a fixed number of NumPy calls, none of them per row or per token; the two prefill
        arrays are written only if the step has a prefill token.
        """
        inputs, counts = check_host_step(arrays, self._limits, hints)
        num_tokens, num_prefill_tokens, _, _ = counts
        self._write_rows(inputs)
        self._write_tokens(num_tokens)
        if num_prefill_tokens:
            self._write_windows(gathered_keys(inputs), num_tokens)
        return self._views.forward_meta(self._input_views(self._used_rows), counts)

    def _write_rows(self, inputs: HostInputs) -> None:
        """Copy the inputs, and sum the tokens of the rows before each."""
        *_, this_time, _ = inputs
        num_rows = len(this_time)
        unused = slice(num_rows, self._used_rows)
        for buffer, array, padding in zip(self._inputs, inputs, _PADDING, strict=True):
            buffer[:num_rows] = array
            buffer[unused] = padding
        _prefix_sum(this_time, self._buffers.cu_seqlens_q)
        self._used_rows = num_rows

    def _write_tokens(self, num_tokens: int) -> None:
        """Write row, position and slot of each token."""
        out, num_rows = self._buffers, self._used_rows
        _, decoder, this_time, tables = self._inputs
        new = this_time[:num_rows]
        rows: Int32Array = self._row_ids[:num_rows].repeat(new)
        positions: Int64Array = out.position_ids[:num_tokens]
        out.batch_id_per_token[:num_tokens] = rows
        # position d_b + j of token t = cu_seqlens_q[b] + j
        first = decoder[:num_rows] - out.cu_seqlens_q[:num_rows]
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
