"""Names of the blocks of the prefix cache.

The key of a full block names its tokens and all tokens before them, as in vLLM's automatic prefix
caching.
"""

from __future__ import annotations

import hashlib
from array import array

# of an int64
_TOKEN_BYTES = 8


class BlockKeys:
    """Keys of the full blocks of a request. Each block is hashed once, at its first use.

        key[i] = sha256(key[i - 1] | tokens of block i), key[-1] = sha256(cache_salt)

    After `leave_drafts` a mark follows the tokens, because the caches of a drafter may lack the
    block. Two blocks with the same key have the same tokens, tokens before them, salt and mark.

    Args:
        token_ids: tokens of the request; the list may only grow.
        block_size: number of tokens of a block.
        cache_salt: separates the blocks of requests with different salts; None = no salt.
        prompt_bytes: first tokens as int64, which need no conversion then; may be empty.
    """

    __slots__ = ("_block_size", "_keys", "_mark", "_prompt_bytes", "_root", "_token_ids")

    def __init__(
        self,
        token_ids: list[int],
        block_size: int,
        cache_salt: str | None,
        prompt_bytes: bytes = b"",
    ) -> None:
        self._token_ids, self._prompt_bytes = token_ids, prompt_bytes
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
            begin, end = len(keys) * size, (len(keys) + 1) * size
            tokens = self._prompt_bytes[_TOKEN_BYTES * begin : _TOKEN_BYTES * end]
            if len(tokens) < _TOKEN_BYTES * size:
                # the block has tokens of the output
                tokens = array("q", self._token_ids[begin:end]).tobytes()
            before = keys[-1] if keys else self._root
            keys.append(_sha256(before + tokens + self._mark))
        return keys[index]


def _sha256(data: bytes) -> bytes:
    """Return a digest of 32 bytes. With a fast hash, clients could choose tokens that collide."""
    return hashlib.sha256(data).digest()
