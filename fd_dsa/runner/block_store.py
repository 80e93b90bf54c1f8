"""Host memory for blocks of the caches of a CPU, which copies at once."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fd_dsa.ops.arrays import as_numpy
from fd_dsa.tensor import StepArray


class HostBlockStore:
    """BlockStore in memory beside the caches of a CPU.

    Args:
        caches: caches of all layers, [num_blocks, ...] each.
        num_slots: number of blocks that the memory holds.
    """

    overlaps = False

    def __init__(self, caches: Sequence[StepArray], num_slots: int) -> None:
        self.num_slots, self.num_done = num_slots, 0
        self._caches = [_by_block(as_numpy(cache)) for cache in caches]
        # the system provides each page when it is first written
        self._slots = [np.empty((num_slots, cache.shape[1]), np.uint8) for cache in self._caches]

    def begin(self) -> None:
        """See BlockStore. All steps are done."""

    def copy(self, loads: bool, block: int, slot: int, count: int) -> None:
        """Copy neighbouring blocks, see BlockStore."""
        for cache, slots in zip(self._caches, self._slots, strict=True):
            blocks, copies = cache[block : block + count], slots[slot : slot + count]
            if loads:
                blocks[:] = copies
            else:
                copies[:] = blocks

    def end(self, number: int) -> None:
        """See BlockStore. All copies are done."""
        self.num_done = number

    def precede(self, number: int) -> None:
        """See BlockStore. All copies are done."""


def _by_block(cache: np.ndarray) -> np.ndarray:
    """Return the bytes of a cache, uint8 [num_blocks, bytes of a block]."""
    return cache.reshape(len(cache), -1).view(np.uint8)
