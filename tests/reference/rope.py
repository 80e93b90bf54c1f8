"""Oracle of rotary position embedding: pair by pair, with the angles of plain RoPE and YaRN.

Source: RoFormer (arXiv 2104.09864), YaRN (arXiv 2309.00071) §3.2 and its reference code's rounding
of the correction range to whole pairs.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np


def ref_rotate(x: Any, angles: Any, interleaved: bool) -> np.ndarray:
    """float64 [dim]: `x` with pair j turned by angles[j], every element kept at its place.

    Interleaved pairs are (2j, 2j + 1), half-split pairs (j, j + dim / 2).
    """
    half = len(x) // 2
    out = np.zeros(len(x))
    for j in range(half):
        a, b = (2 * j, 2 * j + 1) if interleaved else (j, j + half)
        cos, sin = math.cos(angles[j]), math.sin(angles[j])
        out[a] = x[a] * cos - x[b] * sin
        out[b] = x[b] * cos + x[a] * sin
    return out


def ref_frequencies(dim: int, theta: float) -> list[float]:
    """theta^(-2j / dim) of each pair j."""
    return [theta ** (-2 * j / dim) for j in range(dim // 2)]


def ref_yarn_frequencies(
    dim: int, theta: float, factor: float, original: int, beta_fast: float, beta_slow: float
) -> tuple[int, int, list[float]]:
    """First and last pair of the blend, and the frequency of each pair.

    Pairs up to the first keep their frequency, from the last on it is divided by `factor`.
    """

    def pair_of(rotations: float) -> float:
        return dim * math.log(original / (2 * math.pi * rotations)) / (2 * math.log(theta))

    low = max(math.floor(pair_of(beta_fast)), 0)
    high = min(math.ceil(pair_of(beta_slow)), dim - 1)
    blended = []
    for j, plain in enumerate(ref_frequencies(dim, theta)):
        share = min(max((j - low) / (high - low), 0.0), 1.0)
        blended.append(plain * (1 - share) + plain / factor * share)
    return low, high, blended
