"""Owners and contents of the blocks of the paged caches.

Requests with the same beginning share its full blocks, which `BlockKeys` names.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from fd_dsa.engine.block_keys import BlockKeys
from fd_dsa.engine.host_tier import MAX_SAVED_PER_STEP, HostTier
from fd_dsa.engine.snapshots import Snapshots


@dataclass(slots=True)
class _Owner:
    """Blocks of a request in the order of its tokens.

    Attributes:
        blocks: ids of the blocks.
        num_offered: number of leading blocks that other requests can find.
    """

    blocks: list[int] = field(default_factory=list)
    num_offered: int = 0


class Reservation(NamedTuple):
    """Blocks of a prompt that may be admitted.

    Attributes:
        blocks: ids of the blocks.
        num_cached: leading blocks whose tokens are computed.
        num_loaded: of these, the last ones that come from host memory.
        last_copy: number of the last copy from host memory, 0 = none.
    """

    blocks: list[int]
    num_cached: int
    num_loaded: int = 0
    last_copy: int = 0


class BlockManager:
    """Free list, owners and shared prefixes of the cache blocks.

    A block id stands for a block of the latent cache and one of the indexer cache, in all layers.

    Rules of sharing:
        - A block can be found once it is full and the step that filled it has finished. It is not
          written from then on.
        - A prompt shares full blocks of all its tokens except for the last token, whose logits it
          needs.
        - Free blocks are used first. Then blocks without an owner are evicted, starting with those
          that have had no owner for the longest time. The last blocks of a request are evicted
          before earlier ones, because a later block is only found after the earlier ones.
        - With snapshots, a row goes on only after a block that has one. A chunk with the end of the
          last block that another request has computed ends there, so that this block gets one.
        - With a host tier, evicted blocks are in host memory. The blocks that are evicted next are
          copied ahead, so that a request seldom waits for copies of the blocks that it gets.

    Args:
        num_blocks: number of blocks of the caches, whose ids are 0 to num_blocks - 1.
        block_size: number of tokens of a block.
        enable_prefix_caching: True = requests share blocks.

    Attributes:
        tier: blocks in host memory; None until `use_host_tier`.
        snapshots: states of rows at the ends of blocks; None until `use_snapshots`.
        reservations: blocks of requests that are not admitted yet, by `seq_id`.
        shares_blocks: False if a row has state that its blocks do not hold, so that also the
            outputs of one request have blocks of their own.
        repeats_chunks: False if tokens of a chunk overwrite states that the chunk reads.

    Raises:
        ValueError: a number is below 1.
    """

    def __init__(
        self, num_blocks: int, block_size: int, enable_prefix_caching: bool = True
    ) -> None:
        if num_blocks < 1 or block_size < 1:
            raise ValueError(
                f"num_blocks is {num_blocks} and block_size {block_size}; both must be >= 1"
            )
        self.num_blocks, self.block_size = num_blocks, block_size
        self.enable_prefix_caching = enable_prefix_caching
        self.shares_blocks = self.repeats_chunks = True
        # used from the end, so that low ids come first
        self._free = list(range(num_blocks - 1, -1, -1))
        # blocks that can be found, by key, and their keys
        self._block_of: dict[bytes, int] = {}
        self._key_of: dict[int, bytes] = {}
        # blocks that can be found and have no owner, in the order of their eviction
        self._unowned: OrderedDict[int, None] = OrderedDict()
        # those before them whose copies in host memory are enqueued
        self._saved: OrderedDict[int, None] = OrderedDict()
        self.tier: HostTier | None = None
        self.snapshots: Snapshots | None = None
        self._num_ahead = 0
        self.reservations: dict[Hashable, Reservation] = {}
        self._num_owners = [0] * num_blocks
        self._owners: dict[Hashable, _Owner] = {}

    @property
    def num_free(self) -> int:
        """Number of blocks without an owner, including blocks that can be found."""
        return len(self._free) + len(self._saved) + len(self._unowned)

    @property
    def num_used(self) -> int:
        """Number of blocks with an owner."""
        return self.num_blocks - self.num_free

    def use_host_tier(self, tier: HostTier, num_ahead: int) -> None:
        """Keep evicted blocks in host memory.

        Args:
            num_ahead: number of blocks that `enqueue_copies` keeps free or saved, so that they can
                be given away at once.
        """
        self.tier, self._num_ahead = tier, num_ahead

    def use_snapshots(self, snapshots: Snapshots) -> None:
        """Keep snapshots of rows, which have states in addition to blocks."""
        self.snapshots, snapshots.key_of = snapshots, self._key_of

    def num_needed(self, num_tokens: int) -> int:
        """Return the number of blocks of `num_tokens` tokens."""
        return -(-num_tokens // self.block_size)

    def num_shareable(self, num_tokens: int) -> int:
        """Return the number of blocks that prompts of the same `num_tokens` tokens may share."""
        shares = self.shares_blocks or self.snapshots is not None
        return (num_tokens - 1) // self.block_size if shares else 0

    def blocks_of(self, seq_id: Hashable) -> tuple[int, ...]:
        """Return the blocks of a request in the order of its tokens, which may be none."""
        owner = self._owners.get(seq_id)
        return tuple(owner.blocks) if owner else ()

    def shared_blocks(self, seq_id: Hashable, num_blocks: int) -> list[int]:
        """Return those of the first blocks of a request after which another one may go on."""
        return self._without_tail(list(self._owners[seq_id].blocks[:num_blocks]))

    def find_cached_blocks(self, keys: BlockKeys, num_tokens: int) -> list[int]:
        """Find blocks with the first tokens of a request, without its last token.

        The blocks are valid until the next call of another method. `allocate` shares them.

        Args:
            keys: keys of the request's blocks.
            num_tokens: number of tokens of the request.
        """
        return self._without_tail(self._find(keys, num_tokens))

    def chunk_end(self, keys: BlockKeys, begin: int, end: int, num_tokens: int) -> int:
        """Return where a chunk ends so that a block which comes back gets a snapshot.

        Args:
            keys: keys of the request's blocks.
            begin, end: first token of the chunk, and the end that the budget allows.
            num_tokens: number of known tokens of the request.
        """
        if self.snapshots is None:
            return end
        # a beginning that comes back is found from the third request on
        seen = len(self._find(keys, num_tokens)) * self.block_size
        is_last = seen == self.snapshots.last_block_end(end, num_tokens)
        return seen if begin < seen < end and not is_last else end

    def allocate(
        self, seq_id: Hashable, num_tokens: int, cached: Sequence[int] = (), spare: int = 0
    ) -> list[int] | None:
        """Grow the blocks of a request to `num_tokens` tokens.

        Args:
            seq_id: sequence that owns the blocks.
            num_tokens: number of tokens, including those of its present blocks.
            cached: result of `find_cached_blocks`, for a request without blocks.
            spare: number of blocks that must stay free.

        Returns:
            The added blocks, starting with `cached`. None if there are not enough free blocks;
            the request keeps its blocks then.
        """
        added = self._allocate(seq_id, num_tokens, cached, spare)
        if added and self.tier is not None:
            self.tier.give(added)
        return added

    def reserve(
        self,
        seq_id: Hashable,
        keys: BlockKeys,
        num_tokens: int,
        cached: Sequence[int],
        spare: int,
        *,
        reads_host: bool,
    ) -> Reservation | None:
        """Allocate the blocks of a waiting request, and load those that host memory has.

        `admit` gives the blocks to the request. Until then a request that must go on may take them
        back.

        Args:
            seq_id, num_tokens, cached, spare: as for `allocate`.
            keys: keys of the request's blocks.
            reads_host: True if blocks after `cached` may come from host memory.

        Returns:
            None if there are not enough free blocks.
        """
        tier, end = self.tier, 0
        if reads_host and tier is not None:
            # the allocation may evict blocks to host memory, and these must not replace them
            cached, end = self._with_host_blocks(tier, keys, num_tokens, cached)
        blocks, first = self._allocate(seq_id, num_tokens, cached, spare), len(cached)
        if blocks is None:
            return None
        slots = tier.find(keys, first, end) if tier is not None else []
        made = Reservation(blocks, first + len(slots), len(slots))
        if not self.has_state(made, keys):
            # full host memory has lost the snapshot or a block before it
            self.free(seq_id)
            cached = self.find_cached_blocks(keys, num_tokens) if reads_host else ()
            return self.reserve(seq_id, keys, num_tokens, cached, spare, reads_host=reads_host)
        if slots and tier is not None:
            made = made._replace(last_copy=tier.load(slots, blocks[first : made.num_cached]))
            # steps that read the blocks wait for their copies
            self.cache_full_blocks(seq_id, keys, made.num_cached * self.block_size)
        self.reservations[seq_id] = made
        return made

    def has_state(self, reservation: Reservation, keys: BlockKeys) -> bool:
        """Return True if the row of a request can go on after the computed blocks."""
        last = reservation.num_cached - 1
        if self.snapshots is None or last < 0:
            return True
        return self.snapshots.has(reservation.blocks[last], keys[last])

    def is_loaded(self, reservation: Reservation) -> bool:
        """Return True if the copies from host memory are done, or cannot overlap with steps."""
        tier = self.tier
        return tier is None or not tier.overlaps or tier.is_done(reservation.last_copy)

    def admit(self, seq_id: Hashable, keys: BlockKeys, row: int) -> None:
        """Give reserved blocks to their request, whose next step in `row` reads them."""
        reservation = self.reservations.pop(seq_id)
        last = reservation.num_cached - 1
        if self.snapshots is not None and last >= 0:
            self.snapshots.restore(reservation.blocks[last], keys[last], row)
        if self.tier is not None:
            self.tier.give(reservation.blocks)

    def enqueue_copies(self) -> None:
        """Enqueue the copies of the host tier and of snapshots before a step."""
        if self.snapshots is not None:
            self.snapshots.enqueue()
        if (tier := self.tier) is None:
            return
        missing = self._num_ahead - len(self._free) - len(self._saved)
        for _ in range(min(missing, len(self._unowned), MAX_SAVED_PER_STEP)):
            block, _ = self._unowned.popitem(last=False)
            self._saved[block] = None
            tier.save(self._key_of[block], block)
        tier.enqueue()

    def _allocate(
        self, seq_id: Hashable, num_tokens: int, cached: Sequence[int], spare: int
    ) -> list[int] | None:
        """Grow the blocks of a request, see `allocate`."""
        owner = self._owners.get(seq_id)
        missing = self.num_needed(num_tokens) - (len(owner.blocks) if owner else len(cached))
        num_revived = sum(not self._num_owners[block] for block in cached)
        if missing + num_revived > 0 and missing + num_revived + spare > self.num_free:
            if not self._take_back(seq_id, spare):
                return None
            return self._allocate(seq_id, num_tokens, cached, spare)
        if owner is None:
            owner = self._owners[seq_id] = _Owner()
        for block in cached:
            self._unowned.pop(block, None)
            self._saved.pop(block, None)
        new = [self._pop_free() for _ in range(missing)]
        if self.tier is not None:
            # neighbours are copied together
            new.sort()
        added = [*cached, *new]
        for block in added:
            self._num_owners[block] += 1
        owner.blocks += added
        owner.num_offered = max(owner.num_offered, len(cached))
        return added

    def cache_full_blocks(self, seq_id: Hashable, keys: BlockKeys, num_tokens: int) -> None:
        """Make the full blocks of the first `num_tokens` tokens of a request available to others.

        Call it after the step that writes them is enqueued, without drafts that are not verified.
        """
        if not self.enable_prefix_caching:
            return
        owner, num_full = self._owners[seq_id], num_tokens // self.block_size
        for index in range(owner.num_offered, num_full):
            key, block = keys[index], owner.blocks[index]
            # the first of several blocks with the same tokens stays
            if key not in self._block_of:
                self._block_of[key], self._key_of[block] = block, key
            elif self.snapshots is not None:
                self.snapshots.move(block, self._block_of[key])
        owner.num_offered = max(owner.num_offered, num_full)

    def free(self, seq_id: Hashable) -> None:
        """Free the blocks of a request, which may have none."""
        owner = self._owners.pop(seq_id, None)
        self.reservations.pop(seq_id, None)
        for block in reversed(owner.blocks if owner else ()):
            self._num_owners[block] -= 1
            if not self._num_owners[block]:
                if block in self._key_of:
                    self._unowned[block] = None
                else:
                    self._free.append(block)
                    if self.snapshots is not None:
                        self.snapshots.drop(block)

    def reset_prefix_cache(self) -> None:
        """Make all present blocks, and later ones of present owners, unavailable to others.

        Owners keep their blocks.
        """
        self._free += [*self._saved, *self._unowned]
        for table in (self._saved, self._unowned, self._block_of, self._key_of):
            table.clear()
        for owner in self._owners.values():
            owner.num_offered = self.num_blocks
        for kept in (self.tier, self.snapshots):
            if kept is not None:
                kept.clear()

    def _find(self, keys: BlockKeys, num_tokens: int) -> list[int]:
        """Find blocks as `find_cached_blocks` does, with or without snapshots."""
        blocks: list[int] = []
        if self.enable_prefix_caching:
            for index in range((num_tokens - 1) // self.block_size):
                if (block := self._block_of.get(keys[index])) is None:
                    break
                blocks.append(block)
        return blocks

    def _without_tail(self, blocks: list[int]) -> list[int]:
        """Return the blocks without those after the last one that a row may go on after."""
        while self.snapshots is not None and blocks and not self.snapshots.has(blocks[-1]):
            blocks.pop()
        return blocks

    def _with_host_blocks(
        self, tier: HostTier, keys: BlockKeys, num_tokens: int, cached: Sequence[int]
    ) -> tuple[Sequence[int], int]:
        """Find the blocks of a request in the caches and then in host memory, as `reserve` does.

        Returns:
            Blocks of the caches, and up to which block host memory is read.
        """
        end, snapshots = (num_tokens - 1) // self.block_size, self.snapshots
        if snapshots is None:
            tier.find(keys, len(cached), end)
            return cached, end
        found = self._find(keys, num_tokens)
        end = len(found) + len(tier.find(keys, len(found), end))
        for count in range(end, max(len(found), len(cached)), -1):
            if snapshots.has(None, keys[count - 1]):
                return found, count
        return cached, 0

    def _take_back(self, seq_id: Hashable, spare: int) -> bool:
        """Free the blocks of a request that waits for its copies, for one that must go on."""
        waiting = next((other for other in reversed(self.reservations) if other != seq_id), None)
        if spare or waiting is None:
            return False
        self.free(waiting)
        return True

    def _pop_free(self) -> int:
        """Take a block without an owner: a free one, or else the next one to evict."""
        if self._free:
            return self._free.pop()
        is_saved = bool(self._saved)
        block, _ = (self._saved or self._unowned).popitem(last=False)
        if self.snapshots is not None:
            self.snapshots.evict(block)
        key = self._key_of.pop(block)
        del self._block_of[key]
        if self.tier is not None and not is_saved:
            self.tier.save(key, block)
        return block
