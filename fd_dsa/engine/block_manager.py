"""Who owns which block of the paged caches, and which blocks hold which tokens.

A full block is found by a key that names its tokens and all tokens before them, as in vLLM's
automatic prefix caching, so requests with the same beginning share it.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field


class BlockKeys:
    """Keys of one request's full blocks; each block is hashed once, when first asked for.

        key[i] = sha256(key[i - 1] | tokens of block i), key[-1] = sha256(cache_salt)

    After `leave_drafts` a mark follows the tokens. So two blocks have the same key only where their
    tokens, all tokens before them and the salts of their requests are the same, and a drafter's
    caches have them both or neither.

    Args:
        token_ids: the request's tokens; may grow, and must not change otherwise.
        cache_salt: keeps the blocks of requests with another one, or none, apart.
    """

    __slots__ = ("_block_size", "_keys", "_mark", "_root", "_token_ids")

    def __init__(self, token_ids: list[int], block_size: int, cache_salt: str | None) -> None:
        self._token_ids = token_ids
        self._block_size = block_size
        # without a salt; no text has this digest
        self._root = bytes(32)
        if cache_salt is not None:
            # a JSON body may hold lone surrogates
            self._root = _sha256(cache_salt.encode("utf-8", "surrogatepass"))
        self._keys: list[bytes] = []
        self._mark = b""

    def leave_drafts(self) -> None:
        """From now on a drafter's caches may lack the blocks that are named."""
        self._mark = b"-"

    def __getitem__(self, index: int) -> bytes:
        """Key of block `index`, all of whose tokens must be known."""
        keys, size = self._keys, self._block_size
        while len(keys) <= index:
            begin = len(keys) * size
            tokens = array("q", self._token_ids[begin : begin + size])
            before = keys[-1] if keys else self._root
            keys.append(_sha256(before + tokens.tobytes() + self._mark))
        return keys[index]


def _sha256(data: bytes) -> bytes:
    """Digest of 32 bytes; a fast hash would let a client choose tokens that collide."""
    return hashlib.sha256(data).digest()


@dataclass(slots=True)
class _Owner:
    """Blocks of one request in the order of its tokens, and how many were offered for sharing."""

    blocks: list[int] = field(default_factory=list)
    num_offered: int = 0


class BlockManager:
    """Free list, owners and shared prefixes of the cache blocks; the only place that knows them.

    Latent cache and indexer cache use the same ids, so a block stands for its part of both, in
    all layers: they are shared, kept and taken together.

    Rules of sharing:
        - A block can be found once it is full and the step that filled it has finished, and is
          not written from then on. So one with several owners is never written.
        - A prompt takes over full blocks of all its tokens but the last, whose logits it needs.
        - Blocks that hold nothing of use are taken first, then those in the table that nobody
          owns, the longest unowned first; of one request's blocks the last ones, since earlier
          ones are found without later ones, but not the other way round.

    Args:
        num_blocks: blocks of the caches, ids 0 .. num_blocks - 1.
        enable_prefix_caching: whether blocks are shared at all.

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
        # taken from the end, so that low ids are used first
        self._free = list(range(num_blocks - 1, -1, -1))
        # the table of blocks that can be found
        self._block_of: dict[bytes, int] = {}
        self._key_of: dict[int, bytes] = {}
        # those of them that nobody owns, in the order of their eviction
        self._unowned: OrderedDict[int, None] = OrderedDict()
        self._num_owners = [0] * num_blocks
        self._owners: dict[Hashable, _Owner] = {}

    @property
    def num_free(self) -> int:
        """Blocks without an owner, those that can be found included."""
        return len(self._free) + len(self._unowned)

    @property
    def num_used(self) -> int:
        """Blocks with an owner."""
        return self.num_blocks - self.num_free

    def num_needed(self, num_tokens: int) -> int:
        """Blocks that hold `num_tokens` tokens."""
        return -(-num_tokens // self.block_size)

    def blocks_of(self, request_id: Hashable) -> tuple[int, ...]:
        """Blocks of a request in the order of its tokens; empty when it owns none."""
        owner = self._owners.get(request_id)
        return tuple(owner.blocks) if owner else ()

    def find_cached_blocks(self, keys: BlockKeys, num_tokens: int) -> list[int]:
        """Blocks that hold the first tokens of a request that has `num_tokens`, never the last.

        They stay what they are until the next call of another method; `allocate` takes them over.
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
        self, request_id: Hashable, num_tokens: int, cached: Sequence[int] = (), spare: int = 0
    ) -> list[int] | None:
        """Blocks added so that the request can hold `num_tokens` tokens in all.

        Args:
            num_tokens: tokens to hold, those of its present blocks included.
            cached: what `find_cached_blocks` gave; only for a request that owns nothing.
            spare: free blocks that must be left.

        Returns:
            The added blocks, those of `cached` first, empty when it owns enough; None, and nothing
            changed, when too few are free.
        """
        owner = self._owners.get(request_id)
        missing = self.num_needed(num_tokens) - (len(owner.blocks) if owner else len(cached))
        num_revived = sum(not self._num_owners[block] for block in cached)
        if missing + num_revived > 0 and missing + num_revived + spare > self.num_free:
            return None
        if owner is None:
            owner = self._owners[request_id] = _Owner()
        for block in cached:
            self._unowned.pop(block, None)
        added = [*cached, *(self._take_free() for _ in range(missing))]
        for block in added:
            self._num_owners[block] += 1
        owner.blocks += added
        owner.num_offered = max(owner.num_offered, len(cached))
        return added

    def cache_full_blocks(self, request_id: Hashable, keys: BlockKeys, num_tokens: int) -> None:
        """Let others find the blocks that the first `num_tokens` tokens of a request have filled.

        Call it when the step that wrote them has finished, and only for tokens that stay: never
        for drafts that are not verified.
        """
        if not self.enable_prefix_caching:
            return
        owner = self._owners[request_id]
        num_full = num_tokens // self.block_size
        for index in range(owner.num_offered, num_full):
            key, block = keys[index], owner.blocks[index]
            # unless another block with the same tokens is there
            if key not in self._block_of:
                self._block_of[key], self._key_of[block] = block, key
        owner.num_offered = max(owner.num_offered, num_full)

    def free(self, request_id: Hashable) -> None:
        """Take all blocks back from a request; one that owns none is fine."""
        owner = self._owners.pop(request_id, None)
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
        """Let nothing be found any more that was computed up to now or will be by present owners.

        Owners keep their blocks.
        """
        self._free += self._unowned
        for table in (self._unowned, self._block_of, self._key_of):
            table.clear()
        for owner in self._owners.values():
            owner.num_offered = self.num_blocks

    def _take_free(self) -> int:
        """A block without an owner; there is one. Of those that can be found the oldest."""
        if self._free:
            return self._free.pop()
        block, _ = self._unowned.popitem(last=False)
        del self._block_of[self._key_of.pop(block)]
        return block
