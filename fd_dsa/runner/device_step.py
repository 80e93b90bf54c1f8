"""Transfer of a step's values to a device, and of its logits back.

The module needs Triton's launcher, so it is loaded only when a device is asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from fd_dsa.device.allocation import Allocate
from fd_dsa.device.staging import StagedInputs
from fd_dsa.device.transfers import Transfers
from fd_dsa.runner.input_batch import Draw, InputBatch
from fd_dsa.runner.step import DrawInputs


class DeviceInputs(StagedInputs):
    """Fields of a Step on a device: sections of one tensor, which never move, filled by one copy.

    Args:
        batch: rows that the engine fills.
        allocate: makes a contiguous tensor of a shape and dtype on the device.
        most_drafts: of a row; a token is sampled for each, and for the row.
        reads_next: whether a layer for multi-token prediction reads the tokens after those.
    """

    def __init__(
        self,
        batch: InputBatch,
        allocate: Allocate,
        most_drafts: int = 0,
        *,
        reads_next: bool = False,
    ) -> None:
        rows, columns = batch.block_tables.shape
        self._most_rows, self._most_draws = rows, (1 + most_drafts) * rows
        self._has_drafts, self._reads_next = most_drafts > 0, reads_next
        draws, most_next = self._most_draws, reads_next * batch.max_num_tokens
        sizes = (batch.max_num_tokens, rows, rows, rows, draws, rows)
        super().__init__(allocate, (*sizes, *[draws] * 3, rows + 1, most_next), rows, columns)

    def stage(
        self, inputs: Sequence[Any], draw: Draw, next_ids: Sequence[int] | np.ndarray = ()
    ) -> None:
        """Queue the copy of `host_inputs`, a draw and `next_tokens`; all may then change."""
        (*values, tables), masks = inputs, _padded((), self._most_draws)
        if draw.masked:
            masks[draw.masked] = range(len(draw.masked))
        firsts = _padded(draw.firsts, self._most_rows + 1) if self._has_drafts else ()
        rows = _padded(draw.slots, self._most_draws), draw.positions, masks
        self.queue((*values, *rows, firsts, next_ids), tables)

    def views(
        self, num_tokens: int, num_rows: int, num_sampled: int
    ) -> tuple[list[Any], DrawInputs]:
        """The tensors of the fields of a Step, which never move, and those of its draw."""
        # kernels take no empty tensor
        draws, following = max(num_sampled, 1), self._reads_next * num_tokens
        sizes = (num_tokens, *[num_rows] * 3, num_sampled, num_rows)
        requests = self._most_rows + 1
        *values, tables = self.views_of((*sizes, *[draws] * 3, requests, following, num_rows))
        return [*values[:6], tables], DrawInputs(*values[6:])


def _padded(values: Sequence[int], size: int) -> np.ndarray:
    """int32 [size]; the values, then -1."""
    padded = np.full(size, -1, np.int32)
    padded[: len(values)] = values
    return padded


class HostLogits:
    """Page-locked memory for the logits of a step: one copy, one wait.

    Args:
        transfers: of the device.
        num_values: float32 values at first; a larger step makes it grow.
    """

    def __init__(self, transfers: Transfers, num_values: int) -> None:
        self._transfers, self._copied = transfers, transfers.event()
        self._buffer = transfers.host_buffer(4 * num_values).view(np.float32)

    def __call__(self, logits: Any) -> np.ndarray:
        """The values of a float32 tensor, which the calling thread waits for.

        Returns:
            float32 of the tensor's shape, valid until the next call.
        """
        size = int(np.prod(logits.shape))
        if size > len(self._buffer):
            self._buffer = self._transfers.host_buffer(4 * size).view(np.float32)
        values = self._buffer[:size]
        self._transfers.to_host(values, logits)
        self._copied.record()
        self._copied.wait()
        return values.reshape(logits.shape)
