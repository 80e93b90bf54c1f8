"""Rotary positions of the last channels of a head, forwards and back."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from fd_dsa.models.rope import inverse_frequencies
from fd_dsa.models.rope_config import RopeConfig


class Angles(NamedTuple):
    """Angles of each token's position as complex numbers, and their conjugates.

    Attributes:
        forward: complex64 [num_tokens, 1, rope_dim / 2], rotates keys and queries.
        backward: complex64 of the same shape, reverts the rotation in attention outputs.
    """

    forward: np.ndarray
    backward: np.ndarray


class Rotation:
    """Frequencies of a RoPE setting, with unscaled cos and sin.

    Args:
        rope: setting.
        width: number of rotated channels.
    """

    def __init__(self, rope: RopeConfig, width: int) -> None:
        self._frequencies = inverse_frequencies(rope, width)

    def at(self, positions: np.ndarray) -> np.ndarray:
        """Return cos and sin of each pair as a complex number.

        Args:
            positions: int [n].

        Returns:
            complex64 [n, 1, rope_dim / 2].
        """
        angles = positions.astype(np.float32)[:, None, None] * self._frequencies
        turns = np.empty(angles.shape, np.complex64)
        np.cos(angles, out=turns.real)
        np.sin(angles, out=turns.imag)
        return turns

    def of_step(self, positions: np.ndarray) -> Angles:
        """Return the angles of the tokens of a step."""
        forward = self.at(positions)
        return Angles(forward, forward.conj())


def rotate(x: np.ndarray, turns: np.ndarray) -> None:
    """Rotate the pairs (x[2j], x[2j+1]) of `x` in place, as complex numbers.

    Args:
        x: float32 [n, num_heads, rope_dim], a view whose last axis is contiguous.
        turns: complex64 [n, 1, rope_dim / 2], see `Rotation.at`.
    """
    pairs = x.view(np.complex64)
    np.multiply(pairs, turns, out=pairs)
