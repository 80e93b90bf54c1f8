"""Owners and contents of the blocks of the paged caches.

The key of a full block names its tokens and all tokens before them, as in vLLM's automatic prefix
caching. So requests with the same beginning share the block.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field


class BlockKeys:
    """Keys of the full blocks of a request. Each block is hashed once, at its first use.

        key[i] = sha256(key[i - 1] | tokens of block i), key[-1] = sha256(cache_salt)

    After `leave_drafts` a mark follows the tokens, because the caches of a drafter may lack the
    block. Two blocks with the same key have the same tokens, tokens before them, salt and mark.

    Args:
        token_ids: tokens of the request; the list may only grow.
        block_size: number of tokens of a block.
        cache_salt: separates the blocks of requests with different salts; None = no salt.
    """

    __slots__ = ("_block_size", "_keys", "_mark", "_root", "_token_ids")

    def __init__(self, token_ids: list[int], block_size: int, cache_salt: str | None) -> None:
        self._token_ids = token_ids
        self._block_size = block_size
        # root without a salt, which is the digest of no text
        self._root = bytes(32)
        if cache_salt is not None:
            # a JSON body may hold lone surrogates
            self._root = _sha256(cache_salt.encode("utf-8", "surrogatepass"))
        self._keys: list[bytes] = []
        self._mark = b""

    def leave_drafts(self) -> None:
        """Mark the blocks from now on, because the caches of a drafter may lack them."""
        self._mark = b"-"

    def __getitem__(self, index: int) -> bytes:
        """Return the key of block `index`, whose tokens must all be known."""
        keys, size = self._keys, self._block_size
        while len(keys) <= index:
            begin = len(keys) * size
            tokens = array("q", self._token_ids[begin : begin + size])
            before = keys[-1] if keys else self._root
            keys.append(_sha256(before + tokens.tobytes() + self._mark))
        return keys[index]


def _sha256(data: bytes) -> bytes:
    """Return a digest of 32 bytes. With a fast hash, clients could choose tokens that collide."""
    return hashlib.sha256(data).digest()


@dataclass(slots=True)
class _Owner:
    """Blocks of a request in the order of its tokens.

    Attributes:
        blocks: ids of the blocks.
        num_offered: number of leading blocks that other requests can find.
    """

    blocks: list[int] = field(default_factory=list)
    num_offered: int = 0


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

    Args:
        num_blocks: number of blocks of the caches, whose ids are 0 to num_blocks - 1.
        block_size: number of tokens of a block.
        enable_prefix_caching: True = requests share blocks.

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
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.enable_prefix_caching = enable_prefix_caching
        # used from the end, so that low ids come first
        self._free = list(range(num_blocks - 1, -1, -1))
        # blocks that can be found, by key, and their keys
        self._block_of: dict[bytes, int] = {}
        self._key_of: dict[int, bytes] = {}
        # blocks that can be found and have no owner, in the order of their eviction
        self._unowned: OrderedDict[int, None] = OrderedDict()
        self._num_owners = [0] * num_blocks
        self._owners: dict[Hashable, _Owner] = {}

    @property
    def num_free(self) -> int:
        """Number of blocks without an owner, including blocks that can be found."""
        return len(self._free) + len(self._unowned)

    @property
    def num_used(self) -> int:
        """Number of blocks with an owner."""
        return self.num_blocks - self.num_free

    def num_needed(self, num_tokens: int) -> int:
        """Return the number of blocks of `num_tokens` tokens."""
        return -(-num_tokens // self.block_size)

    def blocks_of(self, seq_id: Hashable) -> tuple[int, ...]:
        """Return the blocks of a request in the order of its tokens, which may be none."""
        owner = self._owners.get(seq_id)
        return tuple(owner.blocks) if owner else ()

    def find_cached_blocks(self, keys: BlockKeys, num_tokens: int) -> list[int]:
        """Find blocks with the first tokens of a request, without its last token.

        The blocks are valid until the next call of another method. `allocate` shares them.

        Args:
            keys: keys of the request's blocks.
            num_tokens: number of tokens of the request.
        """
        blocks: list[int] = []
        if self.enable_prefix_caching:
            for index in range((num_tokens - 1) // self.block_size):
                block = self._block_of.get(keys[index])
                if block is None:
                    break
                blocks.append(block)
        return blocks

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
        owner = self._owners.get(seq_id)
        missing = self.num_needed(num_tokens) - (len(owner.blocks) if owner else len(cached))
        num_revived = sum(not self._num_owners[block] for block in cached)
        if missing + num_revived > 0 and missing + num_revived + spare > self.num_free:
            return None
        if owner is None:
            owner = self._owners[seq_id] = _Owner()
        for block in cached:
            self._unowned.pop(block, None)
        added = [*cached, *(self._pop_free() for _ in range(missing))]
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
        owner = self._owners[seq_id]
        num_full = num_tokens // self.block_size
        for index in range(owner.num_offered, num_full):
            key, block = keys[index], owner.blocks[index]
            # the first of several blocks with the same tokens stays
            if key not in self._block_of:
                self._block_of[key], self._key_of[block] = block, key
        owner.num_offered = max(owner.num_offered, num_full)

    def free(self, seq_id: Hashable) -> None:
        """Free the blocks of a request, which may have none."""
        owner = self._owners.pop(seq_id, None)
        if owner is None:
            return
        for block in reversed(owner.blocks):
            self._num_owners[block] -= 1
            if not self._num_owners[block]:
                if block in self._key_of:
                    self._unowned[block] = None
                else:
                    self._free.append(block)

    def reset_prefix_cache(self) -> None:
        """Make all present blocks, and later ones of present owners, unavailable to others.

        Owners keep their blocks.
        """
        self._free += self._unowned
        for table in (self._unowned, self._block_of, self._key_of):
            table.clear()
        for owner in self._owners.values():
            owner.num_offered = self.num_blocks

    def _pop_free(self) -> int:
        """Take a block without an owner: a free one, or else the next one to evict."""
        if self._free:
            return self._free.pop()
        block, _ = self._unowned.popitem(last=False)
        del self._block_of[self._key_of.pop(block)]
        return block
