"""Layouts of the two paged caches: MLA latents and indexer keys.

Both caches share block ids, block size and slot_mapping. Shapes have FastDeploy's rank and order
(docs/concepts/dsa.md, "Caches"), so a block is contiguous and a slot is a row of the flattened
cache:

    latent  [num_blocks, 1, block_size, kv_lora_rank + qk_rope_head_dim]
    indexer [num_blocks, block_size, index_head_dim]
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from fd_dsa.errors import ConfigError

# bfloat16 is held as its bits: neither NumPy nor Paddle's CPU build computes with it
_STORAGE = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(np.int16)}


@dataclass(frozen=True, slots=True)
class CacheLayout:
    """Shapes and bytes of the caches of one model.

    Attributes:
        kv_cache_dtype: "float32" or "bfloat16".
        block_size: tokens of a block.
        kv_lora_rank, qk_rope_head_dim, index_head_dim: widths, in values.

    Raises:
        ConfigError: a dtype without a layout here.
    """

    kv_cache_dtype: str
    block_size: int
    kv_lora_rank: int
    qk_rope_head_dim: int
    index_head_dim: int

    def __post_init__(self) -> None:
        if self.kv_cache_dtype not in _STORAGE:
            raise ConfigError(
                f"kv_cache_dtype: {self.kv_cache_dtype!r} has no cache layout, allowed are "
                f"{', '.join(_STORAGE)}"
            )

    @property
    def storage_dtype(self) -> np.dtype:
        """Dtype of the memory: float32, or int16 which holds bfloat16 bits."""
        return _STORAGE[self.kv_cache_dtype]

    @property
    def latent_width(self) -> int:
        """Values of a latent row."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    def latent_shape(self, num_blocks: int) -> list[int]:
        """Shape of one layer's latent cache."""
        return [num_blocks, 1, self.block_size, self.latent_width]

    def indexer_shape(self, num_blocks: int) -> list[int]:
        """Shape of one layer's indexer cache."""
        return [num_blocks, self.block_size, self.index_head_dim]

    def bytes_per_block(self, num_layers: int, num_indexer_layers: int) -> int:
        """Bytes of one block over all layers; layers that share a selection have no indexer."""
        values = self.latent_width * num_layers + self.index_head_dim * num_indexer_layers
        return values * self.block_size * self.storage_dtype.itemsize

    def allocate(self, shape: list[int]) -> Any:
        """Zeroed Paddle CPU tensor whose pages are taken from the system when first written."""
        from paddle.utils.dlpack import from_dlpack

        return from_dlpack(np.zeros(shape, self.storage_dtype))
