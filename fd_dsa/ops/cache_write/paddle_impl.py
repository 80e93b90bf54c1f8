"""Cache rows on a CPU: made and scattered by NumPy."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from fd_dsa.cache_formats import (
    LATENT_ROPE_AT,
    LATENT_SCALES_AT,
    LATENT_TILES,
    LATENT_WIDTH,
    TILE_WIDTH,
)
from fd_dsa.errors import ShapeError
from fd_dsa.ops.arrays import as_numpy, check_writable
from fd_dsa.ops.fp8 import absolute_maximum, index_scale, quantise, raw_scale
from fd_dsa.ops.gather import index_planes
from fd_dsa.ops.norm import layer_norm, rms_norm
from fd_dsa.ops.rotations import cos_sin_of, hadamard, rotate_
from fd_dsa.tensor import Array

if TYPE_CHECKING:
    from fd_dsa.ops.cache_write import CacheWriteParams

Cells = tuple[np.ndarray, np.ndarray]
"""Blocks of a cache, and offsets in them."""


def bfloat16_bits(x: np.ndarray) -> np.ndarray:
    """int16 bits of `x` rounded to bfloat16, nearest even; NaN stays NaN."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    rounded = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    # rounding a NaN's mantissa up could carry into an infinity
    rounded = np.where(np.isnan(x), np.uint32(0x7FC00000), rounded)
    return (rounded >> np.uint32(16)).astype(np.uint16).view(np.int16)


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
    """See `fd_dsa.ops.cache_write.write_caches`."""
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
            # padding may carry any position
            position_ids = np.where(keep, as_numpy(position_ids), 0)
        cos_sin = cos_sin_of("write_caches", position_ids, cos_sin_cache)
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
    """`write_caches` of arguments that were checked.

    Args:
        cos_sin: float32 [num_tokens, rope_dim]; of each token.
        latents, keys: the caches, [num_blocks, block_size, row].
        where: as `places` gives it.
    """
    keep, place = where
    if kv_a is not None and latents is not None:
        latent, k_pe = _latent_rows(kv_a, cos_sin, params)
        _store_latent(latents, place, latent[keep], k_pe[keep])
    if index_k is not None and keys is not None:
        rows = _index_rows(index_k, cos_sin, params)
        _store_index(keys, place, rows[keep], params.index_scale_fmt)


def _check_memory(latents: np.ndarray | None, keys: np.ndarray | None) -> None:
    """Refuse caches that cannot be written to in the units of their format."""
    for argument, cache in (("latent_cache", latents), ("index_cache", keys)):
        if cache is None:
            continue
        check_writable("write_caches", argument, cache)
        # a record, and a block of index keys with its scales, is read as one piece of memory
        dense = cache[:1, :1] if cache is latents else cache[:1]
        if cache.dtype == np.uint8 and not dense.flags.c_contiguous:
            raise ShapeError(
                f"write_caches: bytes of a block of {argument} lie apart (strides "
                f"{cache.strides}), an fp8_ds_mla cache allows contiguous ones"
            )


def places(slots: np.ndarray, num_blocks: int, block_size: int) -> tuple[slice | np.ndarray, Cells]:
    """Which tokens are written, and the block and offset of each of them."""
    is_inside = (slots >= 0) & (slots < num_blocks * block_size)
    keep = slice(None) if is_inside.all() else is_inside
    return keep, np.divmod(slots[keep], block_size)


def _latent_rows(
    rows: np.ndarray, cos_sin: np.ndarray | None, params: CacheWriteParams
) -> tuple[np.ndarray, np.ndarray]:
    """Latents, normed, and k_pe, rotated; float32 [num_tokens, width] each."""
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
    """Index keys, normed, rotated and, where asked for, turned by Hadamard; float32."""
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
    """Write rows of the latent cache [num_blocks, block_size, row]."""
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
    """Write keys of the indexer cache [num_blocks, block_size, row]."""
    if cache.dtype != np.uint8:
        cache[place] = bfloat16_bits(keys) if cache.dtype == np.int16 else keys
        return
    codes, scales = index_planes(cache)
    scale = index_scale(absolute_maximum(keys), scale_fmt)
    codes[place] = quantise(keys, scale)
    scales[place] = scale
