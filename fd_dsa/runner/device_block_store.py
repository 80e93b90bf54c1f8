"""Page-locked host memory for blocks of the caches of a device, and a stream for their copies.

    copy stream                              main stream
                                             steps so far
    begin:    wait for them                  record `ready`
    copy:     one copy for each cache
    end:      record an event
                                             steps that use no copied block
    precede:                                 wait for the event
                                             a step that reads or overwrites a copied block

Copies of neighbouring blocks are one copy for each cache, because their slots are neighbours too.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence

from fd_dsa.device.transfers import Event, transfers_for
from fd_dsa.tensor import Tensor


class DeviceBlockStore:
    """BlockStore in page-locked memory, whose copies overlap with steps. One thread at a time.

    Args:
        caches: caches of all layers on one device, [num_blocks, ...] each.
        num_slots: number of blocks that the memory holds.
        own: the caches that are copied, which may be none.

    Raises:
        DeviceError: the driver cannot lock so much memory.
    """

    overlaps = True

    def __init__(self, caches: Sequence[Tensor], num_slots: int, own: slice = slice(None)) -> None:
        self.num_slots = num_slots
        self._transfers = transfers = transfers_for(caches[0])
        self._caches = caches[own]
        self._sizes = [_bytes_of_block(cache) for cache in self._caches]
        self._slots = [
            transfers.host_buffer(num_slots * size, is_cleared=False) for size in self._sizes
        ]
        # address of the first block, address of the first slot, and bytes of a block
        self._parts = [
            (cache.data_ptr(), slots.ctypes.data, size)
            for cache, slots, size in zip(self._caches, self._slots, self._sizes, strict=True)
        ]
        self._stream = transfers.new_stream()
        self._ready = transfers.event()
        # events that are not known to be done, and those that may be recorded again
        self._ends: deque[tuple[int, Event]] = deque()
        self._spare: list[Event] = []
        self._num_done = 0
        # caches and slots are freed after the copies
        self._stream.finish_before(self)

    @property
    def num_done(self) -> int:
        """See BlockStore. The host asks and does not wait."""
        ends = self._ends
        while ends and ends[0][1].done():
            self._num_done, event = ends.popleft()
            self._spare.append(event)
        return self._num_done

    def begin(self) -> None:
        """See BlockStore."""
        self._ready.record()
        self._ready.precede(self._stream)

    def copy(self, loads: bool, block: int, slot: int, count: int) -> None:
        """Enqueue the copies of neighbouring blocks, see BlockStore."""
        for blocks, slots, size in self._parts:
            on_device, on_host = blocks + block * size, slots + slot * size
            kind, target, source = "d2h", on_host, on_device
            if loads:
                kind, target, source = "h2d", on_device, on_host
            self._transfers.copy(kind, target, source, self._stream).queue(count * size)

    def end(self, number: int) -> None:
        """See BlockStore."""
        event = self._spare.pop() if self._spare else self._transfers.event()
        event.record(self._stream)
        self._ends.append((number, event))

    def precede(self, number: int) -> None:
        """See BlockStore."""
        if self.num_done < number:
            next(event for end, event in self._ends if end >= number).precede()


def _bytes_of_block(cache: Tensor) -> int:
    """Return the bytes of a block of a contiguous cache."""
    return math.prod(map(int, cache.shape[1:])) * cache.element_size()
