"""Snapshots of the states that batch rows have in addition to blocks, at the ends of blocks."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable


class Snapshots:
    """Snapshots of rows by block.

    A row may go on after a block with a snapshot. The snapshot used least recently makes room.
    Copies run before the next step, because a layer that drafts writes its keys of a step last.

    Args:
        slots: free places of snapshots.
        copy: enqueues the copy of a state from one place to another. A row is its own place.
    """

    def __init__(self, slots: Iterable[int], copy: Callable[[int, int], None]) -> None:
        self._free, self._copy = list(slots), copy
        self._copies: list[tuple[int, int]] = []
        # by block, in the order of their last use
        self._slot_of: OrderedDict[int, int] = OrderedDict()

    def __contains__(self, block: int) -> bool:
        return block in self._slot_of

    def take(self, block: int, row: int) -> None:
        """Copy the state of a row, whose newest token is the last one of `block`."""
        self.drop(block)
        slot = self._free.pop() if self._free else self._slot_of.popitem(last=False)[1]
        self._slot_of[block] = slot
        self._copies.append((row, slot))

    def restore(self, block: int, row: int) -> None:
        """Give a row the state after a block that has a snapshot."""
        self._slot_of.move_to_end(block)
        self._copies.append((self._slot_of[block], row))

    def enqueue(self) -> None:
        """Enqueue the copies since the last call, in their order, before a step."""
        for places in self._copies:
            self._copy(*places)
        self._copies.clear()

    def move(self, block: int, other: int) -> None:
        """Give the snapshot of a block, if any, to another block of the same tokens."""
        if block in self._slot_of and other not in self._slot_of:
            self._slot_of[other] = self._slot_of.pop(block)

    def drop(self, block: int) -> None:
        """Free the snapshot of a block, if any."""
        if block in self._slot_of:
            self._free.append(self._slot_of.pop(block))

    def clear(self) -> None:
        """Free all snapshots."""
        self._free += self._slot_of.values()
        self._slot_of.clear()
