"""Rotary positions of the last channels of a head, forwards and back."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from fd_dsa.models.rope import inverse_frequencies
from fd_dsa.models.rope_config import RopeConfig


class Angles(NamedTuple):
    """cos, then sin, of each token's position, float32 [num_tokens, rope_dim], and of minus it."""

    forward: np.ndarray
    backward: np.ndarray


class Rotation:
    """One of the two sets of frequencies of a model; cos and sin are not scaled.

    Args:
        rope: its settings.
        width: rotated channels.
    """

    def __init__(self, rope: RopeConfig, width: int) -> None:
        self._frequencies = inverse_frequencies(rope, width)

    def at(self, positions: np.ndarray) -> np.ndarray:
        """float32 [n, rope_dim] of int [n] positions: cos of each pair, then sin."""
        angles = positions.astype(np.float32)[:, None] * self._frequencies
        return np.concatenate((np.cos(angles), np.sin(angles)), axis=1)

    def of_step(self, positions: np.ndarray) -> Angles:
        forward = self.at(positions)
        backward, half = forward.copy(), forward.shape[1] // 2
        np.negative(backward[:, half:], out=backward[:, half:])
        return Angles(forward, backward)
