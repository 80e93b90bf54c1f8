"""Transfer of the inputs of a step to a device, and of its logits back.

The module needs Triton's launcher, so it is imported only for a device.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fd_dsa.device.allocation import Allocate
from fd_dsa.device.staging import StagedInputs
from fd_dsa.device.transfers import Transfers
from fd_dsa.runner.input_batch import InputBatch, SamplingInputs
from fd_dsa.tensor import StepArray as Array


class DeviceInputs(StagedInputs):
    """Fields of a Step on a device: sections of one tensor, which one copy fills.

    Args:
        batch: input batch of the runner.
        allocate: makes a contiguous tensor of a shape and dtype on the device.
        most_drafts: maximum number of drafts of a row. A token is sampled for each draft, and one
            for the row.
        reads_next: True if a layer for multi-token prediction reads the next tokens.
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
        self._most_rows, self._most_samples = rows, (1 + most_drafts) * rows
        self._has_drafts, self._reads_next = most_drafts > 0, reads_next
        samples, most_next = self._most_samples, reads_next * batch.max_num_tokens
        sizes = (batch.max_num_tokens, rows, rows, rows, samples, rows)
        sampling = samples, samples, rows + 1, samples, most_next
        super().__init__(allocate, (*sizes, *sampling), rows, columns)

    def stage(self, inputs: Sequence[np.ndarray], sampling: SamplingInputs) -> None:
        """Enqueue the copy of `InputBatch.arrays` and of sampling inputs.

        The arrays may change afterwards.
        """
        (*values, tables), samples = inputs, self._most_samples
        padded = SamplingInputs(
            _padded(sampling.slots, samples),
            sampling.positions,
            _padded(sampling.logits_indptr, self._most_rows + 1) if self._has_drafts else (),
            _padded(sampling.mask_rows, samples),
            sampling.next_ids,
        )
        self.queue((*values, *padded), tables)

    def views(
        self, num_tokens: int, num_rows: int, num_sampled: int
    ) -> tuple[list[Array], SamplingInputs]:
        """Return the tensors of the fields of a Step and its `sampling`. They never move."""
        # kernels take no empty tensor
        samples, following = max(num_sampled, 1), self._reads_next * num_tokens
        sizes = (num_tokens, *[num_rows] * 3, num_sampled, num_rows)
        sampling = samples, samples, self._most_rows + 1, samples, following
        *values, tables = self.views_of((*sizes, *sampling, num_rows))
        return [*values[:6], tables], SamplingInputs(*values[6:])


def _padded(values: Sequence[int], size: int) -> np.ndarray:
    """Return int32 [size] with the values, padded by -1."""
    padded = np.full(size, -1, np.int32)
    padded[: len(values)] = values
    return padded


class HostLogits:
    """Copy of the logits of a step to page-locked memory, with one wait.

    Args:
        transfers: copies of the device.
        num_values: initial number of float32 values; a larger step grows the memory.
    """

    def __init__(self, transfers: Transfers, num_values: int) -> None:
        self._transfers, self._copied = transfers, transfers.event()
        self._buffer = transfers.host_buffer(4 * num_values).view(np.float32)

    def __call__(self, logits: Array) -> np.ndarray:
        """Copy a float32 tensor, and wait for the copy.

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
