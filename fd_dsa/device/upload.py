"""Copies of files to device memory through two page-locked buffers."""

from __future__ import annotations

import numpy as np

from fd_dsa.device.transfers import transfers_for
from fd_dsa.tensor import Tensor

BUFFER_BYTES = 64 << 20


class Upload:
    """Copies to one device: the host fills one buffer while the device reads the other."""

    def __init__(self, like: Tensor) -> None:
        self._transfers = transfers_for(like)
        self._buffers = [
            (self._transfers.host_buffer(BUFFER_BYTES), self._transfers.event()) for _ in range(2)
        ]

    def copy(self, target: Tensor, start: int, values: np.ndarray) -> None:
        """Enqueue a copy into a contiguous tensor.

        Args:
            start: index of the first value of `target` to overwrite, in memory order.
            values: contiguous, of the target's width or its bytes; may change after the call.
        """
        source = values.reshape(-1).view(np.uint8)
        address = target.data_ptr() + start * target.element_size()
        for first in range(0, len(source), BUFFER_BYTES):
            part = source[first : first + BUFFER_BYTES]
            buffer, copied = self._buffers[0]
            self._buffers.reverse()
            copied.wait()
            np.copyto(buffer[: len(part)], part)
            copy = self._transfers.copy("h2d", address + first, buffer.ctypes.data)
            copy.queue(len(part))
            copied.record()

    def finish(self) -> None:
        """Block the calling thread until all copies are done."""
        self._transfers.finish()
