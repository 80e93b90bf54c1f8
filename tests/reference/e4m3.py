"""Oracle of float8_e4m3fn: nearest of a sorted list of all its numbers, one value at a time."""

from __future__ import annotations

import math
from bisect import bisect_left


def ref_value(code: int) -> float:
    """The number of an 8-bit code: 1 sign, 4 exponent (bias 7), 3 mantissa bits."""
    exponent, mantissa = code >> 3 & 15, code & 7
    if exponent == 15 and mantissa == 7:
        return math.nan
    value = mantissa * 2.0**-9 if exponent == 0 else (8 + mantissa) * 2.0 ** (exponent - 10)
    return -value if code & 0x80 else value


MAGNITUDES = [ref_value(code) for code in range(0x7F)]


def ref_code(x: float) -> int:
    """Code of the number nearest to `x`, of two the even one; beyond 448 that of 448.

    NaN of either sign is 0x7F; the sign of a zero stays.
    """
    if math.isnan(x):
        return 0x7F
    sign = 0x80 if math.copysign(1.0, x) < 0 else 0
    magnitude = min(abs(x), MAGNITUDES[-1])
    above = bisect_left(MAGNITUDES, magnitude)
    if MAGNITUDES[above] == magnitude:
        return sign | above
    low, high = magnitude - MAGNITUDES[above - 1], MAGNITUDES[above] - magnitude
    take_high = high < low or (high == low and above % 2 == 0)
    return sign | (above if take_high else above - 1)
