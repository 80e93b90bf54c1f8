"""Which cache blocks hold which tokens, so that requests with the same beginning share them.

A full block is found by a key that names its tokens and all tokens before them, as in vLLM's
automatic prefix caching. Blocks that nobody owns any more stay findable until they are needed.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict


class BlockKeys:
    """Keys of one request's full blocks; each block is hashed once, when first asked for.

        key[i] = sha256(key[i - 1] | tokens of block i), key[-1] = sha256(cache_salt)

    So two blocks have the same key only where their tokens, all tokens before them and the salts
    of their requests are the same.

    Args:
        token_ids: the request's tokens; may grow, and must not change otherwise.
        block_size: tokens per block.
        cache_salt: keeps the blocks of requests with another one, or none, apart.
    """

    __slots__ = ("_block_size", "_keys", "_root", "_token_ids")

    def __init__(self, token_ids: list[int], block_size: int, cache_salt: str | None) -> None:
        """Hash the salt alone."""
        self._token_ids = token_ids
        self._block_size = block_size
        # without a salt; no text has this digest
        self._root = bytes(32) if cache_salt is None else _sha256(_utf8(cache_salt))
        self._keys: list[bytes] = []

    def __getitem__(self, index: int) -> bytes:
        """Key of block `index`, all of whose tokens must be known."""
        keys, size = self._keys, self._block_size
        while len(keys) <= index:
            begin = len(keys) * size
            tokens = array("q", self._token_ids[begin : begin + size])
            keys.append(_sha256((keys[-1] if keys else self._root) + tokens.tobytes()))
        return keys[index]


def _sha256(data: bytes) -> bytes:
    """Digest of 32 bytes; a fast hash would let a client choose tokens that collide."""
    return hashlib.sha256(data).digest()


def _utf8(text: str) -> bytes:
    """Bytes of any text, lone surrogates of a JSON body included."""
    return text.encode("utf-8", "surrogatepass")


class PrefixCache:
    """Table of the blocks that can be found by key, and the order in which they may be taken.

    A block in the table is full, and nobody writes to it. One without an owner is kept as long as
    no other block is left; then the one that lost its owner first goes.
    """

    def __init__(self) -> None:
        """An empty table."""
        self._block_of: dict[bytes, int] = {}
        self._key_of: dict[int, bytes] = {}
        # blocks of the table that nobody owns, in the order of their eviction
        self._unowned: OrderedDict[int, None] = OrderedDict()

    @property
    def num_unowned(self) -> int:
        """Blocks of the table that could be taken now."""
        return len(self._unowned)

    def find(self, keys: BlockKeys, num_blocks: int) -> list[int]:
        """The blocks of the longest beginning of `keys` that is here, at most `num_blocks`."""
        blocks: list[int] = []
        for index in range(num_blocks):
            block = self._block_of.get(keys[index])
            if block is None:
                break
            blocks.append(block)
        return blocks

    def put(self, key: bytes, block: int) -> None:
        """Make an owned block findable, unless another one with the same tokens is."""
        if key not in self._block_of:
            self._block_of[key] = block
            self._key_of[block] = key

    def claim(self, block: int) -> None:
        """A block that was looked up has an owner again, or one more."""
        self._unowned.pop(block, None)

    def keep(self, block: int) -> bool:
        """Take a block that has lost its last owner; False where it is not in the table."""
        if block not in self._key_of:
            return False
        self._unowned[block] = None
        return True

    def evict(self) -> int:
        """The unowned block that has waited longest; nobody finds it any more."""
        block, _ = self._unowned.popitem(last=False)
        del self._block_of[self._key_of.pop(block)]
        return block

    def clear(self) -> list[int]:
        """Empty the table; returns the blocks without an owner."""
        blocks = list(self._unowned)
        self._unowned.clear()
        self._block_of.clear()
        self._key_of.clear()
        return blocks
