"""Rows of paged caches on a CPU, gathered as float32 from every format.

The dtype of a cache tells its format: float32, int16 (bfloat16 bits) or uint8 (fp8_ds_mla).

fp8_ds_mla latents become float32(code) * scale, because queries and softmax weights are float32 on
a CPU. A kernel with bfloat16 GEMMs rounds that number once more, by at most 2^-9 of the value. The
code itself has lost up to 2^-4.
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
    """Set `out[i] = cache[index[i]]` as float32 along the first axis.

    Args:
        cache: float32 or int16 (bfloat16 bits) [n, ...].
        index: int64 [m], entries in [0, n). The operators check them. Other entries are clamped.
        out: float32 [m, ...], C-contiguous.
    """
    if cache.dtype == np.float32:
        np.take(cache, index, axis=0, out=out, mode="clip")
        return
    bits = scratch.take("gather_bits", out.shape, np.int16)
    np.take(cache, index, axis=0, out=bits, mode="clip")
    _widen(bits, out)


def gather_latents(rows: np.ndarray, index: np.ndarray, out: np.ndarray, scratch: Scratch) -> None:
    """Set `out[i]` to the latent and k_pe at slot `index[i]`.

    Args:
        rows: float32, int16 (bfloat16 bits) or uint8 (fp8_ds_mla records) [num_slots, row].
        index: int64 [m], see `gather_rows`.
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
    # an unwritten slot may hold any bits, and the scale of a broken token is infinite
    with np.errstate(invalid="ignore", over="ignore"):
        np.multiply(values, scales[:, :, None], out=tiles)
    _widen(records[:, LATENT_ROPE_AT:].view(np.int16), out[:, LATENT_WIDTH:])


def gather_index_keys(
    cache: np.ndarray, slots: np.ndarray, out: np.ndarray, scratch: Scratch
) -> np.ndarray | None:
    """Set `out[i]` to the index key at `slots[i]`. Return the scales of the keys.

    Args:
        cache: float32, int16 (bfloat16 bits) or uint8 (fp8_ds_mla) [num_blocks, block_size, row].
        slots: int64 [m], block * block_size + offset, all valid.
        out: float32 [m, index_head_dim], C-contiguous. fp8_ds_mla keys are not yet scaled.

    Returns:
        float32 [m], factors of the scores; None for a format without scales.
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
    """Set `out[i]` to all index keys of block `blocks[i]`. Return the scales of the keys.

    Args:
        cache: see `gather_index_keys`.
        blocks: int64 [m].
        out: float32 [m, block_size, index_head_dim], C-contiguous. fp8_ds_mla keys are not yet
            scaled.

    Returns:
        float32 [m, block_size], factors of the scores; None for a format without scales.
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
    """Return views of an fp8_ds_mla indexer cache: codes and scales.

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
    """Set float32 `out` to the numbers of int16 `bits`, which are bfloat16."""
    wide = out.view(np.uint32)
    wide[...] = bits.view(np.uint16)
    np.left_shift(wide, np.uint32(16), out=wide)
