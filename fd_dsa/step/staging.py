"""Host slabs that take turns: a step is written while the copy of an earlier one is in flight."""

from __future__ import annotations

from typing import Any

import numpy as np

from fd_dsa.step.checks import Int32Array
from fd_dsa.triton_runtime.transfers import Transfers, transfers_for

NUM_SLABS = 3


class StagingRing:
    """Moves int32 values from the host to a tensor on a device, one asynchronous copy a step.

    A copy reads its slab some time after `upload` returns, so a slab that was uploaded is written
    again only when an event behind its copy is done. That is so without waiting in an engine that
    waits for the sampled ids of a step before it prepares the next but one; a caller that runs
    `num_slabs` steps ahead of the device is held back here instead of spoiling a step.

    The tensor itself is overwritten in stream order: behind all work on the current stream, which
    every reader of the last step must have joined.

    Args:
        target: int32 [n], contiguous, on the device.
        num_slabs: slabs that take turns.
        transfers: how copies are made; None = on the current stream of the tensor's library.

    Attributes:
        num_waits: how often `next_slab` found its copy unfinished and blocked.
    """

    def __init__(
        self, target: Any, num_slabs: int = NUM_SLABS, transfers: Transfers | None = None
    ) -> None:
        self._target = target
        self._transfers = transfers or transfers_for(target)
        num_bytes = 4 * int(target.shape[0])
        self.slabs: list[Int32Array] = [
            self._transfers.host_buffer(num_bytes).view(np.int32) for _ in range(num_slabs)
        ]
        self._events = [self._transfers.event() for _ in range(num_slabs)]
        self._turn = 0
        self.num_waits = 0

    def next_slab(self) -> int:
        """Index of the slab to write for the coming step; it holds what its last turn left.

        Raises:
            RuntimeError: the stream is being captured; a replay would copy this slab for ever.
        """
        # asked first: to query an event would end a capture
        if self._transfers.is_capturing():
            raise RuntimeError(
                "a step of host arrays is built during a graph capture, whose replays would copy "
                "this step again; capture a build from device tensors"
            )
        self._turn = (self._turn + 1) % len(self.slabs)
        if not self._events[self._turn].done():
            self.num_waits += 1
            self._events[self._turn].wait()
        return self._turn

    def upload(self, num_values: int) -> None:
        """Queue the copy of the first values of the slab given out last."""
        self._transfers.to_device(self._target, self.slabs[self._turn][:num_values])
        self._events[self._turn].record()
