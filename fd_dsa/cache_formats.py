"""Cache formats: bytes of a token, their order, dtypes and readers.

The memory plan, the caches and the Python side of the kernels take every size from here.
`custom_ops/csrc/cache_record.h` repeats the FP8 constants for C++, and a test compares the two.

DeepSeek-V3.2 and GLM-5 have two paged caches per layer, which share block ids, block size and
`slot_mapping` (slot = block * block_size + offset). The shapes are FastDeploy's, and each block is
contiguous:

    latent   [num_blocks, 1, block_size, row]
    indexer  [num_blocks, block_size, row]

    format     | row of the latent cache    | row of the indexer cache | dtype: CPU, device
    float32    | kv_lora_rank + rope values | index_head_dim values    | float32, float32
    bfloat16   | kv_lora_rank + rope values | index_head_dim values    | int16 (bits), bfloat16
    fp8_ds_mla | 656 bytes                  | 132 bytes                | uint8, uint8

    fp8_ds_mla latent record | 512 e4m3 codes, 4 float32 scales (one per 128 codes), 64 bfloat16
    fp8_ds_mla indexer block | 64 * 128 e4m3 codes, then 64 float32 scales: no record of a token

    cache   | written by   | read by
    latent  | write_caches | sparse_mla, dequantize, attention of prompts
    indexer | write_caches | indexer_logits

DeepSeek-V4 has up to four float32 pools per layer on a CPU, see `PooledLayer`, and others on a
device (`fd_dsa.v4_attention.device_pools`). Its own backends read and write them. In fp8_ds_mla a
device has, for keys of 512 values with 64 rotated ones:

    key or entry of a layer        | 448 e4m3 codes, 64 bfloat16, 8 exponents of scales: 584 bytes
    block of the indexer's entries | 64 * 128 e4m3 codes, then 64 float32 scales

Source: FlashMLA (README, "FP8 KV cache") and DeepGEMM's paged index cache for fp8_ds_mla. Records
of DeepSeek-V4 have the fields of FlashMLA's, whose order inside a block differs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fd_dsa.errors import ConfigError

# fp8_ds_mla, in values
LATENT_WIDTH, ROPE_WIDTH, INDEX_WIDTH, TILE_WIDTH = 512, 64, 128, 128
LATENT_TILES = LATENT_WIDTH // TILE_WIDTH
# fp8_ds_mla, offsets and sizes in bytes
LATENT_SCALES_AT = LATENT_WIDTH
LATENT_ROPE_AT = LATENT_SCALES_AT + 4 * LATENT_TILES
LATENT_RECORD_BYTES = LATENT_ROPE_AT + 2 * ROPE_WIDTH
INDEX_RECORD_BYTES = INDEX_WIDTH + 4
FP8_BLOCK_SIZE = 64
"""Tokens in a block of an fp8_ds_mla cache."""


def v4_record_bytes(width: int, rope_width: int) -> int:
    """Return the bytes of the FP8 record of a key of DeepSeek-V4.

    Args:
        width: values of a key, a multiple of `rope_width`.
        rope_width: rotated channels.
    """
    return width + rope_width + width // rope_width


@dataclass(frozen=True, slots=True)
class CacheFormat:
    """A storage format of the latent and indexer caches.

    Attributes:
        name: value of `--kv-cache-dtype`.
        host_dtype: NumPy dtype of the memory on a CPU. bfloat16 is held as its bits, because
            neither NumPy nor Paddle's CPU build computes with it.
        device_dtype: Paddle dtype of the memory on a device.
        itemsize: bytes of an element.
        is_fp8: True for e4m3 codes with scales.
        aliases: other values of the flag with the same meaning.
        required: the only value of each field of the model or flag, empty = any value.
    """

    name: str
    host_dtype: str
    device_dtype: str
    itemsize: int
    is_fp8: bool = False
    aliases: tuple[str, ...] = ()
    required: Mapping[str, int] = field(default_factory=dict)

    @property
    def dtypes(self) -> tuple[str, ...]:
        """Dtypes that a cache may have: the host's, then the device's."""
        return tuple(dict.fromkeys((self.host_dtype, self.device_dtype)))

    def latent_row(self, key_width: int) -> int:
        """Return the elements of a token in a latent cache.

        Args:
            key_width: values of a key, kv_lora_rank + qk_rope_head_dim.
        """
        return LATENT_RECORD_BYTES if self.is_fp8 else key_width

    def indexer_row(self, key_width: int) -> int:
        """Return the elements of a token in an indexer cache.

        Args:
            key_width: values of a key, index_head_dim.
        """
        return INDEX_RECORD_BYTES if self.is_fp8 else key_width


CACHE_FORMATS = {
    one.name: one
    for one in (
        CacheFormat("float32", "float32", "float32", 4),
        CacheFormat("bfloat16", "int16", "bfloat16", 2),
        CacheFormat(
            "fp8_ds_mla",
            "uint8",
            "uint8",
            1,
            is_fp8=True,
            aliases=("fp8", "fp8_e4m3"),
            required={
                "block_size": FP8_BLOCK_SIZE,
                "kv_lora_rank": LATENT_WIDTH,
                "qk_rope_head_dim": ROPE_WIDTH,
                "index_head_dim": INDEX_WIDTH,
            },
        ),
    )
}
"""The formats by name."""
FORMAT_OF_DTYPE = {dtype: one for one in CACHE_FORMATS.values() for dtype in one.dtypes}
"""The format of a cache by the name of its dtype."""


def check_scale_fmt(name: str, value: object) -> None:
    """Raise ConfigError unless `value` is a form of the indexer's scales."""
    if value not in (None, "ue8m0"):
        raise ConfigError(f"{name}: got {value!r}, allowed are 'ue8m0' and None")


@dataclass(frozen=True, slots=True)
class CacheLayout:
    """Layout of the latent and indexer caches of one model.

    The same object describes a key to its writer and to its readers.

    Attributes:
        kv_cache_dtype: name of a `CacheFormat`.
        block_size: tokens of a block.
        kv_lora_rank, qk_rope_head_dim, index_head_dim: widths, in values.
        index_scale_fmt: form of the scales of e4m3 index keys and queries, "ue8m0" (powers of
            two) or None (float32).
        index_hadamard: rotate index keys and queries by a Hadamard matrix, as DeepSeek's own
            inference code does.

    Raises:
        ConfigError: an unknown format, or a value that the format does not allow.
    """

    kv_cache_dtype: str
    block_size: int
    kv_lora_rank: int
    qk_rope_head_dim: int
    index_head_dim: int
    index_scale_fmt: str | None = "ue8m0"
    index_hadamard: bool = False

    def __post_init__(self) -> None:
        if self.kv_cache_dtype not in CACHE_FORMATS:
            raise ConfigError(
                f"kv_cache_dtype: got {self.kv_cache_dtype!r}; must be one of "
                f"{', '.join(CACHE_FORMATS)}"
            )
        check_scale_fmt("index_scale_fmt", self.index_scale_fmt)
        if self.index_hadamard and self.index_head_dim != INDEX_WIDTH:
            raise ConfigError(
                f"index_head_dim: got {self.index_head_dim}; must be {INDEX_WIDTH} with "
                "index_hadamard; leave index_hadamard off"
            )
        for name, allowed in self.format.required.items():
            value = getattr(self, name)
            if value != allowed:
                raise ConfigError(
                    f"{name}: got {value}; must be {allowed} with an fp8_ds_mla cache; use a "
                    "bfloat16 cache"
                )

    @property
    def format(self) -> CacheFormat:
        """Storage format of both caches."""
        return CACHE_FORMATS[self.kv_cache_dtype]

    @property
    def is_fp8(self) -> bool:
        """True if latents and index keys are e4m3 codes with scales."""
        return self.format.is_fp8

    @property
    def latent_row(self) -> int:
        """Elements of a token in a latent cache."""
        return self.format.latent_row(self.kv_lora_rank + self.qk_rope_head_dim)

    @property
    def indexer_row(self) -> int:
        """Elements of a token in an indexer cache."""
        return self.format.indexer_row(self.index_head_dim)

    def latent_shape(self, num_blocks: int) -> list[int]:
        """Return the shape of a layer's latent cache."""
        return [num_blocks, 1, self.block_size, self.latent_row]

    def indexer_shape(self, num_blocks: int) -> list[int]:
        """Return the shape of a layer's indexer cache."""
        return [num_blocks, self.block_size, self.indexer_row]

    def bytes_per_block(self, num_layers: int, num_indexer_layers: int) -> int:
        """Return the bytes of one block over all layers.

        Args:
            num_layers: layers with a latent cache.
            num_indexer_layers: layers with an indexer cache. A layer that shares a selection has
                no indexer.
        """
        row = self.latent_row * num_layers + self.indexer_row * num_indexer_layers
        return row * self.block_size * self.format.itemsize

    def allocate(self, shape: list[int]) -> Any:
        """Return a zeroed Paddle CPU tensor.

        The system provides each page when it is first written.
        """
        import numpy as np
        from paddle.utils.dlpack import from_dlpack

        return from_dlpack(np.zeros(shape, self.format.host_dtype))


@dataclass(frozen=True, slots=True)
class PooledLayer:
    """Pools of one DeepSeek-V4 layer, float32.

        pool          | rows                                 | kept
        keys          | window keys, then compressed entries | in blocks
        index_entries | the indexer's entries                | in blocks
        records       | sources of a block's last tokens     | in blocks
        states        | sources that wait to be pooled       | in rows of the batch

    A block of the prefix cache has its keys, its entries and its record. The record is the state of
    a row after the block. It has the half of each source that the next entry pools. An HCA entry
    pools only tokens of its own block, so HCA layers have no records.

    Attributes:
        head_dim: values of a key.
        entry_tokens: tokens of a compressed entry, 0 = a layer with window keys only.
        index_head_dim: values of an entry of the indexer, 0 = a layer without an indexer (HCA).
    """

    head_dim: int
    entry_tokens: int = 0
    index_head_dim: int = 0

    def shapes(
        self, block_size: int, num_blocks: int, num_rows: int, max_drafts: int
    ) -> dict[str, tuple[int, ...]]:
        """Return the shape of each pool that the layer has.

        Args:
            block_size: tokens of a block, a multiple of `entry_tokens`.
            num_blocks: blocks of the pools in blocks.
            num_rows: rows of the batch, each with a state.
            max_drafts: maximum number of drafts of a row. Sources of drafts that are rejected must
                not take the places of those that the next entry pools.
        """
        ratio, width = self.entry_tokens, self.head_dim
        if not ratio:
            return {"keys": (num_blocks * block_size, width)}
        entries = block_size // ratio
        shapes: dict[str, tuple[int, ...]] = {"keys": (num_blocks * (block_size + entries), width)}
        if not self.index_head_dim:
            return shapes | {"states": (num_rows * (ratio + max_drafts), 1, 2, width)}
        width += self.index_head_dim
        return shapes | {
            "index_entries": (num_blocks, entries, self.index_head_dim),
            # a CSA entry also pools the tokens of the previous entry
            "states": (num_rows * (2 * ratio + max_drafts), 2, 2, width),
            "records": (num_blocks, ratio, 2, width),
        }


@dataclass(frozen=True, slots=True)
class V4CacheLayout:
    """Layout of the pools of a DeepSeek-V4 model.

    Attributes:
        layers: the pools of each layer.
        compress_rates: tokens of a compressed entry, by kind of layer.
        block_size: tokens of a block.
        max_drafts: maximum number of drafts of a row.

    Raises:
        ConfigError: a block does not hold whole entries.
    """

    layers: tuple[PooledLayer, ...]
    compress_rates: tuple[int, ...]
    block_size: int
    max_drafts: int = 0

    def __post_init__(self) -> None:
        whole = math.lcm(*self.compress_rates)
        if self.block_size % whole:
            rates = " and ".join(map(str, self.compress_rates))
            raise ConfigError(
                f"--block-size: got {self.block_size}, allowed: multiples of {whole}, so that a "
                f"block holds whole entries of {rates} tokens; give "
                f"{-(-self.block_size // whole) * whole}"
            )

    def bytes_per_block(self) -> int:
        """Return the bytes of one block over all layers."""
        return self._bytes(num_blocks=1, num_rows=0)

    def bytes_per_row(self) -> int:
        """Return the bytes of the states of one row of the batch over all layers."""
        return self._bytes(num_blocks=0, num_rows=1)

    def shapes(self, num_blocks: int, num_rows: int) -> list[dict[str, tuple[int, ...]]]:
        """Return the shapes of the pools of every layer, see `PooledLayer.shapes`."""
        sizes = self.block_size, num_blocks, num_rows, self.max_drafts
        return [one.shapes(*sizes) for one in self.layers]

    def _bytes(self, num_blocks: int, num_rows: int) -> int:
        layers = self.shapes(num_blocks, num_rows)
        values = sum(math.prod(shape) for pools in layers for shape in pools.values())
        return CACHE_FORMATS["float32"].itemsize * values
