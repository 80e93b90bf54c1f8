"""Rotations of a packed step on a CPU: rotary position embedding, and Walsh-Hadamard."""

from __future__ import annotations

import numpy as np

from fd_dsa.ops.arrays import as_numpy, check_values
from fd_dsa.tensor import Array


def cos_sin_of(operator: str, position_ids: Array | None, cos_sin_cache: Array) -> np.ndarray:
    """float32 [num_tokens, rope_dim]: cos and sin of each token.

    Rows `position_ids` of `cos_sin_cache`; without positions row t is that of token t.

    Raises:
        ValueError: a position has no row.
    """
    table = as_numpy(cos_sin_cache)
    if position_ids is None:
        return table
    positions = as_numpy(position_ids)
    check_values(operator, "position_ids", positions, 0, len(table))
    return table[positions]


def rotate_(x: np.ndarray, cos_sin: np.ndarray, *, interleaved: bool) -> None:
    """Rotate `x` in place by the angles of its tokens.

    first' = first * cos - second * sin, second' = second * cos + first * sin, each
    product rounded before the sum.

    Interleaved pairs are (x[2j], x[2j+1]), half-split pairs (x[j], x[j + dim/2]); both are kept
    where they are, so cached keys have DeepSeek's own layout.

    Args:
        x: float32 [num_tokens, num_heads, rope_dim]; may be a view.
        cos_sin: float32 [num_tokens, rope_dim]; cos in the first half, sin in the second.
        interleaved: pairing; True for MLA, per configuration for the indexer.

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
    """float32 `x` [..., width] times the orthogonal Hadamard matrix in Sylvester's order.

    As DeepSeek's own inference code rotates index keys and queries.

    Stages m = 1, 2, 4 .. width / 2 replace (u, v), m apart, by (u + v, u - v), then everything
    is multiplied by float32(width ** -0.5); `width` is a power of two.
    """
    width = x.shape[-1]
    out, m = x, 1
    while m < width:
        pairs = out.reshape(*x.shape[:-1], width // (2 * m), 2, m)
        u, v = pairs[..., 0, :], pairs[..., 1, :]
        out = np.stack([u + v, u - v], axis=-2).reshape(x.shape)
        m *= 2
    return out * np.float32(width**-0.5)
