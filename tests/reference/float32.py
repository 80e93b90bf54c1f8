"""Oracle of what becomes of a key before it is stored: float32, one number at a time.

A Python float is a double. Rounding the double result of one +, -, *, / or square root of float32
numbers gives the correctly rounded float32, so `f32` after each operation is float32 arithmetic.
Sums of norms are exact (fsum), divided in double and rounded once.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence

Numbers = Sequence[float]


def f32(x: float) -> float:
    """`x` rounded to float32, infinite where it is too large."""
    return ctypes.c_float(x).value


def ref_latent(row: Numbers, weight: Numbers | None, epsilon: float) -> list[float]:
    """RMSNorm; None = as it is."""
    if weight is None:
        return list(row)
    mean_square = f32(math.fsum(x * x for x in row) / len(row))
    r = f32(1.0 / f32(math.sqrt(f32(mean_square + f32(epsilon)))))
    return [f32(f32(x * r) * w) for x, w in zip(row, weight, strict=True)]


def ref_key(row: Numbers, weight: Numbers | None, bias: Numbers, epsilon: float) -> list[float]:
    """LayerNorm with bias; None = as it is."""
    if weight is None:
        return list(row)
    mean = f32(math.fsum(row) / len(row))
    centred = [f32(x - mean) for x in row]
    variance = f32(math.fsum(d * d for d in centred) / len(row))
    r = f32(1.0 / f32(math.sqrt(f32(variance + f32(epsilon)))))
    scaled = [f32(f32(d * r) * w) for d, w in zip(centred, weight, strict=True)]
    return [f32(x + b) for x, b in zip(scaled, bias, strict=True)]


def ref_rope(row: Numbers, cos_sin: Numbers, interleaved: bool) -> list[float]:
    """The first len(cos_sin) values of `row` rotated, the rest as it is."""
    out, half = list(row), len(cos_sin) // 2
    for j in range(half):
        a, b = (2 * j, 2 * j + 1) if interleaved else (j, j + half)
        cos, sin = cos_sin[j], cos_sin[half + j]
        out[a] = f32(f32(row[a] * cos) - f32(row[b] * sin))
        out[b] = f32(f32(row[b] * cos) + f32(row[a] * sin))
    return out


def ref_hadamard(row: Numbers) -> list[float]:
    """Butterflies of distance 1, 2, 4 up to half the width, then the width's root."""
    out, m = list(row), 1
    while m < len(out):
        for i in range(len(out)):
            if not i & m:
                u, v = out[i], out[i + m]
                out[i], out[i + m] = f32(u + v), f32(u - v)
        m *= 2
    factor = f32(len(out) ** -0.5)
    return [f32(x * factor) for x in out]
