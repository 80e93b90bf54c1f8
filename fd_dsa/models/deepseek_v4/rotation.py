"""Rotary positions of the last channels of a head, forwards and back."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from fd_dsa.models.rope import inverse_frequencies
from fd_dsa.models.rope_config import RopeConfig


class Angles(NamedTuple):
    """What `rotate` takes for each token's position, and for minus it."""

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
        """complex64 [n, 1, rope_dim / 2] of int [n] positions: cos and sin of each pair."""
        angles = positions.astype(np.float32)[:, None, None] * self._frequencies
        turns = np.empty(angles.shape, np.complex64)
        np.cos(angles, out=turns.real)
        np.sin(angles, out=turns.imag)
        return turns

    def of_step(self, positions: np.ndarray) -> Angles:
        forward = self.at(positions)
        return Angles(forward, forward.conj())


def rotate(x: np.ndarray, turns: np.ndarray) -> None:
    """Rotate the pairs (x[2j], x[2j+1]) of `x` in place, each a complex number.

    Args:
        x: float32 [n, num_heads, rope_dim]; a view whose last axis is contiguous.
        turns: of `Rotation.at`.
    """
    pairs = x.view(np.complex64)
    np.multiply(pairs, turns, out=pairs)
