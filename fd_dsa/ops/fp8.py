"""float8_e4m3fn on a CPU: codes, values, and the scales of a quantized tile.

A code has 1 sign bit, 4 exponent bits (bias 7) and 3 mantissa bits. The largest number is 448.
There is no infinity, and the two codes with all exponent and mantissa bits set are NaN. Every
function gives the same bits as the kernels on a device: float32 arithmetic, each operation rounded
once.

Source: FP8 Formats for Deep Learning (arXiv 2209.05433); tiles and scales as in DeepSeek-V3.2-Exp's
inference/kernel.py and FlashMLA's 656-byte records.
"""

from __future__ import annotations

import numpy as np

E4M3_MAX = np.float32(448.0)
E4M3_NAN = np.uint8(0x7F)
# smallest scale of a raw tile, so that the division by it stays finite
_MIN_SCALE = np.finfo(np.float32).tiny
# smallest maximum of an index scale, as in DeepSeek's quantizer
_MIN_ABSMAX = np.float32(1e-4)
_SIGN = np.uint32(0x80000000)
_SMALLEST_NORMAL = np.float32(2.0**-6)
# adding 2^14 leaves 2^-9, the step of the subnormals, as the last bit of a float32
_SUBNORMAL_MAGIC = np.float32(2.0**14)


def _value_table() -> np.ndarray:
    """Return the value of each code, float32 [256]."""
    code = np.arange(256)
    exponent, mantissa = (code >> 3) & 15, code & 7
    normal = np.ldexp(1.0 + mantissa / 8.0, exponent - 7)
    value = np.where(exponent == 0, np.ldexp(mantissa / 8.0, -6), normal)
    value[(code & 127) == 127] = np.nan
    return np.where(code < 128, value, -value).astype(np.float32)


E4M3_VALUES = _value_table()


def encode_e4m3(x: np.ndarray) -> np.ndarray:
    """Return uint8 codes of float32 `x`, rounded to nearest even.

    Values beyond 448 get the largest code. Zeros keep their sign. NaN of either sign becomes 0x7F,
    as with NVIDIA's cvt.satfinite.
    """
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    sign = (bits & _SIGN) >> np.uint32(24)
    bits = bits & ~_SIGN
    magnitude = bits.view(np.float32)
    nan = np.isnan(magnitude)
    # a NaN gets its code last, because arithmetic on a signalling NaN warns
    magnitude = np.minimum(np.where(nan, np.float32(0.0), magnitude), E4M3_MAX)
    bits = magnitude.view(np.uint32)
    # round off the 20 bits below the mantissa, then change the exponent's bias from 127 to 7
    odd = (bits >> np.uint32(20)) & np.uint32(1)
    normal = ((bits + np.uint32(0x7FFFF) + odd) >> np.uint32(20)) - np.uint32((127 - 7) << 3)
    small = magnitude < _SMALLEST_NORMAL
    subnormal = (magnitude + _SUBNORMAL_MAGIC).view(np.uint32) - _SUBNORMAL_MAGIC.view(np.uint32)
    codes = (np.where(small, subnormal, normal) | sign).astype(np.uint8)
    codes[nan] = E4M3_NAN
    return codes


def decode_e4m3(codes: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
    """Return float32 values of uint8 codes, written to `out` if it is given."""
    return np.take(E4M3_VALUES, codes, out=out, mode="clip")


def absolute_maximum(tiles: np.ndarray) -> np.ndarray:
    """Return the largest magnitude over the last axis, float32 [...], 0 if all values are NaN.

    NaN is ignored.
    """
    with np.errstate(invalid="ignore"):
        return np.fmax.reduce(np.abs(tiles), axis=-1, initial=np.float32(0.0))


def raw_scale(absmax: np.ndarray) -> np.ndarray:
    """Return the scales of latent tiles: max(absmax / 448, smallest normal float32)."""
    return np.maximum(absmax / E4M3_MAX, _MIN_SCALE)


def index_scale(absmax: np.ndarray, scale_fmt: str | None) -> np.ndarray:
    """Return the scales of index keys and queries: a / 448 with a = max(absmax, 1e-4).

    Args:
        absmax: float32, without NaN.
        scale_fmt: "ue8m0" rounds scales up to powers of two, None leaves them.
    """
    scale = np.maximum(absmax, _MIN_ABSMAX) / E4M3_MAX
    if scale_fmt is None:
        return scale
    bits = scale.view(np.uint32)
    exponent = (bits >> np.uint32(23)) + ((bits & np.uint32(0x7FFFFF)) != 0)
    return (exponent << np.uint32(23)).astype(np.uint32).view(np.float32)


def quantise(tiles: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Return uint8 codes of tiles [..., width] divided by their scales [...]."""
    # inf / inf is NaN, which marks the key of a broken token
    with np.errstate(invalid="ignore", over="ignore"):
        return encode_e4m3(tiles / scales[..., None])
