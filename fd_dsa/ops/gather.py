"""Rows of paged caches on a CPU, gathered as float32 whatever the cache stores.

The format is known by the dtype: float32, int16 (bfloat16 bits) or uint8 (fp8_ds_mla).

fp8_ds_mla latents become float32(code) * scale, in float32: on a CPU queries and weights of the
softmax are float32 too. A kernel with bfloat16 GEMMs rounds that number once more, by at most 2^-9
of the value, where the code itself has lost up to 2^-4.
"""

from __future__ import annotations

import numpy as np

from fd_dsa.cache_formats import (
    INDEX_WIDTH,
    LATENT_ROPE_AT,
    LATENT_SCALES_AT,
    LATENT_TILES,
    LATENT_WIDTH,
    TILE_WIDTH,
)
from fd_dsa.ops.arrays import Scratch
from fd_dsa.ops.fp8 import decode_e4m3


def gather_rows(cache: np.ndarray, index: np.ndarray, out: np.ndarray, scratch: Scratch) -> None:
    """`out[i] = cache[index[i]]` as float32 along the first axis.

    Args:
        cache: [n, ...] float32, or int16 holding bfloat16 bits.
        index: int64 [m]; entries are in [0, n), which the operators check: one outside would be
            clamped, not refused.
        out: float32 [m, ...], C-contiguous.
    """
    if cache.dtype == np.float32:
        np.take(cache, index, axis=0, out=out, mode="clip")
        return
    bits = scratch.take("gather_bits", out.shape, np.int16)
    np.take(cache, index, axis=0, out=bits, mode="clip")
    _widen(bits, out)


def gather_latents(rows: np.ndarray, index: np.ndarray, out: np.ndarray, scratch: Scratch) -> None:
    """`out[i]` = the latent and k_pe at slot `index[i]`.

    Args:
        rows: [num_slots, row] float32, int16 (bfloat16 bits), or uint8 fp8_ds_mla records.
        index: int64 [m]; as in `gather_rows`.
        out: float32 [m, kv_lora_rank + rope_dim], C-contiguous.
    """
    if rows.dtype != np.uint8:
        gather_rows(rows, index, out, scratch)
        return
    records = scratch.take("gather_records", (len(index), rows.shape[1]), np.uint8)
    np.take(rows, index, axis=0, out=records, mode="clip")
    scales = records[:, LATENT_SCALES_AT:LATENT_ROPE_AT].view(np.float32)
    values = scratch.take("gather_values", (len(index), LATENT_TILES, TILE_WIDTH))
    decode_e4m3(records[:, :LATENT_WIDTH], values.reshape(-1, LATENT_WIDTH))
    tiles = out[:, :LATENT_WIDTH].reshape(values.shape)
    # a slot that nobody wrote may hold any bits, and the scale of a broken token is infinite
    with np.errstate(invalid="ignore", over="ignore"):
        np.multiply(values, scales[:, :, None], out=tiles)
    _widen(records[:, LATENT_ROPE_AT:].view(np.int16), out[:, LATENT_WIDTH:])


def gather_index_keys(
    cache: np.ndarray, slots: np.ndarray, out: np.ndarray, scratch: Scratch
) -> np.ndarray | None:
    """`out[i]` = the index key at `slots[i]`, and the factor of its scores.

    Args:
        cache: [num_blocks, block_size, row] float32, int16 (bfloat16 bits), or uint8 fp8_ds_mla.
        slots: int64 [m]; block * block_size + offset, all valid.
        out: float32 [m, index_head_dim], C-contiguous; of fp8_ds_mla keys the codes' values.

    Returns:
        float32 [m], scales of the keys; None where the cache has none.
    """
    if cache.dtype != np.uint8:
        gather_rows(cache.reshape(-1, cache.shape[2]), slots, out, scratch)
        return None
    codes, scales = index_planes(cache)
    place = np.divmod(slots, cache.shape[1])
    decode_e4m3(codes[place], out)
    return scales[place]


def gather_index_blocks(
    cache: np.ndarray, blocks: np.ndarray, out: np.ndarray, scratch: Scratch
) -> np.ndarray | None:
    """`out[i]` = all index keys of block `blocks[i]`; else as `gather_index_keys`.

    Args:
        blocks: int64 [m].
        out: float32 [m, block_size, index_head_dim], C-contiguous.

    Returns:
        float32 [m, block_size], or None.
    """
    if cache.dtype != np.uint8:
        gather_rows(cache, blocks, out, scratch)
        return None
    taken = scratch.take("gather_blocks", (len(blocks), *cache.shape[1:]), np.uint8)
    np.take(cache, blocks, axis=0, out=taken, mode="clip")
    codes, scales = index_planes(taken)
    decode_e4m3(codes, out)
    return scales


def index_planes(cache: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Views of an fp8_ds_mla indexer cache: its codes and its scales.

    Args:
        cache: uint8 [num_blocks, block_size, 132], each block contiguous.

    Returns:
        uint8 [num_blocks, block_size, 128] and float32 [num_blocks, block_size].
    """
    num_blocks, block_size, record = cache.shape
    blocks = cache.reshape(num_blocks, block_size * record)
    codes = blocks[:, : block_size * INDEX_WIDTH].reshape(num_blocks, block_size, INDEX_WIDTH)
    return codes, blocks[:, block_size * INDEX_WIDTH :].view(np.float32)


def _widen(bits: np.ndarray, out: np.ndarray) -> None:
    """float32 `out` of bfloat16 `bits`, int16."""
    wide = out.view(np.uint32)
    wide[...] = bits.view(np.uint16)
    np.left_shift(wide, np.uint32(16), out=wide)
