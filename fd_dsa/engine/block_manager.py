"""Who owns which block of the paged caches."""

from __future__ import annotations


class BlockManager:
    """Free list and owners of the cache blocks; the only place that knows either.

    A block has one owner at most. Latent cache and indexer cache use the same ids.

    Args:
        num_blocks: blocks of the caches, ids 0 .. num_blocks - 1.
        block_size: tokens per block.

    Raises:
        ValueError: a number is below 1.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        """All blocks are free at first."""
        if num_blocks < 1 or block_size < 1:
            raise ValueError(
                f"num_blocks is {num_blocks} and block_size {block_size}; both must be >= 1"
            )
        self.num_blocks = num_blocks
        self.block_size = block_size
        # taken from the end, so that low ids are used first
        self._free = list(range(num_blocks - 1, -1, -1))
        self._owned: dict[str, list[int]] = {}

    @property
    def num_free(self) -> int:
        """Blocks without an owner."""
        return len(self._free)

    @property
    def num_used(self) -> int:
        """Blocks with an owner."""
        return self.num_blocks - len(self._free)

    def num_needed(self, num_tokens: int) -> int:
        """Blocks that hold `num_tokens` tokens."""
        return -(-num_tokens // self.block_size)

    def blocks_of(self, request_id: str) -> tuple[int, ...]:
        """Blocks of a request in the order of its tokens; empty when it owns none."""
        return tuple(self._owned.get(request_id, ()))

    def allocate(self, request_id: str, num_tokens: int) -> list[int] | None:
        """Blocks added so that the request can hold `num_tokens` tokens in all.

        Returns:
            The new blocks, empty when it owns enough; None, and nothing changed, when too few
            are free.
        """
        owned = self._owned.get(request_id)
        missing = self.num_needed(num_tokens) - (len(owned) if owned else 0)
        if missing <= 0:
            return []
        if missing > len(self._free):
            return None
        added = self._free[-missing:][::-1]
        del self._free[-missing:]
        if owned is None:
            self._owned[request_id] = added
            return list(added)
        owned.extend(added)
        return added

    def free(self, request_id: str) -> None:
        """Take all blocks back from a request; one that owns none is fine."""
        self._free.extend(reversed(self._owned.pop(request_id, ())))
