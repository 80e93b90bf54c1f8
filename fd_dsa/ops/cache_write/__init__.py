"""Write this step's keys of a layer into its two paged caches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fd_dsa.cache_formats import (
    CACHE_FORMATS,
    INDEX_WIDTH,
    LATENT_WIDTH,
    ROPE_WIDTH,
    check_scale_fmt,
)
from fd_dsa.errors import ConfigError, ShapeError
from fd_dsa.ops.arrays import check_array, check_dtype, check_rope, check_shape
from fd_dsa.ops.providers import activation_dtypes, serving
from fd_dsa.tensor import Array

__all__ = ["CacheWriteParams", "write_caches"]

_NAME = "write_caches"


@dataclass(frozen=True, slots=True)
class CacheWriteParams:
    """What `write_caches` does to the keys of a layer before they are stored.

    Attributes:
        kv_cache_dtype: "float32", "bfloat16" or "fp8_ds_mla".
        kv_norm_weight: float32 [kv_lora_rank], RMSNorm of the latent; None = already normed.
        kv_norm_eps: added to the mean square.
        k_norm_weight, k_norm_bias: float32 [index_head_dim], LayerNorm of the index key; None =
            already normed.
        k_norm_eps: added to the variance.
        index_rope_interleave: pairing of the index key's RoPE; the latent's is interleaved.
        index_hadamard: rotate the index key by a 128-point Walsh-Hadamard matrix.
        index_scale_fmt: scales of the index keys in an fp8_ds_mla cache: "ue8m0" or None.

    `index_hadamard` and `index_scale_fmt` must be those of the queries that read the cache.

    Raises:
        ConfigError: an unknown kv_cache_dtype or index_scale_fmt, or k_norm_weight without
            k_norm_bias.
    """

    kv_cache_dtype: str
    kv_norm_weight: Any = None
    kv_norm_eps: float = 1e-6
    k_norm_weight: Any = None
    k_norm_bias: Any = None
    k_norm_eps: float = 1e-6
    index_rope_interleave: bool = False
    index_hadamard: bool = False
    index_scale_fmt: str | None = "ue8m0"

    def __post_init__(self) -> None:
        if self.kv_cache_dtype not in CACHE_FORMATS:
            raise ConfigError(
                f"kv_cache_dtype: got {self.kv_cache_dtype!r}, allowed are "
                f"{', '.join(CACHE_FORMATS)}"
            )
        check_scale_fmt("index_scale_fmt", self.index_scale_fmt)
        if (self.k_norm_weight is None) != (self.k_norm_bias is None):
            missing = "k_norm_weight" if self.k_norm_weight is None else "k_norm_bias"
            raise ConfigError(
                f"{missing}: got None, allowed are both of k_norm_weight and k_norm_bias, or none"
            )

    def rope_width(self, kv_a: Array | None, cos_sin: Array | None) -> int:
        """Values of a row of `kv_a` after the latent; 0 where the width of neither is known."""
        if cos_sin is not None:
            return cos_sin.shape[1]
        if CACHE_FORMATS[self.kv_cache_dtype].is_fp8:
            return ROPE_WIDTH
        weight = self.kv_norm_weight
        if weight is None or kv_a is None:
            return 0
        return max(kv_a.shape[1] - weight.shape[0], 0)


def write_caches(
    kv_a: Array | None,
    index_k: Array | None,
    position_ids: Array | None,
    slot_mapping: Array,
    cos_sin_cache: Array | None,
    latent_cache: Array | None,
    index_cache: Array | None,
    params: CacheWriteParams,
) -> None:
    """Norm, rotate, quantise and store the keys of a step's tokens; one launch on a device.

    latent: c = RMSNorm(kv_a[:, :kv_lora_rank]), k_pe = RoPE(kv_a[:, kv_lora_rank:])
    index:  k = LayerNorm(index_k), RoPE of its first rope_dim values, Hadamard where asked for

    All of it in float32, sums of the norms in float64, nothing rounded before it is stored; so
    a CPU and a device write the same bytes. An fp8_ds_mla record of the latent has 656 bytes:
    512 e4m3 codes, 4 float32 scales (one a 128 values), 64 bfloat16 of k_pe. A block of the
    index cache has 64 keys of 128 e4m3 codes, then 64 float32 scales.

    At least one of `kv_a` and `index_k` is given.

    Args:
        kv_a: float32, on a device also bfloat16, [num_tokens, kv_lora_rank + rope_dim]; a column
            slice of a wider projection is allowed; None writes the index key alone.
        index_k: like `kv_a`, [num_tokens, index_head_dim]; None = no indexer, or written already.
        position_ids: int64 [num_tokens]; rows of `cos_sin_cache`. None = row t belongs to token t,
            as where a step gathers them once for all layers. A device takes a position outside
            the table for its nearest row; it does not matter where nothing is written.
        slot_mapping: int64 [num_tokens]; block * block_size + offset. A slot below 0 or past the
            cache is not written.
        cos_sin_cache: float32 [max_position, rope_dim], cos in the first half, sin in the second;
            None = already rotated.
        latent_cache: [num_blocks, 1, block_size, row]: float32 or int16 (bfloat16 bits) with row =
            kv_lora_rank + rope_dim, or uint8 with row = 656. None with `kv_a`.
        index_cache: [num_blocks, block_size, row]: row = index_head_dim, or uint8 with row = 132.
            None with `index_k`. Both have the same blocks; those of fp8_ds_mla hold 64 tokens.
        params: the layer's norms and the format.

    Raises:
        ShapeError, DtypeError: before anything is written.
        ValueError: on a CPU, a position outside `cos_sin_cache`, or a cache that is read-only;
            before anything is written.
        BackendUnavailable: the device has no kernel.

    Source: FlashMLA (README, "FP8 KV cache"), DeepGEMM's paged index cache, vLLM's
    concat_and_cache_ds_mla and indexer_k_quant_and_cache for the two formats.
    """
    check_array(_NAME, "slot_mapping", slot_mapping, (None,), ("int64",))
    num_tokens = slot_mapping.shape[0]
    rows = {name: x for name, x in (("kv_a", kv_a), ("index_k", index_k)) if x is not None}
    if not rows:
        raise ShapeError(f"{_NAME}: kv_a and index_k are None, allowed is at least one array")
    for argument, value in rows.items():
        check_shape(_NAME, argument, value, (num_tokens, None))
    for argument, value in rows.items():
        check_dtype(_NAME, argument, value, activation_dtypes(value))
    stored = CACHE_FORMATS[params.kv_cache_dtype]
    fp8, allowed = stored.is_fp8, stored.dtypes
    num_blocks, block_size = None, stored.required.get("block_size")
    if cos_sin_cache is not None:
        width = min(x.shape[1] for x in rows.values())
        check_rope(_NAME, position_ids, cos_sin_cache, num_tokens, width)
    if kv_a is not None:
        if fp8:
            check_shape(_NAME, "kv_a", kv_a, (None, LATENT_WIDTH + ROPE_WIDTH))
            if cos_sin_cache is not None:
                check_shape(_NAME, "cos_sin_cache", cos_sin_cache, (None, ROPE_WIDTH))
        row = stored.latent_row(kv_a.shape[1])
        check_array(_NAME, "latent_cache", latent_cache, (None, 1, block_size, row), allowed)
        assert latent_cache is not None, "checked"
        num_blocks, block_size = latent_cache.shape[0], latent_cache.shape[2]
        if params.kv_norm_weight is not None:
            rank = kv_a.shape[1] - params.rope_width(kv_a, cos_sin_cache)
            check_array(_NAME, "kv_norm_weight", params.kv_norm_weight, (rank,), ("float32",))
    if index_k is not None:
        if fp8 or params.index_hadamard:
            check_shape(_NAME, "index_k", index_k, (None, INDEX_WIDTH))
        row = stored.indexer_row(index_k.shape[1])
        check_array(_NAME, "index_cache", index_cache, (num_blocks, block_size, row), allowed)
        for argument in ("k_norm_weight", "k_norm_bias"):
            norm = getattr(params, argument)
            if norm is not None:
                check_array(_NAME, argument, norm, (index_k.shape[1],), ("float32",))
    arguments = kv_a, index_k, position_ids, slot_mapping, cos_sin_cache, latent_cache, index_cache
    serving("cache_write", slot_mapping)(*arguments, params)
