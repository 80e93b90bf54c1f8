"""Host memory beside the caches of a checking runner, whose copies are late on purpose."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np

from fd_dsa.runner.rank_blocks import DividedBlockStore
from tests.soak.checking_runner import GARBAGE, DeviceGone


class LateStore:
    """A BlockStore whose copies read and write when they run, not when they are enqueued.

    Steps of a checking runner run at once, so a step that does not wait for a copy finds what was
    in the block before, and a copy that a step should have waited for takes what the step wrote.

    Args:
        caches: hashes [n, num_blocks, block_size], n may be 0.
        num_slots: blocks of the host memory.
        overlaps: False = copies run at once.
        seed: of the order in which copies and steps run.
        fail_share: share of the copies that fail when they are enqueued.

    Attributes:
        num_waits: how often a step waited for copies that were not done.
    """

    def __init__(
        self,
        caches: np.ndarray,
        num_slots: int,
        overlaps: bool,
        seed: int,
        fail_share: float = 0.0,
    ) -> None:
        self.num_slots, self.overlaps = num_slots, overlaps
        self.num_waits = 0
        self._caches, self._fail_share = caches, fail_share
        self._slots = np.full((len(caches), num_slots, caches.shape[2]), GARBAGE)
        self._draw = random.Random(seed)
        # copies that have not run, and numbers between them
        self._queue: deque[tuple[bool, int, int] | int] = deque()
        self._num_done = 0

    @property
    def num_done(self) -> int:
        """Number of the last mark that the copies have passed; a few run meanwhile."""
        self._run(min(self._draw.choice([0, 0, 1, 3]), len(self._queue)))
        return self._num_done

    def begin(self) -> None:
        """All steps are done. A few earlier copies run now."""
        self._run(min(self._draw.choice([0, 0, 1, 3]), len(self._queue)))

    def copy(self, loads: bool, block: int, slot: int, count: int) -> None:
        """Queue the copies of neighbouring blocks, or fail."""
        assert count >= 1 and 0 <= slot <= self.num_slots - count
        if self._draw.random() < self._fail_share:
            raise DeviceGone("the device is gone")
        self._queue += [(loads, block + i, slot + i) for i in range(count)]

    def end(self, number: int) -> None:
        """Queue a mark."""
        assert number > self._num_done
        self._queue.append(number)
        if not self.overlaps:
            self._run(len(self._queue))

    def precede(self, number: int) -> None:
        """Run all copies up to a mark, because the next step runs at once."""
        if self._num_done < number:
            self.num_waits += 1
            assert number <= max(one for one in self._queue if isinstance(one, int))
        while self._num_done < number:
            self._run(1)

    def _run(self, count: int) -> None:
        for _ in range(count):
            one = self._queue.popleft()
            if isinstance(one, int):
                self._num_done = one
                continue
            loads, block, slot = one
            if loads:
                self._caches[:, block] = self._slots[:, slot]
            else:
                self._slots[:, slot] = self._caches[:, block]


NUM_CACHES = 3
"""Caches of each rank."""


class LateRanks:
    """BlockStore of rank 0 whose calls all ranks make in order.

    Args:
        caches: hashes [num_ranks * NUM_CACHES, num_blocks, block_size], rank by rank.
        num_ranks: ranks, some of which may have no cache of their own to copy.
        num_slots, overlaps, seed: as for LateStore.
    """

    def __init__(
        self, caches: np.ndarray, num_ranks: int, num_slots: int, overlaps: bool, seed: int
    ) -> None:
        self.num_slots, self.overlaps = num_slots, overlaps
        by_rank = caches.reshape(num_ranks, NUM_CACHES, *caches.shape[1:])
        self._stores = []
        for rank, own in enumerate(by_rank):
            share = LateStore(own[rank::num_ranks], num_slots, overlaps, seed + rank)
            group: Any = SimpleNamespace(size=num_ranks)
            group.all_gather_tensors = _give_rows(by_rank, rank)
            self._stores.append(DividedBlockStore(share, range(NUM_CACHES), group))

    @property
    def num_done(self) -> int:
        """Return the number of rank 0. The others may be behind."""
        return self._stores[0].num_done

    def begin(self) -> None:
        """See LateStore."""
        for store in self._stores:
            store.begin()

    def copy(self, loads: bool, block: int, slot: int, count: int) -> None:
        """See LateStore."""
        for store in self._stores:
            store.copy(loads, block, slot, count)

    def end(self, number: int) -> None:
        """See LateStore."""
        for store in self._stores:
            store.end(number)

    def precede(self, number: int) -> None:
        """See LateStore."""
        for store in self._stores:
            store.precede(number)


def _give_rows(caches: np.ndarray, rank: int) -> Any:
    """The gather of a rank: it gives its rows to all ranks, which do the same."""

    def all_gather_tensors(numbers: Sequence[int], begin: int, end: int) -> None:
        for cache in numbers[rank :: len(caches)]:
            caches[:, cache, begin:end] = caches[rank, cache, begin:end]

    return all_gather_tensors
