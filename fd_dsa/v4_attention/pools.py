"""Memory that DeepSeek-V4's layers keep between steps, and its size in bytes.

    pool            rows                                   kept
    keys            window keys, then compressed entries   in blocks
    index_entries   the indexer's entries                  in blocks
    records         sources of a block's last tokens       in blocks
    states          sources that wait to be pooled         in slots, one a row of the batch

A block found in the prefix cache includes its keys, its entries and its record. The record restores
the state of a row after the block. From each source it stores the half that the next entry pools.
An HCA entry does not depend on tokens before its block.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from fd_dsa.errors import ConfigError
from fd_dsa.models.deepseek_v4.config import CSA, WINDOW, DeepseekV4Config

_VALUE_BYTES = 4


@dataclass(frozen=True, slots=True)
class LayerPools:
    """The memory of one layer, float32.

    Attributes:
        keys: [num_blocks * (block_size + entries of a block), head_dim].
        index_entries: [num_blocks, entries of a block, index_head_dim], None without an indexer.
        states: [num_slots * pooled tokens, halves, 2, width], None in a window-only layer.
        records: [num_blocks, ratio, 2, width], only for CSA.
    """

    keys: np.ndarray
    index_entries: np.ndarray | None = None
    states: np.ndarray | None = None
    records: np.ndarray | None = None


class V4CacheLayout:
    """Shapes and sizes of the pools of a model.

    Raises:
        ConfigError: a block would not hold whole entries.
    """

    def __init__(self, config: DeepseekV4Config, block_size: int) -> None:
        self.config, self.block_size = config, block_size
        whole = math.lcm(*config.compress_rates.values())
        if block_size % whole:
            rates = " and ".join(map(str, config.compress_rates.values()))
            raise ConfigError(
                f"--block-size: got {block_size}, allowed: multiples of {whole}, so that a block "
                f"holds whole entries of {rates} tokens; give {-(-block_size // whole) * whole}"
            )

    def bytes_per_block(self) -> int:
        return self._bytes(num_blocks=1, num_slots=0)

    def bytes_per_slot(self) -> int:
        """Return the bytes of one row's states over all layers."""
        return self._bytes(num_blocks=0, num_slots=1)

    def allocate(self, num_blocks: int, num_slots: int) -> list[LayerPools]:
        """Return the pools of every layer, filled with zeros."""
        return [
            LayerPools(**{name: np.zeros(shape, np.float32) for name, shape in shapes.items()})
            for shapes in self._shapes(num_blocks, num_slots)
        ]

    def _bytes(self, num_blocks: int, num_slots: int) -> int:
        """Return the bytes of the pools for these numbers of blocks and slots."""
        layers = self._shapes(num_blocks, num_slots)
        values = sum(math.prod(shape) for shapes in layers for shape in shapes.values())
        return _VALUE_BYTES * values

    def _shapes(self, num_blocks: int, num_slots: int) -> list[dict[str, tuple[int, ...]]]:
        """Return the shapes of the pools of every layer. See `LayerPools`."""
        return [self._layer(kind, num_blocks, num_slots) for kind in self.config.layer_types]

    def _layer(self, kind: str, num_blocks: int, num_slots: int) -> dict[str, tuple[int, ...]]:
        config, rows = self.config, self.block_size
        if kind == WINDOW:
            return {"keys": (num_blocks * rows, config.head_dim)}
        ratio, width = config.compress_rates[kind], config.head_dim
        entries = rows // ratio
        shapes: dict[str, tuple[int, ...]] = {"keys": (num_blocks * (rows + entries), width)}
        if kind != CSA:
            return shapes | {"states": (num_slots * ratio, 1, 2, width)}
        width += config.index_head_dim
        return shapes | {
            "index_entries": (num_blocks, entries, config.index_head_dim),
            "states": (num_slots * 2 * ratio, 2, 2, width),
            "records": (num_blocks, ratio, 2, width),
        }
