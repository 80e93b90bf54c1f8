"""Conversion of stored tensors (bfloat16, float16, block FP8, FP4, INT4) to float32.

Source: README_WEIGHTS.md of deepseek-ai/DeepSeek-V3 ("FP8 Weight Documentation"); inference code of
DeepSeek-V4 for FP4.
"""

from __future__ import annotations

import math
import mmap
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fd_dsa.errors import CheckpointError
from fd_dsa.ops.fp4 import E8M0_NAN, E8M0_VALUES, decode_e2m1
from fd_dsa.ops.fp8 import decode_e4m3

SCALE_SUFFIX = "_scale_inv"
FLOAT_DTYPES = ("F32", "BF16", "F16")
FP8, FP4, POWER = "F8_E4M3", "I8", "F8_E8M0"
"""Names in the safetensors format of FP8 and FP4 weights, and of scales that are powers of two."""
BLOCK = 128
"""Rows and columns of a block of FP8 weights with one scale, the only size for GPU kernels."""
FP4_GROUP = 32
"""Values of a row of FP4 weights with one scale."""
# exponents by which scales of one block may differ, so that e4m3 codes still hold every value
_MAX_SPREAD = 14
_OWN_PAGES_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Name, type and place of a tensor in a checkpoint.

    Attributes:
        name: Hugging Face name.
        dtype: name in the safetensors format, such as "BF16".
        file, offset, nbytes: place of the bytes.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int
    nbytes: int


def to_float32(raw: np.ndarray, info: TensorInfo) -> np.ndarray:
    """Convert the bytes of an F32, BF16, F16 or F8_E8M0 tensor, uint8 [nbytes].

    Returns:
        float32 of `info.shape`: a view of `raw` for aligned F32, else a new array.

    Raises:
        CheckpointError: another dtype, or a NaN in F8_E8M0.
    """
    if info.dtype == "F32":
        return np.require(raw.view("<f4"), np.float32, "A").reshape(info.shape)
    if info.dtype == "F16":
        values = _empty(info.shape)
        values.reshape(-1)[...] = raw.view("<f2")
        return values
    if info.dtype == POWER:
        if (found := np.flatnonzero(raw == E8M0_NAN)).size:
            place = [int(i) for i in np.unravel_index(found[0], info.shape)]
            raise CheckpointError(
                f"{info.file}: tensor {info.name!r}: got code 255 (NaN) at {place}, allowed: codes "
                "0 to 254 in F8_E8M0 scales; fetch the file again"
            )
        return E8M0_VALUES[raw].reshape(info.shape)
    if info.dtype != "BF16":
        raise CheckpointError(
            f"{info.file}: tensor {info.name!r}: got dtype {info.dtype}, allowed: "
            f"{', '.join(FLOAT_DTYPES)}, and F8_E4M3 for quantised weights"
        )
    # bfloat16 is the upper half of a float32, and a shift in place needs no second buffer
    values = _empty(info.shape)
    bits = values.reshape(-1).view(np.uint32)
    bits[...] = raw.view("<u2")
    bits <<= 16
    return values


def num_blocks(shape: tuple[int, ...], weight_block_size: tuple[int, int]) -> tuple[int, ...]:
    """Return the shape of a weight's scales: its extents in blocks, rounded up."""
    return tuple(
        -(-extent // block) for extent, block in zip(shape, weight_block_size, strict=True)
    )


def dequantize_blocks(
    codes: np.ndarray, scales: np.ndarray, weight_block_size: tuple[int, int]
) -> np.ndarray:
    """Return W[n, k] = e4m3(codes[n, k]) * scales[n // rows, k // columns], float32.

    Args:
        codes: uint8 [out, in], e4m3 bytes.
        scales: float32 [ceil(out / rows), ceil(in / columns)], multipliers.
    """
    rows, columns = weight_block_size
    values = _empty(codes.shape)
    # one strip of blocks at a time, so that the index array of `take` stays small
    for strip, first in enumerate(range(0, codes.shape[0], rows)):
        part = values[first : first + rows]
        decode_e4m3(codes[first : first + rows], part)
        part *= np.repeat(scales[strip], columns)[: codes.shape[1]]
    return values


def dequantize_groups(codes: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Return W[n, k] = e2m1(code k of row n) * scales[n, k // group], float32 [out, in].

    Args:
        codes: uint8 [out, in / 2], two codes a byte.
        scales: float32 [out, in / group], multipliers of 16 or 32 values.
    """
    rows, width = codes.shape
    values = _empty((rows, 2 * width))
    # strips, so that the index array of `take` stays small
    for first in range(0, rows, BLOCK):
        part = values[first : first + BLOCK]
        decode_e2m1(codes[first : first + BLOCK], part)
        groups = part.reshape(len(part), scales.shape[1], -1)
        groups *= scales[first : first + BLOCK, :, None]
    return values


def dequantize_int4(
    codes: np.ndarray, zeros: np.ndarray, scales: np.ndarray, groups: np.ndarray
) -> np.ndarray:
    """Return W[n, k] = (codes[n, k] - zeros[n, g]) * scales[n, g], g = groups[k], float32.

    Args:
        codes: uint8 [out, in], 0 to 15.
        zeros, scales: float32 [out, groups of a row].
        groups: int [in].
    """
    values = _empty(codes.shape)
    # strips, so that the scale of each value is in memory for few rows
    for first in range(0, len(codes), BLOCK):
        strip = slice(first, first + BLOCK)
        part = values[strip]
        np.subtract(codes[strip], zeros[strip, groups], out=part)
        part *= scales[strip, groups]
    return values


def wide_blocks(codes: np.ndarray, exponents: np.ndarray) -> tuple[int, int]:
    """Count the blocks of an FP4 matrix that FP8 with one scale per block would round.

    FP8 holds a block of 128 x 128 exactly if the exponents of its scales differ by at most 14.
    Groups of zeros do not count.

    Args:
        codes: uint8 [out, in / 2], two codes a byte.
        exponents: uint8 [out, in / 32], e8m0 codes.

    Returns:
        Number of such blocks, and of all blocks.
    """
    signed = exponents.astype(np.int16)
    spreads = _spreads(signed, signed)
    if np.any(spreads > _MAX_SPREAD):
        # without the signs of both codes
        has_values = (codes & 0x77).reshape(*exponents.shape, -1).any(axis=2)
        spreads = _spreads(np.where(has_values, signed, -1), np.where(has_values, signed, 256))
    return int(np.count_nonzero(spreads > _MAX_SPREAD)), spreads.size


def _spreads(highest: np.ndarray, lowest: np.ndarray) -> np.ndarray:
    """Return how far the exponents of each block of a matrix lie apart."""
    for axis, step in enumerate((BLOCK, BLOCK // FP4_GROUP)):
        starts = np.arange(0, highest.shape[axis], step)
        highest = np.maximum.reduceat(highest, starts, axis)
        lowest = np.minimum.reduceat(lowest, starts, axis)
    return highest - lowest


def _empty(shape: tuple[int, ...]) -> np.ndarray:
    """Return a new float32 array. A large one has pages of its own.

    Otherwise freed heap memory between parameters would stay with the process.
    """
    count = math.prod(shape)
    if 4 * count < _OWN_PAGES_BYTES:
        return np.empty(shape, np.float32)
    pages = mmap.mmap(-1, 4 * count, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return np.frombuffer(pages, np.float32, count).reshape(shape)
