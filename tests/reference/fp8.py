"""Oracle of the FP8 cache formats: one value at a time, compared with exact midpoints.

Source: FP8 Formats for Deep Learning (arXiv 2209.05433) §3, without infinities as in its e4m3;
FlashMLA's README ("FP8 KV cache") for the record of 656 bytes.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from typing import Any

import numpy as np

from tests.ops.e4m3 import E4M3_VALUES
from tests.reference.bfloat16 import ref_bits

_LARGEST, _NAN = 0x7E, 0x7F
_POSITIVE = [float(v) for v in E4M3_VALUES[:_NAN]]
F32 = np.float32


def ref_e4m3(x: float) -> int:
    """Code of the number nearest to `x`, the even code of two; past the largest, the largest."""
    if math.isnan(x):
        return _NAN
    sign = 0x80 if math.copysign(1.0, x) < 0 else 0
    if abs(x) >= 448.0:
        return sign | _LARGEST
    above = bisect_left(_POSITIVE, abs(x))
    below = max(above - 1, 0)
    # halves of sums of numbers of four bits are exact
    middle = (_POSITIVE[below] + _POSITIVE[above]) / 2
    if abs(x) == middle:
        return sign | (above if above & 1 == 0 else below)
    return sign | (above if abs(x) > middle else below)


def ref_largest(values: Any) -> np.float32:
    """Largest magnitude of float32 values; NaN does not count."""
    return F32(max((abs(float(v)) for v in values if not math.isnan(v)), default=0.0))


def ref_raw_scale(values: Any) -> np.float32:
    """Scale of a latent tile: absmax / 448, never below the smallest normal float32."""
    return max(ref_largest(values) / F32(448.0), F32(2.0**-126))


def ref_index_scale(values: Any, scale_fmt: str | None) -> np.float32:
    """Scale of an index key or query; "ue8m0": the power of two from there up."""
    scale = max(ref_largest(values), F32(1e-4)) / F32(448.0)
    if scale_fmt is None or math.isinf(scale):
        return scale
    mantissa, exponent = math.frexp(float(scale))
    return F32(2.0 ** (exponent - 1 if mantissa == 0.5 else exponent))


def ref_codes(values: Any, scale: np.float32) -> list[int]:
    """Codes of float32 values over their scale; the quotient is a float32."""
    with np.errstate(all="ignore"):
        return [ref_e4m3(float(F32(v) / scale)) for v in values]


def ref_record(latent: Any, k_pe: Any) -> np.ndarray:
    """uint8 [656]: 512 codes, 4 float32 scales, 64 bfloat16."""
    tiles = np.asarray(latent, F32).reshape(4, 128)
    scales = [ref_raw_scale(tile) for tile in tiles]
    codes = [code for tile, s in zip(tiles, scales, strict=True) for code in ref_codes(tile, s)]
    rope = [ref_bits(float(v)) for v in np.asarray(k_pe, F32)]
    parts = np.uint8(codes), np.float32(scales).view(np.uint8), np.uint16(rope).view(np.uint8)
    return np.concatenate(parts)


def ref_index_key(key: Any, scale_fmt: str | None) -> tuple[np.ndarray, np.float32]:
    """uint8 [128] codes and the scale of an index key or of a query's head."""
    scale = ref_index_scale(key, scale_fmt)
    return np.uint8(ref_codes(key, scale)), scale


def ref_hadamard(x: Any) -> np.ndarray:
    """float64: `x` times the Walsh-Hadamard matrix of Sylvester's order, times width^-0.5."""
    n = len(x)
    signs = [[1 - 2 * (bin(i & j).count("1") & 1) for j in range(n)] for i in range(n)]
    return np.array(signs, np.float64) @ np.asarray(x, np.float64) * n**-0.5
