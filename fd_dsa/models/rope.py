"""Angles of rotary position embedding, plain and YaRN."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from fd_dsa.models.rope_config import RopeConfig, yarn_mscale
from fd_dsa.ops._host import as_numpy


def inverse_frequencies(rope: RopeConfig, dim: int) -> np.ndarray:
    """float32 [dim // 2]: angle per position of each pair, radians.

    YaRN keeps frequencies that turn more than `beta_fast` times within the pre-training context,
    divides by `factor` those that turn less than `beta_slow` times, and blends between.

    Source: YaRN (arXiv 2309.00071) §3; Hugging Face transformers 5.23, modeling_rope_utils.py.
    """
    exponent = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
    plain = (1.0 / np.float32(rope.theta) ** exponent).astype(np.float32)
    if rope.type == "default":
        return plain

    def pair_with(rotations: float) -> float:
        """Pair index (a real number) that turns `rotations` times in the trained context."""
        turns = rope.original_max_position_embeddings / (rotations * 2 * math.pi)
        return dim * math.log(turns) / (2 * math.log(rope.theta))

    low = max(math.floor(pair_with(rope.beta_fast)), 0)
    high = min(math.ceil(pair_with(rope.beta_slow)), dim - 1)
    span = max(high - low, 0.001)
    ramp = np.clip((np.arange(dim // 2, dtype=np.float32) - low) / np.float32(span), 0, 1)
    return plain * (1 - ramp) + plain / np.float32(rope.factor) * ramp


class RotaryEmbedding:
    """cos and sin of a step's tokens, made once per step and read by every layer.

    Args:
        rope: settings of the model.
        dim: width of the rope slice, `qk_rope_head_dim`.
    """

    def __init__(self, rope: RopeConfig, dim: int) -> None:
        self.inv_freq = inverse_frequencies(rope, dim)
        self.scale = np.float32(1.0)
        if rope.type == "yarn":
            if rope.mscale and rope.mscale_all_dim:
                ratio = yarn_mscale(rope.factor, rope.mscale) / yarn_mscale(
                    rope.factor, rope.mscale_all_dim
                )
            else:
                ratio = yarn_mscale(rope.factor, 1.0)
            self.scale = np.float32(ratio)

    def __call__(self, position_ids: Any) -> tuple[np.ndarray, np.ndarray]:
        """cos, sin: float32 [num_tokens, 1, dim // 2] for int64 [num_tokens] positions."""
        angles = as_numpy(position_ids).astype(np.float32)[:, None, None] * self.inv_freq
        return np.cos(angles) * self.scale, np.sin(angles) * self.scale
