"""Host slabs that take turns: a step is written while the copy of an earlier one is in flight."""

from __future__ import annotations

from typing import Any

import numpy as np

from fd_dsa.step.checks import Int32Array
from fd_dsa.triton_runtime.transfers import Event, RawStream, Transfers, transfers_for

NUM_SLABS = 3


class HostSlabs:
    """Page-locked memory for the values of several steps; the slabs are filled in turn.

    A copy reads its slab some time after it was queued, so a slab is given out again only when an
    event behind its copy is done. That is so without waiting in an engine that waits for the
    sampled ids of a step before it prepares the next but one; a caller that runs `num_slabs` steps
    ahead of the device is held back here instead of spoiling a step.

    Args:
        transfers: of the device to which the slabs are copied.
        num_values: int32 values of a slab.
        num_slabs: slabs that take turns.

    Attributes:
        slabs: int32 [num_values] each, zeros at first.
        copied: for each slab the point behind its last copy.
        turn: index of the slab that is filled now, or next.
        num_waits: how often `next_slab` found its copy unfinished and blocked.
    """

    def __init__(self, transfers: Transfers, num_values: int, num_slabs: int) -> None:
        self._transfers = transfers
        self.slabs: list[Int32Array] = [
            transfers.host_buffer(4 * num_values).view(np.int32) for _ in range(num_slabs)
        ]
        self.copied: list[Event] = [transfers.event() for _ in range(num_slabs)]
        self.turn = 0
        self.num_waits = 0

    def next_slab(self) -> int:
        """Index of the slab to fill; it holds what its last turn left. The same until `sent`.

        Raises:
            RuntimeError: the stream is being captured; a replay would copy this slab for ever.
        """
        self.refuse_capture()
        self.wait_for_copy()
        return self.turn

    def refuse_capture(self) -> None:
        """To be called before an event is asked, which would end a capture.

        Raises:
            RuntimeError: the stream is being captured.
        """
        if self._transfers.is_capturing():
            raise RuntimeError(
                "a step of host arrays is built during a graph capture, whose replays would copy "
                "this step again; capture a build from device tensors"
            )

    def wait_for_copy(self) -> None:
        """Block until the last copy of the slab that has its turn is done."""
        copied = self.copied[self.turn]
        if not copied.done():
            self.num_waits += 1
            copied.wait()

    def sent(self, stream: RawStream | None = None) -> int:
        """Index of the slab whose copy was just queued on a stream; the next one has its turn."""
        index = self.turn
        self.copied[index].record(stream)
        self.turn = (index + 1) % len(self.slabs)
        return index


class StagingRing(HostSlabs):
    """Moves int32 values from the host to a tensor on a device, one asynchronous copy a step.

    The tensor itself is overwritten in stream order: behind all work on the current stream, which
    every reader of the last step must have joined.

    Args:
        target: int32 [n], contiguous, on the device.
        num_slabs: slabs that take turns.
        transfers: how copies are made; None = as the tensor's library has it.
    """

    def __init__(
        self, target: Any, num_slabs: int = NUM_SLABS, transfers: Transfers | None = None
    ) -> None:
        self._target = target
        super().__init__(transfers or transfers_for(target), int(target.shape[0]), num_slabs)

    def upload(self, num_values: int) -> None:
        """Queue the copy of the first values of the slab given out last on the current stream."""
        self._transfers.to_device(self._target, self.slabs[self.turn][:num_values])
        self.sent()
