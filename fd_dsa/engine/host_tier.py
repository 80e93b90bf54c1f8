"""Prefix blocks in host memory, and the order of their copies.

The caches keep a prefix block until its memory is needed. With a host tier the block is copied to
host memory before, and is copied back when a prompt begins with its tokens.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from fd_dsa.engine.block_keys import BlockKeys
from fd_dsa.runner.protocol import BlockStore

MAX_SAVED_PER_STEP = 64
"""Blocks that are saved before their eviction in one step, so that no step waits for many."""


class _Copy(NamedTuple):
    """Copy of a block between the caches and host memory.

    Attributes:
        loads: True = from host memory to the caches.
        block: block of the caches.
        slot: block of the host memory.
    """

    loads: bool
    block: int
    slot: int

    def follows(self, other: _Copy, step: int) -> bool:
        """Return True if block and slot are those of another copy plus `step`."""
        return self == (other.loads, other.block + step, other.slot + step)


class HostTier:
    """Keys of the blocks in host memory, and the copies that are not enqueued yet.

    Rules:
        - Copies run in the order in which they were decided. So an earlier copy has read a slot or
          block before a later one overwrites it.
        - Copies are enqueued before a step. They wait for all steps before it, which write and read
          the same blocks.
        - A step waits only for the copies of blocks that requests have got since the step before.
          The device waits, and the host continues.
        - The blocks that no prompt has needed for the longest time lose their slots first.

    Args:
        store: host memory and its copies.

    Attributes:
        overlaps: True if copies run while steps run.
    """

    def __init__(self, store: BlockStore) -> None:
        self._store, self.overlaps = store, store.overlaps
        # taken from the end: blocks leave the caches in the order last to first, too
        self._free = list(range(store.num_slots))
        # the least recently used first
        self._slot_of: OrderedDict[bytes, int] = OrderedDict()
        self._copies: deque[_Copy] = deque()
        # copies so far, those of each block, and those that steps have waited for
        self._num_decided = self._num_awaited = 0
        self._newest_copy: dict[int, int] = {}
        self._given: list[int] = []

    @property
    def usage(self) -> float:
        """Share of the host memory that holds blocks, 0 to 1."""
        return len(self._slot_of) / self._store.num_slots

    def save(self, key: bytes, block: int) -> None:
        """Copy a block to host memory, unless a block with its key is there."""
        if key in self._slot_of:
            self._slot_of.move_to_end(key)
            return
        slot = self._free.pop() if self._free else self._slot_of.popitem(last=False)[1]
        self._slot_of[key] = slot
        self._decide(_Copy(False, block, slot))

    def find(self, keys: BlockKeys, first: int, end: int) -> list[int]:
        """Return the slots of the blocks of a request from `first` on, and keep them longest.

        Args:
            keys: keys of the request's blocks.
            first, end: the blocks from `first` to `end` - 1 are looked up, up to a missing one.
        """
        slots: list[int] = []
        for index in range(first, end):
            slot = self._slot_of.get(keys[index])
            if slot is None:
                break
            slots.append(slot)
        # a later block is only found after the earlier ones
        for index in reversed(range(first, first + len(slots))):
            self._slot_of.move_to_end(keys[index])
        return slots

    def load(self, slots: Sequence[int], blocks: Sequence[int]) -> int:
        """Copy slots to blocks of the caches. Returns the number by which `is_done` asks."""
        for slot, block in zip(slots, blocks, strict=True):
            self._decide(_Copy(True, block, slot))
        return self._num_decided

    def is_done(self, number: int) -> bool:
        """Return True if the first `number` copies are done."""
        return self._store.num_done >= number

    def give(self, blocks: Iterable[int]) -> None:
        """Make the next step wait for the copies of blocks that a request has got."""
        self._given += blocks

    def clear(self) -> None:
        """Forget all blocks."""
        self._free += self._slot_of.values()
        self._slot_of.clear()

    def enqueue(self) -> None:
        """Enqueue all copies, and make the next step wait for those that it needs.

        After an error the next call continues with the copy that failed.
        """
        copies, store = self._copies, self._store
        if copies:
            store.begin()
            while copies:
                start, count = self._next_run()
                store.copy(start.loads, start.block, start.slot, count)
                for _ in range(count):
                    copies.popleft()
            store.end(self._num_decided)
        newest = max((self._newest_copy.get(block, 0) for block in self._given), default=0)
        if newest > self._num_awaited:
            store.precede(newest)
            self._num_awaited = newest
        self._given.clear()

    def _decide(self, copy: _Copy) -> None:
        self._copies.append(copy)
        self._num_decided += 1
        self._newest_copy[copy.block] = self._num_decided

    def _next_run(self) -> tuple[_Copy, int]:
        """Return the lowest of the next copies that are neighbours on both sides, and how many."""
        copies = iter(self._copies)
        lowest = last = next(copies)
        count = step = 1
        for copy in copies:
            if count == 1 and copy.follows(last, -1):
                step = -1
            if not copy.follows(last, step):
                break
            last, count = copy, count + 1
        return (lowest if step == 1 else last), count
