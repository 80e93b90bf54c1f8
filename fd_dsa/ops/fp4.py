"""float4_e2m1fn and float8_e8m0fnu on a CPU: codes and values.

An e2m1 code has 1 sign bit, 2 exponent bits (bias 1) and 1 mantissa bit. The largest number is 6,
and there is neither infinity nor NaN. A byte holds two codes, the first one in the low bits. An
e8m0 code is an exponent of 2 with the bias 127. It has no sign, and code 255 is NaN.

Source: OCP Microscaling Formats (MX) Specification 1.0, sections 5.3.3 and 5.4.1.
"""

from __future__ import annotations

import numpy as np

E8M0_NAN = np.uint8(0xFF)
PIECE = 128
"""Number of values of a row that are contiguous in the layout of a device, see FourBitWeight."""
FACTOR_POWER = {"e4m3": 19, "e8m0": 26}
"""Exponent of 2 by which a device's factors of e2m1 matrices are raised, for each kind of scales.

A kernel reads an e2m1 code as the bits of a bfloat16, which is 2^-126 times its value. The kernel
raises scales of e4m3 by 2^107, so that their exponent needs no addition. It raises powers of two by
2^100, so that those up to 2^27 stay finite.
"""
MAX_E8M0 = 127 + 27
"""Largest e8m0 code of such scales."""
_MAGNITUDES = np.array([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], np.float32)
E2M1_VALUES = np.concatenate([_MAGNITUDES, -_MAGNITUDES])


def _pair_table() -> np.ndarray:
    """Return the two values of each byte side by side as one uint64 [256]."""
    byte = np.arange(256)
    pairs = np.stack([E2M1_VALUES[byte & 15], E2M1_VALUES[byte >> 4]], axis=1)
    return pairs.view(np.uint64)[:, 0]


def _power_table() -> np.ndarray:
    """Return the value of each e8m0 code, float32 [256]."""
    bits = np.arange(256, dtype=np.uint32) << np.uint32(23)
    # 2^-127 is subnormal
    bits[0] = 1 << 22
    bits[E8M0_NAN] |= np.uint32(1 << 22)
    return bits.view(np.float32)


_PAIRS = _pair_table()
E8M0_VALUES = _power_table()


def decode_e2m1(codes: np.ndarray, out: np.ndarray) -> None:
    """Write float32 values [..., 2 * n] of bytes uint8 [..., n] to contiguous `out`."""
    np.take(_PAIRS, codes, out=out.view(np.uint64), mode="clip")
