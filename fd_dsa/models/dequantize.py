"""Conversion of stored tensors (bfloat16, float16, block FP8) to float32.

Source: README_WEIGHTS.md of deepseek-ai/DeepSeek-V3 ("FP8 Weight Documentation").
"""

from __future__ import annotations

import math
import mmap
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fd_dsa.errors import CheckpointError
from fd_dsa.ops.fp8 import decode_e4m3

SCALE_SUFFIX = "_scale_inv"
FLOAT_DTYPES = ("F32", "BF16", "F16")
BLOCK = 128
"""Rows and columns of a block of FP8 weights with one scale, the only size for GPU kernels."""
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
    """Convert the bytes of an F32, BF16 or F16 tensor, uint8 [nbytes].

    Returns:
        float32 of `info.shape`: a view of `raw` for aligned F32, else a new array.

    Raises:
        CheckpointError: another dtype.
    """
    if info.dtype == "F32":
        return np.require(raw.view("<f4"), np.float32, "A").reshape(info.shape)
    if info.dtype == "F16":
        values = _empty(info.shape)
        values.reshape(-1)[...] = raw.view("<f2")
        return values
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


def _empty(shape: tuple[int, ...]) -> np.ndarray:
    """Return a new float32 array. A large one has pages of its own.

    Otherwise freed heap memory between parameters would stay with the process.
    """
    count = math.prod(shape)
    if 4 * count < _OWN_PAGES_BYTES:
        return np.empty(shape, np.float32)
    pages = mmap.mmap(-1, 4 * count, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return np.frombuffer(pages, np.float32, count).reshape(shape)
