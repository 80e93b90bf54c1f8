"""What a step needs beside the model: ids, lengths and tables of its rows, where the model runs."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from fd_dsa.runner.input_batch import InputBatch
from fd_dsa.step.host_tensor import as_tensor

# int32 values to which the sections of the packed inputs are rounded up: 256 bytes
_SECTION = 64
# a server sees few row counts and, when decoding, few token counts
_CACHED_VIEWS = 256


class StepInputs(NamedTuple):
    """Inputs of one step.

    Attributes:
        ids_remove_padding: int64, on a device int32, [num_tokens]; packed token ids, on a device
            followed by zeros up to the padded number of tokens.
        seq_lens_encoder, seq_lens_decoder, seq_lens_this_time: int32 [num_rows].
        block_tables: int32 [num_rows, max_blocks_per_seq].
        logits_indices: int64, on a device int32, [n]; flat tokens whose logits are wanted.
    """

    ids_remove_padding: Any
    seq_lens_encoder: Any
    seq_lens_decoder: Any
    seq_lens_this_time: Any
    block_tables: Any
    logits_indices: Any


class HostInputs:
    """The inputs of a batch where they are, for a model on the CPU."""

    def __init__(self, batch: InputBatch) -> None:
        self._batch = batch

    def stage(self, logits_indices: np.ndarray, num_padded_tokens: int | None = None) -> StepInputs:
        """Views of the batch, valid until its next `begin_step`; nothing is padded on a CPU."""
        batch, rows = self._batch, self._batch.num_rows
        return StepInputs(
            as_tensor(batch.ids_remove_padding[: batch.num_tokens]),
            batch.seq_lens_encoder[:rows],
            batch.seq_lens_decoder[:rows],
            batch.seq_lens_this_time[:rows],
            batch.block_tables[:rows],
            np.asarray(logits_indices, np.int64),
        )


class DeviceInputs:
    """The inputs of a batch on a device: sections of one tensor, which one copy a step fills.

    The copy runs from page-locked memory on a stream of its own, beside the work of the step
    before; see `fd_dsa.runner.staging`. Nobody waits for it, and the tensor never moves.

    Args:
        batch: rows that the engine fills.
        allocate: makes a contiguous tensor of a shape and dtype on the device.
    """

    def __init__(self, batch: InputBatch, allocate: Callable[[tuple[int, ...], str], Any]) -> None:
        from fd_dsa.runner.staging import StagedTensor

        self._batch = batch
        rows, columns = batch.block_tables.shape
        sizes = (batch.max_num_tokens, rows, rows, rows, rows)
        # tables come last: a copy ends with those of the rows that the step has
        ends = np.cumsum([-(-size // _SECTION) * _SECTION for size in sizes]).tolist()
        self._starts = [0, *ends]
        self._staged = StagedTensor(allocate, ends[-1] + rows * columns)
        self._section = lru_cache(maxsize=_CACHED_VIEWS)(self._make_section)

    def stage(self, logits_indices: np.ndarray, num_padded_tokens: int | None = None) -> StepInputs:
        """Queue the copy of the batch; the tensors that will hold it, valid until the next call.

        Args:
            logits_indices: int [n]; at most one a row of the batch.
            num_padded_tokens: tokens of a captured step; the batch may have fewer.
        """
        batch, rows = self._batch, self._batch.num_rows
        values = (
            batch.ids_remove_padding[: batch.num_tokens],
            batch.seq_lens_encoder[:rows],
            batch.seq_lens_decoder[:rows],
            batch.seq_lens_this_time[:rows],
            logits_indices,
            batch.block_tables[:rows].ravel(),
        )
        slab = self._staged.next_slab()
        for start, array in zip(self._starts, values, strict=True):
            slab[start : start + len(array)] = array
        num_tokens = max(batch.num_tokens, num_padded_tokens or 0)
        slab[batch.num_tokens : num_tokens] = 0
        self._staged.upload(self._starts[-1] + len(values[-1]))
        lengths = num_tokens, *map(len, values[1:])
        ids, encoder, decoder, this_time, wanted, tables = map(
            self._section, range(len(lengths)), lengths
        )
        return StepInputs(ids, encoder, decoder, this_time, tables, wanted)

    def _make_section(self, index: int, length: int) -> Any:
        """The first values of a section; the tables as a matrix."""
        start = self._starts[index]
        section = self._staged.tensor[start : start + length]
        if index + 1 < len(self._starts):
            return section
        return section.reshape([-1, self._batch.block_tables.shape[1]])
