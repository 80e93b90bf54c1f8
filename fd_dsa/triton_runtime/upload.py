"""Copies of files to device memory through page-locked memory, which is half full at most times."""

from __future__ import annotations

from typing import Any

import numpy as np

from fd_dsa.triton_runtime.transfers import transfers_for

BUFFER_BYTES = 64 << 20


class Upload:
    """Queues copies to one device; the host fills one buffer while the other one is copied."""

    def __init__(self, like: Any) -> None:
        self._transfers = transfers_for(like)
        self._buffers = [
            (self._transfers.host_buffer(BUFFER_BYTES), self._transfers.event()) for _ in range(2)
        ]

    def copy(self, target: Any, start: int, values: np.ndarray) -> None:
        """Queue a copy into a contiguous tensor.

        Args:
            start: value of it, counted in memory order, that the first one is copied to.
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
        self._transfers.finish()
