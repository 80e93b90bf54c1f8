"""Rotary position embedding of a packed step, in place."""

from __future__ import annotations

from typing import Any

import numpy as np

from fd_dsa.ops._host import as_numpy


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
    view = as_numpy(x)
    half = view.shape[-1] // 2
    angles = as_numpy(cos_sin_cache)[as_numpy(position_ids), None]
    cos, sin = angles[..., :half], angles[..., half:]
    if interleaved:
        first, second = view[..., 0::2], view[..., 1::2]
    else:
        first, second = view[..., :half], view[..., half:]
    rotated = first * cos
    rotated -= second * sin
    second *= cos
    second += first * sin
    first[...] = rotated


def join_query(latent: np.ndarray, q_pe: np.ndarray) -> np.ndarray:
    """The absorbed query: each head's latent part beside its roped part.

    Args:
        latent: float32 [num_heads, num_tokens, kv_lora_rank].
        q_pe: float32 [num_tokens, num_heads, rope_dim]; may be a view.

    Returns:
        float32 [num_tokens, num_heads, kv_lora_rank + rope_dim].
    """
    heads, tokens, rank = latent.shape
    out = np.empty((tokens, heads, rank + q_pe.shape[2]), np.float32)
    out[:, :, :rank] = latent.transpose(1, 0, 2)
    out[:, :, rank:] = q_pe
    return out
