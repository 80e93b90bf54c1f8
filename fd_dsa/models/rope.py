"""Angles of rotary position embedding, plain and YaRN."""

from __future__ import annotations

import math

import numpy as np

from fd_dsa.models.rope_config import RopeConfig, yarn_mscale


def inverse_frequencies(rope: RopeConfig, dim: int) -> np.ndarray:
    """Return the angle per position of each pair, float32 [dim // 2], radians.

    YaRN keeps frequencies that turn more than `beta_fast` times within the pre-training context. It
    divides by `factor` those that turn less than `beta_slow` times, and blends between.

    Source: YaRN (arXiv 2309.00071) §3; Hugging Face transformers 5.23, modeling_rope_utils.py.
    """
    exponent = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
    plain = (1.0 / np.float32(rope.theta) ** exponent).astype(np.float32)
    if rope.type == "default":
        return plain

    def pair_with(rotations: float) -> float:
        """Return the (real) pair index with `rotations` turns in the trained context."""
        turns = rope.original_max_position_embeddings / (rotations * 2 * math.pi)
        return dim * math.log(turns) / (2 * math.log(rope.theta))

    low = max(math.floor(pair_with(rope.beta_fast)), 0)
    high = min(math.ceil(pair_with(rope.beta_slow)), dim - 1)
    span = max(high - low, 0.001)
    ramp = np.clip((np.arange(dim // 2, dtype=np.float32) - low) / np.float32(span), 0, 1)
    return plain * (1 - ramp) + plain / np.float32(rope.factor) * ramp


def cos_sin_table(
    rope: RopeConfig, dim: int, max_position: int, *, has_scale: bool = True
) -> np.ndarray:
    """Return cos, then sin of the pairs, float32 [max_position, dim].

    Args:
        dim: width of the rope slice, `qk_rope_head_dim`.
        has_scale: False leaves out the factor of YaRN, as in DeepSeek-V4.
    """
    scale = np.float32(1.0)
    if has_scale and rope.type == "yarn":
        if rope.mscale and rope.mscale_all_dim:
            ratio = yarn_mscale(rope.factor, rope.mscale) / yarn_mscale(
                rope.factor, rope.mscale_all_dim
            )
        else:
            ratio = yarn_mscale(rope.factor, 1.0)
        scale = np.float32(ratio)
    positions = np.arange(max_position, dtype=np.float32)
    angles = positions[:, None] * inverse_frequencies(rope, dim)
    table = np.empty((max_position, dim), np.float32)
    for columns, function in ((slice(0, dim // 2), np.cos), (slice(dim // 2, dim), np.sin)):
        np.multiply(function(angles), scale, out=table[:, columns])
    return table
