"""Rows in host memory: gathered from paged caches, normed and rotated.

Norms and rotations are RMSNorm, LayerNorm, RoPE and Walsh-Hadamard. They run in NumPy, because the
arrays are small and Paddle starts a thread pool for each norm. That costs more than the work, and
far more on a busy machine. Sums of norms run in float64 and are rounded to float32 once. So a
kernel that adds in another order gets the same bits.

Rows of a cache become float32 from every format. Its dtype tells the format: float32, int16
(bfloat16 bits) or uint8 (fp8_ds_mla). fp8_ds_mla latents become float32(code) * scale, because
queries and softmax weights are float32 on a CPU. A kernel with bfloat16 GEMMs rounds that number
once more, by at most 2^-9 of the value. The code itself has lost up to 2^-4.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np

from fd_dsa.cache_formats import (
    INDEX_WIDTH,
    LATENT_ROPE_AT,
    LATENT_SCALES_AT,
    LATENT_TILES,
    LATENT_WIDTH,
    TILE_WIDTH,
)
from fd_dsa.ops.arrays import Scratch, as_numpy, check_values
from fd_dsa.ops.fp8 import decode_e4m3
from fd_dsa.tensor import Array

# values that are converted to float64 at a time, so that they stay in a core's cache
_CHUNK = 1 << 16


class Reducer(Protocol):
    """Group of ranks that sum their parts of a tensor, such as a group of `distributed`."""

    def all_reduce(self, tensor: Any) -> Any:
        """Return the sum over all ranks, an array of the same kind."""


def rms_norm(x: Array, weight: Array, epsilon: float) -> np.ndarray:
    """Return x * rsqrt(mean(x^2) + epsilon) * weight, float32 and C-contiguous.

    Args:
        x: float32 [num_tokens, width], may be columns of wider rows.
        weight: float32 [width].
        epsilon: added to the mean square.
    """
    rows = x if isinstance(x, np.ndarray) else as_numpy(x)
    out = rows * inverse_root(rows, epsilon)
    out *= weight
    return out


class HostNorm:
    """RMSNorm of rows in host memory."""

    def __init__(self, weight: np.ndarray, epsilon: float) -> None:
        self.weight, self.epsilon = weight, epsilon

    def normalize(self, x: np.ndarray) -> np.ndarray:
        """Norm x [num_tokens, width], which may be columns of wider rows."""
        return rms_norm(x, self.weight, self.epsilon)

    def add_and_normalize(
        self, hidden_states: np.ndarray, change: np.ndarray, group: Reducer | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Add the ranks' changes to `hidden_states`. Return the sum, and the sum normed.

        Args:
            hidden_states: float32 [num_tokens, width].
            change: this rank's part of the change, overwritten.
            group: ranks whose changes are added; None = one rank.
        """
        if group is not None:
            change = group.all_reduce(change)
        change += hidden_states
        return change, rms_norm(change, self.weight, self.epsilon)


def layer_norm(x: Array, weight: np.ndarray, bias: np.ndarray, epsilon: float) -> np.ndarray:
    """Return (x - mean) * rsqrt(variance + epsilon) * weight + bias, float32 like `x`."""
    rows = as_numpy(x)
    mean = rows.mean(axis=1, dtype=np.float64, keepdims=True).astype(np.float32)
    out = rows - mean
    out *= inverse_root(out, epsilon)
    out *= weight
    out += bias
    return out


def inverse_root(rows: np.ndarray, epsilon: float) -> np.ndarray:
    """Return 1 / sqrt(mean(x^2) + epsilon) of each row, float32 [num_tokens, 1]."""
    num_tokens, width = rows.shape
    step = max(1, _CHUNK // width)
    if num_tokens <= step:
        total = _squares(rows)
    else:
        chunks = [_squares(rows[i : i + step]) for i in range(0, num_tokens, step)]
        total = np.concatenate(chunks)
    total /= width
    mean_square = total.astype(np.float32)
    mean_square += np.float32(epsilon)
    return (np.float32(1.0) / np.sqrt(mean_square, out=mean_square))[:, None]


def _squares(rows: np.ndarray) -> np.ndarray:
    """Return the sum of squares of each row, float64 [num_tokens]."""
    wide = rows.astype(np.float64)
    sums: np.ndarray = np.matmul(wide[:, None], wide[:, :, None])[:, 0, 0]
    return sums


def cos_sin_of(operator: str, position_ids: Array | None, cos_sin_cache: Array) -> np.ndarray:
    """Return cos and sin of each token, float32 [num_tokens, rope_dim].

    Args:
        operator: name of the operator, for errors.
        position_ids: int64 [num_tokens], rows of the table; None = row t belongs to token t.
        cos_sin_cache: float32 [num_positions or num_tokens, rope_dim].

    Raises:
        ValueError: a position is outside the table.
    """
    table = as_numpy(cos_sin_cache)
    if position_ids is None:
        return table
    positions = as_numpy(position_ids)
    check_values(operator, "position_ids", positions, 0, len(table))
    return table[positions]


def rotate_(x: np.ndarray, cos_sin: np.ndarray, *, interleaved: bool) -> None:
    """Rotate `x` in place by the angles of its tokens.

    first' = first * cos - second * sin, second' = second * cos + first * sin

    Each product is rounded before the sum. Interleaved pairs are (x[2j], x[2j+1]), half-split pairs
    are (x[j], x[j + dim/2]). Both values of a pair keep their places, so cached keys have
    DeepSeek's own layout.

    Args:
        x: float32 [num_tokens, num_heads, rope_dim], may be a view.
        cos_sin: float32 [num_tokens, rope_dim], cos in the first half, sin in the second.
        interleaved: pairing; True for MLA, set by the configuration for the indexer.

    Source: RoFormer (arXiv 2104.09864); pairings: docs/concepts/dsa.md, "Rotary positions".
    """
    half = x.shape[-1] // 2
    cos, sin = cos_sin[:, None, :half], cos_sin[:, None, half:]
    if interleaved:
        first, second = x[..., 0::2], x[..., 1::2]
    else:
        first, second = x[..., :half], x[..., half:]
    rotated = first * cos
    rotated -= second * sin
    second *= cos
    second += first * sin
    first[...] = rotated


def hadamard(x: np.ndarray) -> np.ndarray:
    """Multiply float32 `x` [..., width] by the orthogonal Hadamard matrix in Sylvester's order.

    DeepSeek's own inference code rotates index keys and queries in the same way.

    Each stage m = 1, 2, 4 .. width / 2 replaces (u, v), m apart, by (u + v, u - v). The result is
    multiplied by float32(width ** -0.5). `width` is a power of two.
    """
    width = x.shape[-1]
    out, m = x, 1
    while m < width:
        pairs = out.reshape(*x.shape[:-1], width // (2 * m), 2, m)
        u, v = pairs[..., 0, :], pairs[..., 1, :]
        out = np.stack([u + v, u - v], axis=-2).reshape(x.shape)
        m *= 2
    return out * np.float32(width**-0.5)


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
