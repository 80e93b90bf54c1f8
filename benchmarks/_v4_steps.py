"""Decode steps of DeepSeek-V4 for benchmarks: sizes, and rows whose contexts grow."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from fd_dsa.v4_prepare import V4PrepareConfig

Array = np.ndarray

BATCHES = (1, 32, 128, 256)
CONTEXTS = (1024, 8192, 131072)
DRAFTS = (0, 1, 3)
# V4-Flash: https://huggingface.co/deepseek-ai
WINDOW_SIZE, BLOCK_SIZE, INDEX_TOPK = 128, 128, 512
CSA_RATIO, HCA_RATIO = 4, 128
# steps of one measurement, and the longest context with room for them
NUM_STEPS = 200
MAX_MODEL_LEN = CONTEXTS[-1] + 4096


@dataclass(frozen=True)
class Size:
    """Rows, tokens of context around which they decode, and drafts a row and step."""

    batch: int
    context: int
    drafts: int

    @property
    def label(self) -> str:
        """For example "128 x 8k, MTP 1"."""
        return f"{self.batch} x {self.context // 1024}k, MTP {self.drafts}"


def sizes() -> Iterator[Size]:
    """Yield all sizes, in groups with the same configuration."""
    for batch in BATCHES:
        for drafts in DRAFTS:
            for context in CONTEXTS:
                yield Size(batch, context, drafts)


def config_of(
    batch: int, drafts: int, max_model_len: int = MAX_MODEL_LEN, **changes: Any
) -> V4PrepareConfig:
    """Return the sizes of graphs of `batch` rows with `drafts` drafts each, for V4-Flash."""
    max_blocks = -(-max_model_len // BLOCK_SIZE)
    values = {
        "window_size": WINDOW_SIZE,
        "spec_tokens": drafts,
        "block_size": BLOCK_SIZE,
        "csa_ratio": CSA_RATIO,
        "hca_ratio": HCA_RATIO,
        "index_topk": INDEX_TOPK,
        "num_slots": batch,
        "num_blocks": batch * max_blocks,
        "max_blocks_per_seq": max_blocks,
        "max_num_seqs": batch,
        "max_num_tokens": batch * (drafts + 1),
        "max_tokens_per_seq": drafts + 1,
        "max_model_len": max_model_len,
    }
    return V4PrepareConfig(**values | changes)


@lru_cache(maxsize=4)
def shuffled(count: int, seed: int) -> Array:
    """Return the numbers below `count` in a fixed random order, int32."""
    return np.random.default_rng(seed).permutation(count).astype(np.int32)


class Decode:
    """Rows that decode `drafts + 1` tokens a step, all drafts kept, in blocks at random places.

    The contexts differ from row to row by up to a block, and reach `context` on average in the
    middle of `NUM_STEPS` steps.

    Args:
        config: sizes; a step has `max_num_seqs` rows.
        context: tokens.
        seed: seed of the order of blocks and slots.

    Attributes:
        ctx, q, slot: int32 [B].
        block_table: int32 [B, max_blocks_per_seq]; -1 past a row's own blocks.
    """

    def __init__(self, config: V4PrepareConfig, context: int, seed: int = 0) -> None:
        batch, columns = config.max_num_seqs, config.max_blocks_per_seq
        tokens = config.spec_tokens + 1
        self._block_size = config.block_size
        blocks = shuffled(config.num_blocks, seed)[: batch * columns]
        self._blocks = blocks.reshape(batch, columns)
        # rows cross the ends of their blocks at different steps
        spread = (np.arange(batch) * 37) % self._block_size - self._block_size // 2
        first = context - NUM_STEPS // 2 * tokens + (spread if batch > 1 else 0)
        self.ctx = np.full(batch, 0, np.int32) + np.maximum(first, tokens).astype(np.int32)
        self.q = np.full(batch, tokens, np.int32)
        self.slot = shuffled(config.num_slots, seed)[:batch]
        self.block_table = np.full((batch, columns), -1, np.int32)
        for row, count in enumerate(self._num_blocks()):
            self.block_table[row, :count] = self._blocks[row, :count]

    def inputs(self) -> tuple[Array, Array, Array]:
        """Return ctx, q and slot, int32 [B]: the same arrays in every step."""
        return self.ctx, self.q, self.slot

    def advance(self) -> tuple[list[int], list[int]]:
        """Go to the next step. Returns the rows that get a block for it, and their blocks."""
        before = self._num_blocks()
        self.ctx += self.q
        rows = np.nonzero(self._num_blocks() > before)[0]
        blocks = self._blocks[rows, before[rows]]
        self.block_table[rows, before[rows]] = blocks
        return rows.tolist(), blocks.tolist()

    def _num_blocks(self) -> Array:
        """Return blocks that each row's context needs."""
        return -(-self.ctx // self._block_size)
