"""Memory of the pools of DeepSeek-V4's layers."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fd_dsa.cache_formats import V4CacheLayout


@dataclass(frozen=True, slots=True)
class LayerPools:
    """Pools of one layer in float32, with the contents of `fd_dsa.cache_formats.PooledLayer`.

    Attributes:
        keys: [num_blocks * (block_size + entries of a block), head_dim].
        index_entries: [num_blocks, entries of a block, index_head_dim]; None without an indexer.
        states: [num_rows * pooled tokens, halves, 2, width]; None in a window-only layer.
        records: [num_blocks, ratio, 2, width]; None except in a CSA layer.
    """

    keys: np.ndarray
    index_entries: np.ndarray | None = None
    states: np.ndarray | None = None
    records: np.ndarray | None = None


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
