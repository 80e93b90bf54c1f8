"""Rotary position embedding of a packed step."""

from __future__ import annotations

from typing import Any

import numpy as np

from fd_dsa.ops._host import as_numpy, on_device


def rotated(x: Any, position_ids: Any, cos_sin_cache: Any, *, interleaved: bool) -> Any:
    """`x` rotated by the angles of its tokens: on a CPU itself, in place, on a device a new tensor.

    Arguments as of `apply_rope_`.
    """
    if on_device(x):
        # Paddle only here: the CPU form is the oracle of kernels where Paddle is not installed
        from fd_dsa.ops import _dense

        return _dense.rope(x, position_ids, cos_sin_cache, interleaved=interleaved)
    apply_rope_(x, position_ids, cos_sin_cache, interleaved=interleaved)
    return x


def apply_rope_(x: Any, position_ids: Any, cos_sin_cache: Any, *, interleaved: bool) -> None:
    """Rotate `x` in place by the angles of its tokens.

    first' = first * cos - second * sin, second' = second * cos + first * sin, each product
    rounded before the sum.

    Interleaved pairs are (x[2j], x[2j+1]), half-split pairs (x[j], x[j + dim/2]); both are kept
    where they are, so cached keys have DeepSeek's own layout.

    Args:
        x: float32 [num_tokens, num_heads, rope_dim] (a Paddle CPU tensor or NumPy; may be a view).
        position_ids: int64 [num_tokens]; rows of `cos_sin_cache`.
        cos_sin_cache: float32 [max_position, rope_dim]; cos in the first half, sin in the second.
        interleaved: pairing; True for MLA, per configuration for the indexer.

    Source: RoFormer (arXiv 2104.09864); pairings: docs/concepts/dsa.md, "Rotary positions".
    """
    rotate_(as_numpy(x), angles_of(position_ids, cos_sin_cache), interleaved=interleaved)


def angles_of(position_ids: Any, cos_sin_cache: Any) -> np.ndarray:
    """float32 [num_tokens, rope_dim]: cos and sin of each token."""
    return as_numpy(cos_sin_cache)[as_numpy(position_ids)]


def rotate_(view: np.ndarray, angles: np.ndarray, *, interleaved: bool) -> None:
    """`apply_rope_` by the angles of each token, for several arrays of one step."""
    half = view.shape[-1] // 2
    cos, sin = angles[:, None, :half], angles[:, None, half:]
    if interleaved:
        first, second = view[..., 0::2], view[..., 1::2]
    else:
        first, second = view[..., :half], view[..., half:]
    rotated = first * cos
    rotated -= second * sin
    second *= cos
    second += first * sin
    first[...] = rotated
