"""Cache rows on a CPU: scattered by NumPy, float32 as they are, bfloat16 as int16 bits."""

from __future__ import annotations

from typing import Any

import numpy as np

from fd_dsa.ops._host import Scratch, as_numpy


def bfloat16_bits(x: np.ndarray) -> np.ndarray:
    """int16 bits of `x` rounded to bfloat16, nearest even; NaN stays NaN."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    rounded = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    # rounding a NaN's mantissa up could carry into an infinity
    rounded = np.where(np.isnan(x), np.uint32(0x7FC00000), rounded)
    return (rounded >> np.uint32(16)).astype(np.uint16).view(np.int16)


def write_rows(cache: Any, parts: tuple[Any, ...], slot_mapping: Any) -> None:
    """Scatter the parts to `cache[slot]`; see `write_cache`."""
    rows, slots = as_numpy(cache), as_numpy(slot_mapping)
    keep = slots >= 0
    everything = bool(keep.all())
    if not everything:
        slots = slots[keep]
    start = 0
    for part in parts:
        values = as_numpy(part)
        if not everything:
            values = values[keep]
        if rows.dtype == np.int16:
            values = bfloat16_bits(values)
        rows[slots, start : start + values.shape[1]] = values
        start += values.shape[1]


def gather_rows(cache: np.ndarray, index: np.ndarray, out: np.ndarray, scratch: Scratch) -> None:
    """`out[i] = cache[index[i]]` as float32 along the first axis.

    Args:
        cache: [n, ...] float32, or int16 holding bfloat16 bits.
        index: int64 [m]; entries lie in [0, n), which the step's checks see to: one outside
            would be moved to the nearest, not refused.
        out: float32 [m, ...], C-contiguous.
    """
    if cache.dtype == np.float32:
        np.take(cache, index, axis=0, out=out, mode="clip")
        return
    bits = scratch.take("gather_bits", out.shape, np.int16)
    np.take(cache, index, axis=0, out=bits, mode="clip")
    wide = out.view(np.uint32)
    wide[...] = bits.view(np.uint16)
    np.left_shift(wide, np.uint32(16), out=wide)
