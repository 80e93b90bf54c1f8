"""Operator that writes a step's keys of a layer to the two paged caches of the layer.

The functions after `write_caches` run it on a CPU, in NumPy.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from fd_dsa.cache_formats import (
    CACHE_FORMATS,
    INDEX_WIDTH,
    LATENT_ROPE_AT,
    LATENT_SCALES_AT,
    LATENT_TILES,
    LATENT_WIDTH,
    ROPE_WIDTH,
    TILE_WIDTH,
    check_scale_fmt,
)
from fd_dsa.errors import ConfigError, ShapeError
from fd_dsa.ops.arrays import (
    as_numpy,
    check_array,
    check_dtype,
    check_rope,
    check_shape,
    check_writable,
)
from fd_dsa.ops.fp8 import absolute_maximum, index_scale, quantise, raw_scale
from fd_dsa.ops.host_rows import cos_sin_of, hadamard, index_planes, layer_norm, rms_norm, rotate_
from fd_dsa.ops.providers import activation_dtypes, selected_function
from fd_dsa.tensor import Array

__all__ = ["CacheWriteParams", "write_caches"]

_NAME = "write_caches"
Cells = tuple[np.ndarray, np.ndarray]
"""Blocks of a cache, and offsets in the blocks."""


@dataclass(frozen=True, slots=True)
class CacheWriteParams:
    """Norms, rotations and format of the keys that `write_caches` stores.

    The queries that read the cache must have the same `index_hadamard` and `index_scale_fmt`.

    Attributes:
        kv_cache_dtype: "float32", "bfloat16" or "fp8_ds_mla".
        kv_norm_weight: float32 [kv_lora_rank], RMSNorm of the latent; None = already normed.
        kv_norm_eps: added to the mean square.
        k_norm_weight, k_norm_bias: float32 [index_head_dim], LayerNorm of the index key; None =
            already normed.
        k_norm_eps: added to the variance.
        index_rope_interleave: True if the index key's RoPE pairs neighbours, as the latent's does.
        index_hadamard: True to rotate the index key by a 128-point Walsh-Hadamard matrix.
        index_scale_fmt: scales of the index keys in an fp8_ds_mla cache: "ue8m0" (powers of two)
            or None.

    Raises:
        ConfigError: an unknown kv_cache_dtype or index_scale_fmt, or only one of k_norm_weight and
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
                f"{missing}: got None, allowed are k_norm_weight and k_norm_bias, or None for both"
            )

    def rope_width(self, kv_a: Array | None, cos_sin: Array | None) -> int:
        """Return the values of a row of `kv_a` after the latent, 0 if they are unknown."""
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
    """Norm, rotate, quantise and store the keys of a step's tokens.

    latent: c = RMSNorm(kv_a[:, :kv_lora_rank]), k_pe = RoPE(kv_a[:, kv_lora_rank:])
    index:  k = LayerNorm(index_k), RoPE of its first rope_dim values, Hadamard if requested

    All values are float32 up to the rounding of the stored value, and sums of norms are float64.
    So a CPU and a device write the same bytes. An fp8_ds_mla record of the latent has 656 bytes:
    512 e4m3 codes, 4 float32 scales (one for each 128 values), 64 bfloat16 values of k_pe. A block
    of the index cache has 64 keys of 128 e4m3 codes, then 64 float32 scales.

    At least one of `kv_a` and `index_k` must be an array.

    Args:
        kv_a: float32, on a device also bfloat16, [num_tokens, kv_lora_rank + rope_dim]; may be
            columns of a wider projection. None writes only the index key.
        index_k: like `kv_a`, [num_tokens, index_head_dim]; None writes only the latent.
        position_ids: int64 [num_tokens], rows of `cos_sin_cache`. None = row t belongs to token t,
            for a step that gathers the rows once for all layers. A device clamps positions to the
            table. Tokens that are not written may have any position.
        slot_mapping: int64 [num_tokens], block * block_size + offset. A slot below 0 or past the
            cache is not written.
        cos_sin_cache: float32 [max_position, rope_dim], cos in the first half, sin in the second;
            None = already rotated.
        latent_cache: [num_blocks, 1, block_size, row]: float32 or int16 (bfloat16 bits) with row =
            kv_lora_rank + rope_dim, or uint8 with row = 656. None if `kv_a` is None.
        index_cache: [num_blocks, block_size, row]: float32 or int16 with row = index_head_dim, or
            uint8 with row = 132. None if `index_k` is None. It has the blocks of `latent_cache`.
            Blocks of fp8_ds_mla hold 64 tokens.
        params: norms, rotations and format.

    Raises:
        ShapeError, DtypeError: an argument is not as above. No cache is changed.
        ValueError: on a CPU, a position outside `cos_sin_cache`, or a read-only cache. No cache is
            changed.
        BackendUnavailable: the device has no kernel.

    Cost on a device: one launch.

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
    selected_function("cache_write", slot_mapping)(*arguments, params)


def bfloat16_bits(x: np.ndarray) -> np.ndarray:
    """Round `x` to bfloat16 (nearest even) and return the int16 bits. NaN stays NaN."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    rounded = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    # a rounded mantissa of NaN could carry into an infinity
    rounded = np.where(np.isnan(x), np.uint32(0x7FC00000), rounded)
    return (rounded >> np.uint32(16)).astype(np.uint16).view(np.int16)


def write_on_host(
    kv_a: Array | None,
    index_k: Array | None,
    position_ids: Array | None,
    slot_mapping: Array,
    cos_sin_cache: Array | None,
    latent_cache: Array | None,
    index_cache: Array | None,
    params: CacheWriteParams,
) -> None:
    """Write the caches as `write_caches`, on a CPU by NumPy."""
    # [num_blocks, block_size, row] is a view whatever the stride of a block
    latents = None if kv_a is None or latent_cache is None else as_numpy(latent_cache)[:, 0]
    keys = None if index_k is None or index_cache is None else as_numpy(index_cache)
    _check_memory(latents, keys)
    cache = keys if latents is None else latents
    assert cache is not None, "checked: there are rows, and a cache for them"
    where = places(as_numpy(slot_mapping), cache.shape[0], cache.shape[1])
    cos_sin, keep = None, where[0]
    if cos_sin_cache is not None:
        if position_ids is not None and not isinstance(keep, slice):
            # padding may have any position
            position_ids = np.where(keep, as_numpy(position_ids), 0)
        cos_sin = cos_sin_of(_NAME, position_ids, cos_sin_cache)
    latent_rows, key_rows = (None if part is None else as_numpy(part) for part in (kv_a, index_k))
    store_keys(latent_rows, key_rows, cos_sin, latents, keys, where, params)


def store_keys(
    kv_a: np.ndarray | None,
    index_k: np.ndarray | None,
    cos_sin: np.ndarray | None,
    latents: np.ndarray | None,
    keys: np.ndarray | None,
    where: tuple[slice | np.ndarray, Cells],
    params: CacheWriteParams,
) -> None:
    """Write the caches as `write_caches`, without checks.

    Args:
        kv_a, index_k: float32, see `write_caches`.
        cos_sin: float32 [num_tokens, rope_dim], cos and sin of each token; None = already rotated.
        latents, keys: caches of latents and of index keys, [num_blocks, block_size, row].
        where: the result of `places`.
        params: norms, rotations and format.
    """
    keep, place = where
    if kv_a is not None and latents is not None:
        latent, k_pe = _latent_rows(kv_a, cos_sin, params)
        _store_latent(latents, place, latent[keep], k_pe[keep])
    if index_k is not None and keys is not None:
        rows = _index_rows(index_k, cos_sin, params)
        _store_index(keys, place, rows[keep], params.index_scale_fmt)


def _check_memory(latents: np.ndarray | None, keys: np.ndarray | None) -> None:
    """Check that caches are writable and that units of their format are contiguous."""
    for argument, cache in (("latent_cache", latents), ("index_cache", keys)):
        if cache is None:
            continue
        check_writable(_NAME, argument, cache)
        # a record, and a block of index keys with its scales, must be contiguous
        dense = cache[:1, :1] if cache is latents else cache[:1]
        if cache.dtype == np.uint8 and not dense.flags.c_contiguous:
            raise ShapeError(
                f"write_caches: bytes of a block of {argument} have gaps (strides "
                f"{cache.strides}), an fp8_ds_mla cache must be contiguous"
            )


def places(slots: np.ndarray, num_blocks: int, block_size: int) -> tuple[slice | np.ndarray, Cells]:
    """Return the tokens that are written, and the block and offset of each of them.

    Args:
        slots: int64 [num_tokens], see `slot_mapping` of `write_caches`.
        num_blocks, block_size: size of the cache.

    Returns:
        A slice or a mask of the tokens, and their cells.
    """
    is_inside = (slots >= 0) & (slots < num_blocks * block_size)
    keep = slice(None) if is_inside.all() else is_inside
    return keep, np.divmod(slots[keep], block_size)


def _latent_rows(
    rows: np.ndarray, cos_sin: np.ndarray | None, params: CacheWriteParams
) -> tuple[np.ndarray, np.ndarray]:
    """Return normed latents and rotated k_pe, float32 [num_tokens, width] each."""
    rank = rows.shape[1] - params.rope_width(rows, cos_sin)
    latent, k_pe = rows[:, :rank], rows[:, rank:]
    if params.kv_norm_weight is not None:
        latent = rms_norm(latent, as_numpy(params.kv_norm_weight), params.kv_norm_eps)
    if cos_sin is not None:
        k_pe = k_pe.copy()
        rotate_(k_pe[:, None], cos_sin, interleaved=True)
    return latent, k_pe


def _index_rows(
    rows: np.ndarray, cos_sin: np.ndarray | None, params: CacheWriteParams
) -> np.ndarray:
    """Return index keys after norm, rotation and Hadamard, float32 [num_tokens, width]."""
    if params.k_norm_weight is not None:
        weight, bias = as_numpy(params.k_norm_weight), as_numpy(params.k_norm_bias)
        rows = layer_norm(rows, weight, bias, params.k_norm_eps)
    if cos_sin is not None:
        if params.k_norm_weight is None:
            rows = rows.copy()
        rope = rows[:, None, : cos_sin.shape[1]]
        rotate_(rope, cos_sin, interleaved=params.index_rope_interleave)
    return hadamard(rows) if params.index_hadamard else rows


def _store_latent(cache: np.ndarray, place: Cells, latent: np.ndarray, k_pe: np.ndarray) -> None:
    """Store latents and k_pe in the latent cache [num_blocks, block_size, row]."""
    rank = latent.shape[1]
    if cache.dtype != np.uint8:
        convert = bfloat16_bits if cache.dtype == np.int16 else np.asarray
        cache[..., :rank][place] = convert(latent)
        cache[..., rank:][place] = convert(k_pe)
        return
    tiles = latent.reshape(-1, LATENT_TILES, TILE_WIDTH)
    scales = raw_scale(absolute_maximum(tiles))
    cache[..., :LATENT_WIDTH][place] = quantise(tiles, scales).reshape(-1, LATENT_WIDTH)
    cache[..., LATENT_SCALES_AT:LATENT_ROPE_AT].view(np.float32)[place] = scales
    cache[..., LATENT_ROPE_AT:].view(np.int16)[place] = bfloat16_bits(k_pe)


def _store_index(cache: np.ndarray, place: Cells, keys: np.ndarray, scale_fmt: str | None) -> None:
    """Store keys in the indexer cache [num_blocks, block_size, row]."""
    if cache.dtype != np.uint8:
        cache[place] = bfloat16_bits(keys) if cache.dtype == np.int16 else keys
        return
    codes, scales = index_planes(cache)
    scale = index_scale(absolute_maximum(keys), scale_fmt)
    codes[place] = quantise(keys, scale)
    scales[place] = scale
