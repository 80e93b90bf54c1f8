"""Sums of bfloat16 parts, whose bits are uint16 arrays."""

from __future__ import annotations

import numpy as np


def widened(bits: np.ndarray) -> np.ndarray:
    """float32 of the bits of bfloat16."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def rounded(values: np.ndarray) -> np.ndarray:
    """Bits of the nearest bfloat16."""
    bits = values.astype(np.float32).view(np.uint32)
    nearest = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    return np.where(np.isnan(values), 0x7FFF, nearest).astype(np.uint16)


def sum_of(parts: list[np.ndarray]) -> np.ndarray:
    """Bits of the sum in float32, in order, rounded once."""
    total = np.zeros(parts[0].shape, np.float32)
    for part in parts:
        total = total + widened(part)
    return rounded(total)
