"""Memory of the pools of DeepSeek-V4's layers, and sizes of the index arrays of a step."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fd_dsa.cache_formats import V4CacheLayout
from fd_dsa.models.deepseek_v4.config import CSA, HCA, DeepseekV4Config
from fd_dsa.runner.input_batch import InputBatch
from fd_dsa.v4_prepare import V4PrepareConfig


@dataclass(frozen=True, slots=True)
class LayerPools:
    """Pools of one layer in float32, with the contents of `fd_dsa.cache_formats.PooledLayer`.

    Attributes:
        keys: [num_blocks * (block_size + entries of a block), head_dim].
        index_entries: [num_blocks, entries of a block, index_head_dim]; None without an indexer.
        states: [num_rows * (pooled tokens + max_drafts), halves, 2, width]; None in a window-only
            layer.
        records: [num_blocks, ratio, 2, width]; None except in a CSA layer.
    """

    keys: np.ndarray
    index_entries: np.ndarray | None = None
    states: np.ndarray | None = None
    records: np.ndarray | None = None

    def by_block(self, num_blocks: int, block_size: int) -> list[np.ndarray]:
        """Return views of the pools in blocks, [num_blocks, ...] each."""
        windows = num_blocks * block_size
        parts = self.keys[:windows], self.keys[windows:], self.index_entries, self.records
        return [part.reshape(num_blocks, -1) for part in parts if part is not None and part.size]


def allocate_pools(layout: V4CacheLayout, num_blocks: int, num_rows: int) -> list[LayerPools]:
    """Return zeroed pools of every layer.

    Args:
        num_blocks: blocks of each pool that is kept in blocks.
        num_rows: rows of the batch.
    """
    return [
        LayerPools(**{name: np.zeros(shape, np.float32) for name, shape in shapes.items()})
        for shapes in layout.shapes(num_blocks, num_rows)
    ]


def prepare_sizes(
    config: DeepseekV4Config, batch: InputBatch, num_blocks: int, max_drafts: int = 0
) -> V4PrepareConfig:
    """Return the sizes of the index arrays of a step, with window keys in blocks.

    Args:
        num_blocks: blocks of the pools, of `batch.block_size` tokens.
        max_drafts: maximum number of drafts of a row.
    """
    columns = batch.block_tables.shape[1]
    return V4PrepareConfig(
        window_size=config.sliding_window,
        spec_tokens=max_drafts,
        block_size=batch.block_size,
        csa_ratio=config.compress_rates[CSA],
        hca_ratio=config.compress_rates[HCA],
        index_topk=config.index_topk,
        num_slots=batch.max_num_seqs,
        num_blocks=num_blocks,
        max_blocks_per_seq=columns,
        max_num_seqs=batch.max_num_seqs,
        max_num_tokens=batch.max_num_tokens,
        max_tokens_per_seq=batch.max_num_tokens,
        max_model_len=columns * batch.block_size,
        swa="paged",
        # the rows of entries come from the block table, also for the indexer's scan
        hca_mode="table",
    )
