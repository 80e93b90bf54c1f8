"""Steps of random rows for the tests of kernels that work on pages."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
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
        first: int64 [num_tokens]; position of the first key that a token sees.
        new_prompts: int32 [num_rows]; new tokens of a prompt row, 0 of any other.
        offsets: int32 [2 * num_tokens]; windows of the prompt rows. None: all rows decode.
    """

    position_ids: np.ndarray
    batch_ids: np.ndarray
    block_tables: np.ndarray
    window: np.ndarray
    num_blocks: int
    block_size: int
    first: np.ndarray
    new_prompts: np.ndarray
    offsets: np.ndarray | None = None

    @property
    def num_tokens(self) -> int:
        """Tokens, padding included."""
        return len(self.batch_ids)

    def meta(self, m: KernelMemory, max_seqlen_k: int = 1 << 30) -> Any:
        """Copy the fields of a ForwardMeta that kernels read to a memory."""
        counts = np.bincount(self.batch_ids[self.batch_ids >= 0], minlength=len(self.block_tables))
        has_prompts = self.offsets is not None
        return SimpleNamespace(
            position_ids=m.put(self.position_ids),
            batch_id_per_token=m.put(self.batch_ids),
            block_tables=m.put(self.block_tables),
            cu_seqlens_q=m.put(np.cumsum([0, *counts]).astype(np.int32)),
            max_seqlen_k=max_seqlen_k,
            num_prefill_tokens=int(self.new_prompts.sum()),
            seq_lens_encoder=m.put(self.new_prompts),
            indexer_attn_mask_offsets=m.put(self.offsets) if has_prompts else None,
            cu_seqlens_kg=m.put(self.key_starts()) if has_prompts else None,
        )

    def key_starts(self) -> np.ndarray:
        """int32 [num_rows + 1]: gathered keys before each row, of a prompt row all of its keys."""
        starts = [0]
        for row, new in enumerate(self.new_prompts.tolist()):
            positions = self.position_ids[self.batch_ids == row]
            starts.append(starts[-1] + (int(positions[-1]) + 1 if new else len(positions)))
        return np.array(starts, np.int32)

    def with_windows(self, prompts: Iterable[int], seed: int = 0) -> PagedRows:
        """The same step with rows that are prompts, whose tokens have random windows.

        Windows are whole, empty, anywhere in the row's keys, or reach past both ends of them.
        """
        rng, new = np.random.default_rng(seed), np.zeros(len(self.block_tables), np.int32)
        for row in prompts:
            new[row] = (self.batch_ids == row).sum()
        made = replace(self, new_prompts=new, first=self.first.copy(), window=self.window.copy())
        offsets, starts = np.zeros((self.num_tokens, 2), np.int32), made.key_starts().tolist()
        for token in np.flatnonzero(np.isin(self.batch_ids, np.flatnonzero(new))):
            start, end = starts[self.batch_ids[token] :][:2]
            count, kind = end - start, rng.integers(5)
            inside = rng.integers(0, count + 1, 2)
            begin, stop = [
                (0, self.position_ids[token] + 1), inside, sorted(inside), (-77, count + 9),
                (-77, -77),
            ][kind]  # fmt: skip
            offsets[token] = start + begin, start + stop
            made.first[token] = min(max(begin, 0), count)
            made.window[token] = max(min(stop, count) - made.first[token], 0)
        return replace(made, offsets=offsets.ravel())

    def key_slots(self, token: int) -> np.ndarray:
        """Return the slots of the keys that a token sees, in order: int64 [window]."""
        position = self.first[token] + np.arange(self.window[token])
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
    no_prompts = np.zeros(len(rows), np.int32)
    tokens = position_ids, batch_ids, tables, window
    return PagedRows(*tokens, num_blocks, block_size, np.zeros_like(window), no_prompts)
