"""Snapshots of the states that batch rows have in addition to blocks, at the ends of blocks."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterable, Mapping, Sequence

from fd_dsa.runner.input_batch import NO_SLOT
from fd_dsa.runner.protocol import StateCopy


class Snapshots:
    """Snapshots of rows by block.

    A row may go on after a block with a snapshot. The snapshot used least recently makes room. With
    places in host memory it is copied there first, and so is the snapshot of a block that the
    caches evict. There it has the key of its block, and rows get it from there.

    The last block of a chunk before the last known token gets one, and each block that an answer
    ends. Of an answer only the newest block keeps its snapshot.

    A chunk that runs past the end of a block writes the snapshot of the block itself. The state of
    a row that stops at the end of a block is copied. Copies run before the next step, because a
    layer that drafts writes its keys of a step last. They run in the order in which they were
    decided. So an earlier copy has read a place before a later one overwrites it.

    Args:
        slots: free places of snapshots.
        copy: enqueues the copy of a state from one place to another. A row is its own place.
        block_size: number of tokens of a block.
        in_host: free places of snapshots in host memory.

    Attributes:
        key_of: keys of the blocks that can be found.
    """

    def __init__(
        self,
        slots: Iterable[int],
        copy: StateCopy,
        block_size: int,
        in_host: Iterable[int] = (),
    ) -> None:
        self._free, self._copy, self._block_size = list(slots), copy, block_size
        self._free_in_host = list(in_host)
        self.key_of: Mapping[int, bytes] = {}
        self._copies: deque[tuple[int, int]] = deque()
        # by block, of the step that is being scheduled
        self._reserved: dict[int, int] = {}
        # by block and by key, in the order of their last use
        self._slot_of: OrderedDict[int, int] = OrderedDict()
        self._in_host: OrderedDict[bytes, int] = OrderedDict()

    def has(self, block: int | None, key: bytes | None = None) -> bool:
        """Return True if a block has a snapshot, and keep it longest.

        Args:
            block: None = none of the caches.
            key: key of the block; None = the one by which the block of the caches can be found.
        """
        if block is not None and block in self._slot_of:
            self._slot_of.move_to_end(block)
            return True
        if block is not None and key is None:
            key = self.key_of.get(block)
        if key is None or key not in self._in_host:
            return False
        self._in_host.move_to_end(key)
        return True

    def last_block_end(self, end: int, num_tokens: int) -> int:
        """Return where the last block ends that gets a snapshot from a chunk.

        Args:
            end: end of the chunk.
            num_tokens: number of known tokens of the request, whose last one is always computed.
        """
        return min(end, num_tokens - 1) // self._block_size * self._block_size

    def reserve(
        self, blocks: Sequence[int], row: int, begin: int, end: int, num_tokens: int
    ) -> int:
        """Reserve the snapshot that the step of a chunk writes.

        The step writes only what its own tokens add. The rest is copied before it.

        Args:
            blocks: blocks of the request.
            row: batch row of the request.
            begin, end, num_tokens: tokens of the chunk, and number of known tokens.

        Returns:
            Place of the snapshot for `InputBatch.snapshot_slots`. NO_SLOT if the chunk runs past
            no end of a block, or if all places are reserved.
        """
        last = self.last_block_end(end, num_tokens)
        if not begin < last < end or not (self._free or self._slot_of):
            return NO_SLOT
        slot = self._take_slot()
        self._reserved[blocks[last // self._block_size - 1]] = slot
        if begin > 0:
            self._copies.append((row, slot))
        return slot

    def commit(self) -> None:
        """Make the reserved snapshots usable, because the step that writes them is enqueued."""
        for block, slot in self._reserved.items():
            self.drop(block)
            self._slot_of[block] = slot
        self._reserved.clear()

    def release(self) -> None:
        """Free the reserved places of a step that has failed."""
        self._free += self._reserved.values()
        self._reserved.clear()

    def take(self, blocks: Sequence[int], row: int, num_tokens: int, num_prompt: int) -> None:
        """Copy the state of a row, if its `num_tokens` tokens end with a block.

        Call it after the step of the last of these tokens is enqueued. The next step of the row
        must follow, and its blocks must not be found before.

        Args:
            blocks: blocks of the request.
            num_prompt: number of tokens of the request's prompt.
        """
        count = num_tokens // self._block_size
        if num_tokens % self._block_size:
            return
        if num_tokens - self._block_size > num_prompt:
            self.drop(blocks[count - 2])
        self.drop(blocks[count - 1])
        self._slot_of[blocks[count - 1]] = slot = self._take_slot()
        self._copies.append((row, slot))

    def restore(self, block: int, key: bytes, row: int) -> None:
        """Give a row the state after a block for which `has` is True."""
        place = self._slot_of.get(block)
        self._copies.append((self._in_host[key] if place is None else place, row))

    def enqueue(self) -> None:
        """Enqueue the copies since the last call before a step.

        After an error the next call continues with the copy that failed.
        """
        while self._copies:
            self._copy(*self._copies[0])
            self._copies.popleft()

    def move(self, block: int, other: int) -> None:
        """Give the snapshot of a block, if any, to another block of the same tokens."""
        if block in self._slot_of and other not in self._slot_of:
            self._slot_of[other] = self._slot_of.pop(block)

    def drop(self, block: int) -> None:
        """Free the snapshot of a block, if any."""
        if block in self._slot_of:
            self._free.append(self._slot_of.pop(block))

    def evict(self, block: int) -> None:
        """Move the snapshot of a block that the caches evict, if any, to host memory."""
        if block in self._slot_of:
            self._save(block, self._slot_of[block])
            self.drop(block)

    def clear(self) -> None:
        """Free all snapshots."""
        self._free += self._slot_of.values()
        self._slot_of.clear()
        self._free_in_host += self._in_host.values()
        self._in_host.clear()

    def _take_slot(self) -> int:
        """Return a free place, or that of the snapshot used least recently."""
        if self._free:
            return self._free.pop()
        block, slot = self._slot_of.popitem(last=False)
        self._save(block, slot)
        return slot

    def _save(self, block: int, slot: int) -> None:
        """Copy the snapshot of a block that can be found to host memory, unless it is there."""
        key = self.key_of.get(block)
        if key is None or not (self._free_in_host or self._in_host):
            return
        if key not in self._in_host:
            free = self._free_in_host
            place = free.pop() if free else self._in_host.popitem(last=False)[1]
            self._in_host[key] = place
            self._copies.append((slot, place))
        self._in_host.move_to_end(key)
