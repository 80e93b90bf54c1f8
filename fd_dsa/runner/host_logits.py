"""The logits of a step on their way to the host: one copy to page-locked memory, one wait."""

from __future__ import annotations

from typing import Any

import numpy as np

from fd_dsa.triton_runtime.transfers import Event, Transfers, transfers_for


class HostLogits:
    """Page-locked memory for the logits of a step, the same in every step.

    Args:
        num_values: float32 values at first; a larger step makes it grow.
    """

    def __init__(self, num_values: int) -> None:
        self._num_values = num_values
        self._buffer = np.empty(0, np.float32)
        self._transfers: Transfers | None = None
        self._copied: Event | None = None

    def __call__(self, logits: Any) -> np.ndarray:
        """The values of a float32 tensor, which the calling thread waits for.

        Returns:
            float32 of the tensor's shape, valid until the next call.
        """
        if self._transfers is None or self._copied is None:
            self._transfers = transfers_for(logits)
            self._copied = self._transfers.event()
        size = int(np.prod(logits.shape))
        if size > len(self._buffer):
            self._num_values = max(self._num_values, size)
            self._buffer = self._transfers.host_buffer(4 * self._num_values).view(np.float32)
        values = self._buffer[:size]
        self._transfers.to_host(values, logits)
        self._copied.record()
        self._copied.wait()
        return values.reshape(logits.shape)
