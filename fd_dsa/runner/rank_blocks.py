"""Host memory for prefix blocks of several ranks, one copy for all of them.

Every rank computes latents and index keys from the same sums by the same weights. So all caches
are the same on all ranks, those of a layer for drafts included. Each rank keeps every n-th cache
of all blocks: n ranks need the host memory of one, and each copies a part of the bytes. A rank
reads only its own host memory. When a block comes back, each rank copies its part to its device,
and the ranks gather the parts.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Sequence
from operator import methodcaller
from typing import Any

from fd_dsa.distributed import Group
from fd_dsa.runner.protocol import BlockStore

Call = Callable[[BlockStore], object]
"""Call of a method of the store that it is given."""


class DividedBlockStore:
    """BlockStore of one rank, whose calls all ranks make in the same order.

    `precede` gathers on the stream of the steps. So the gather has one place among the collectives
    of the steps on all ranks. A block may be saved again before its gather, because a rank saves
    only what it has loaded.

    Args:
        share: copies of the caches whose numbers are the rank's modulo the number of ranks.
        caches: all caches in the form that `group` takes, [num_blocks, ...] each.
        group: ranks that share the model.
    """

    def __init__(self, share: BlockStore, caches: Sequence[Any], group: Group) -> None:
        self.num_slots, self.overlaps = share.num_slots, share.overlaps
        self._share, self._caches, self._group = share, caches, group
        # loaded blocks, and the number of the last `end` before each load
        self._loaded: deque[tuple[int, range]] = deque()
        self._last_end = 0

    @property
    def num_done(self) -> int:
        """See BlockStore. Only the copies of this rank count."""
        return self._share.num_done

    def begin(self) -> None:
        """See BlockStore."""
        self._share.begin()

    def copy(self, loads: bool, block: int, slot: int, count: int) -> None:
        """Copy this rank's part of neighbouring blocks, see BlockStore."""
        self._share.copy(loads, block, slot, count)
        if loads:
            self._loaded.append((self._last_end, range(block, block + count)))

    def end(self, number: int) -> None:
        """See BlockStore."""
        self._share.end(number)
        self._last_end = number

    def precede(self, number: int) -> None:
        """Gather the loaded blocks after waiting for their copies, see BlockStore."""
        self._share.precede(number)
        blocks: set[int] = set()
        # the wait is for all copies up to the next `end`
        while self._loaded and self._loaded[0][0] < number:
            blocks.update(self._loaded.popleft()[1])
        for begin in sorted(block for block in blocks if block - 1 not in blocks):
            end = next(block for block in itertools.count(begin) if block not in blocks)
            self._group.all_gather_tensors(self._caches, begin, end)


class SentBlockStore:
    """BlockStore of rank 0, whose calls wait for the message of the next step.

    Args:
        store: store of this rank.

    Attributes:
        calls: waiting calls, which can be pickled.
    """

    def __init__(self, store: BlockStore) -> None:
        self.num_slots, self.overlaps = store.num_slots, store.overlaps
        self._store = store
        self.calls: list[Call] = []

    @property
    def num_done(self) -> int:
        """See BlockStore."""
        return self._store.num_done

    def begin(self) -> None:
        """See BlockStore."""
        self.calls.append(methodcaller("begin"))

    def copy(self, loads: bool, block: int, slot: int, count: int) -> None:
        """See BlockStore."""
        self.calls.append(methodcaller("copy", loads, block, slot, count))

    def end(self, number: int) -> None:
        """See BlockStore."""
        self.calls.append(methodcaller("end", number))

    def precede(self, number: int) -> None:
        """See BlockStore."""
        self.calls.append(methodcaller("precede", number))

    def run(self) -> None:
        """Make the waiting calls on this rank."""
        calls, self.calls = self.calls, []
        make_calls(self._store, calls)


def make_calls(store: BlockStore, calls: Sequence[Call]) -> None:
    """Make calls that a SentBlockStore has collected."""
    for call in calls:
        call(store)
