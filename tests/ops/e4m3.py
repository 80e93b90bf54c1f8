"""The 256 values of float8_e4m3fn, by definition."""

from __future__ import annotations

import numpy as np


def _value(bits: int) -> float:
    """Value of a code with a sign, 4 exponent bits (bias 7) and 3 mantissa bits. 0x7F is NaN."""
    sign = -1.0 if bits & 0x80 else 1.0
    exponent, mantissa = bits >> 3 & 15, bits & 7
    if exponent == 15 and mantissa == 7:
        return float("nan")
    if exponent == 0:
        return sign * mantissa * 2.0**-9
    return sign * (8 + mantissa) * 2.0 ** (exponent - 10)


E4M3_VALUES = np.array([_value(bits) for bits in range(256)], np.float32)
"""float32 [256]; the value of each byte."""
