"""Oracle of bfloat16 rounding: one value at a time, in exact arithmetic of doubles."""

from __future__ import annotations

import math
import struct
from typing import Any

import numpy as np

_SIGNIFICANT_BITS = 8
_SMALLEST_NORMAL_EXPONENT = -126
_OVERFLOW = 2.0**128


def ref_round(x: float) -> float:
    """The bfloat16 number nearest to `x`, the even one of two; NaN and infinities stay."""
    if not math.isfinite(x) or x == 0:
        return x
    exponent = max(math.frexp(x)[1] - 1, _SMALLEST_NORMAL_EXPONENT)
    quantum = 2.0 ** (exponent - _SIGNIFICANT_BITS + 1)
    # dividing by a power of two is exact, and Python rounds halves to the even integer
    rounded = round(x / quantum) * quantum
    return math.copysign(math.inf if abs(rounded) >= _OVERFLOW else abs(rounded), x)


def ref_bits(x: float) -> int:
    """The 16 bits of the bfloat16 number nearest to `x`."""
    return struct.unpack(">H", struct.pack(">f", ref_round(x))[:2])[0]


def ref_array(values: Any) -> np.ndarray:
    """float32 array of `values`, each rounded to bfloat16."""
    array = np.asarray(values, np.float32)
    return np.array([ref_round(float(x)) for x in array.ravel()], np.float32).reshape(array.shape)


def upper_half(values: np.ndarray) -> np.ndarray:
    """int16 bits of float32 `values` that are bfloat16 numbers."""
    return (np.ascontiguousarray(values).view(np.uint32) >> 16).astype(np.uint16).view(np.int16)


def widened(bits: np.ndarray) -> np.ndarray:
    """float32 values of bfloat16 bits."""
    return (bits.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
