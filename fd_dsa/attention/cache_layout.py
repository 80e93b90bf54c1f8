"""Layouts of the two paged caches: MLA latents and indexer keys.

Both caches share block ids, block size and slot_mapping. Shapes have FastDeploy's rank and order
(docs/concepts/dsa.md, "Caches"), so a block is contiguous:

    latent  [num_blocks, 1, block_size, row]
    indexer [num_blocks, block_size, row]

A row counts values, of fp8_ds_mla bytes: 656 and 132. There an indexer block is planar, all codes
before all scales, so its last axis is no record of a token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from fd_dsa.config import FP8_BLOCK_SIZE
from fd_dsa.errors import ConfigError
from fd_dsa.ops.fp8 import (
    INDEX_RECORD_BYTES,
    INDEX_WIDTH,
    LATENT_RECORD_BYTES,
    LATENT_WIDTH,
    ROPE_WIDTH,
    check_scale_fmt,
)

# bfloat16 is held as its bits: neither NumPy nor Paddle's CPU build computes with it
_STORAGE: dict[str, np.dtype[Any]] = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(np.int16),
    "fp8_ds_mla": np.dtype(np.uint8),
}
_FP8_FIELDS = {
    "block_size": FP8_BLOCK_SIZE,
    "kv_lora_rank": LATENT_WIDTH,
    "qk_rope_head_dim": ROPE_WIDTH,
    "index_head_dim": INDEX_WIDTH,
}


@dataclass(frozen=True, slots=True)
class CacheLayout:
    """Format of the caches of one model; keys are written and read by one object, never two.

    Attributes:
        kv_cache_dtype: "float32", "bfloat16" or "fp8_ds_mla".
        block_size: tokens of a block.
        kv_lora_rank, qk_rope_head_dim, index_head_dim: widths, in values.
        index_scale_fmt: scales of e4m3 index keys and queries: "ue8m0", powers of two, or None.
        index_hadamard: whether index keys and queries are turned by a Hadamard matrix, as in
            DeepSeek's own inference code.

    Raises:
        ConfigError: a value without a layout here; fp8_ds_mla has blocks of 64 tokens and widths
            of 512, 64 and 128 alone.
    """

    kv_cache_dtype: str
    block_size: int
    kv_lora_rank: int
    qk_rope_head_dim: int
    index_head_dim: int
    index_scale_fmt: str | None = "ue8m0"
    index_hadamard: bool = False

    def __post_init__(self) -> None:
        if self.kv_cache_dtype not in _STORAGE:
            raise ConfigError(
                f"kv_cache_dtype: {self.kv_cache_dtype!r} has no cache layout, allowed are "
                f"{', '.join(_STORAGE)}"
            )
        check_scale_fmt("index_scale_fmt", self.index_scale_fmt)
        if self.index_hadamard and self.index_head_dim != INDEX_WIDTH:
            raise ConfigError(
                f"index_head_dim: got {self.index_head_dim}, index_hadamard allows {INDEX_WIDTH} "
                "alone; leave index_hadamard off"
            )
        for name, allowed in _FP8_FIELDS.items() if self.is_fp8 else ():
            value = getattr(self, name)
            if value != allowed:
                raise ConfigError(
                    f"{name}: got {value}, an fp8_ds_mla cache allows {allowed} alone; take a "
                    "bfloat16 cache"
                )

    @property
    def is_fp8(self) -> bool:
        """Whether latents and index keys are e4m3 with scales."""
        return self.kv_cache_dtype == "fp8_ds_mla"

    @property
    def storage_dtype(self) -> np.dtype[Any]:
        """Dtype of the memory: float32, int16 which holds bfloat16 bits, or bytes."""
        return _STORAGE[self.kv_cache_dtype]

    @property
    def latent_row(self) -> int:
        """Elements of a token in a latent cache."""
        return LATENT_RECORD_BYTES if self.is_fp8 else self.kv_lora_rank + self.qk_rope_head_dim

    @property
    def indexer_row(self) -> int:
        """Elements of a token in an indexer cache."""
        return INDEX_RECORD_BYTES if self.is_fp8 else self.index_head_dim

    def latent_shape(self, num_blocks: int) -> list[int]:
        return [num_blocks, 1, self.block_size, self.latent_row]

    def indexer_shape(self, num_blocks: int) -> list[int]:
        return [num_blocks, self.block_size, self.indexer_row]

    def bytes_per_block(self, num_layers: int, num_indexer_layers: int) -> int:
        """Bytes of one block over all layers; layers that share a selection have no indexer."""
        row = self.latent_row * num_layers + self.indexer_row * num_indexer_layers
        return row * self.block_size * self.storage_dtype.itemsize

    def allocate(self, shape: list[int]) -> Any:
        """Zeroed Paddle CPU tensor whose pages are taken from the system when first written."""
        from paddle.utils.dlpack import from_dlpack

        return from_dlpack(np.zeros(shape, self.storage_dtype))
