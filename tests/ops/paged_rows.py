"""Steps of random rows for the tests of kernels that work on pages."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np

from tests.kernel_memory import KernelMemory

# (cached, new) tokens of each row: first chunk, decode, later chunk, drafts, a lone token
SMALL_ROWS = ((0, 5), (37, 1), (20, 4), (63, 2), (0, 1))
LARGE_ROWS = ((0, 70), (8191, 1), (3000, 40), (4094, 2), (2046, 5), (0, 1))


@dataclass(frozen=True)
class PagedRows:
    """A packed step with blocks scattered over a cache, and padded tokens at its end.

    Attributes:
        position_ids: int64 [num_tokens]; 0 of padding.
        batch_ids: int32 [num_tokens]; -1 of padding.
        block_tables: int32 [num_rows, max_blocks]; -1 past a row's own blocks.
        window: int64 [num_tokens]; keys that a token sees, 0 of padding.
        num_blocks, block_size: of the cache; some blocks belong to no row.
    """

    position_ids: np.ndarray
    batch_ids: np.ndarray
    block_tables: np.ndarray
    window: np.ndarray
    num_blocks: int
    block_size: int

    @property
    def num_tokens(self) -> int:
        """Tokens, padding included."""
        return len(self.batch_ids)

    def meta(self, m: KernelMemory, max_seqlen_k: int = 1 << 30) -> Any:
        """What kernels read of a ForwardMeta, in a memory."""
        counts = np.bincount(self.batch_ids[self.batch_ids >= 0], minlength=len(self.block_tables))
        return SimpleNamespace(
            position_ids=m.put(self.position_ids),
            batch_id_per_token=m.put(self.batch_ids),
            block_tables=m.put(self.block_tables),
            cu_seqlens_q=m.put(np.cumsum([0, *counts]).astype(np.int32)),
            max_seqlen_k=max_seqlen_k,
        )

    def key_slots(self, token: int) -> np.ndarray:
        """int64 [window of the token]; the slots of the keys it sees, in order."""
        position = np.arange(self.window[token])
        blocks = self.block_tables[self.batch_ids[token], position // self.block_size]
        return blocks.astype(np.int64) * self.block_size + position % self.block_size

    def seen_slots(self) -> np.ndarray:
        """Slots that any token sees."""
        slots = [self.key_slots(t) for t in range(self.num_tokens) if self.window[t]]
        return np.unique(np.concatenate(slots))


def paged_rows(
    rows: tuple[tuple[int, int], ...], block_size: int, *, num_padded: int = 3, seed: int = 0
) -> PagedRows:
    """A step of `rows` (cached, new) and `num_padded` padded tokens."""
    rng = np.random.default_rng(seed)
    counts = [-(-(cached + new) // block_size) for cached, new in rows]
    num_blocks = sum(counts) + 4
    blocks = rng.permutation(num_blocks)[: sum(counts)]
    tables = np.full((len(rows), max(counts) + 2), -1, np.int32)
    start = 0
    for b, count in enumerate(counts):
        tables[b, :count] = blocks[start : start + count]
        start += count
    positions = [np.arange(cached, cached + new) for cached, new in rows]
    batch_ids = np.repeat(np.arange(len(rows)), [new for _, new in rows])
    padding = np.zeros(num_padded, np.int64)
    position_ids = np.concatenate([*positions, padding]).astype(np.int64)
    batch_ids = np.concatenate([batch_ids, padding - 1]).astype(np.int32)
    window = np.where(batch_ids < 0, 0, position_ids + 1)
    return PagedRows(position_ids, batch_ids, tables, window, num_blocks, block_size)
