"""Operands in block FP8 and in bfloat16 for kernel tests, and their exact values."""

from __future__ import annotations

from typing import Any

import numpy as np

from fd_dsa.ops.cache_write import bfloat16_bits
from fd_dsa.tensor import Fp8Rows
from tests.kernel_memory import KernelMemory
from tests.ops.e4m3 import E4M3_VALUES
from tests.reference.bfloat16 import widened

GROUP = 128


def rounded(values: np.ndarray, dtype: str) -> np.ndarray:
    """float32 values that a type holds: nearest ones."""
    values = np.asarray(values, np.float32)
    if dtype == "float32":
        return values
    return widened(bfloat16_bits(values))


def put(m: KernelMemory, values: np.ndarray, dtype: str) -> Any:
    """A float32 or bfloat16 tensor of values that the type holds."""
    if dtype == "float32":
        return m.put(values, "float32")
    return m.put(bfloat16_bits(np.float32(values)).view(np.uint16), "bfloat16")


def get(m: KernelMemory, tensor: Any) -> np.ndarray:
    """float32 values of a float32 or bfloat16 tensor."""
    array = m.get(tensor)
    return widened(array) if array.dtype == np.uint16 else array


def codes(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """uint8 e4m3 codes of both signs and all sizes, without NaN."""
    drawn = rng.integers(0, 0x7F, shape, np.uint8)
    return drawn | (rng.integers(0, 2, shape, np.uint8) << 7)


def scales(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """float32 scales that differ by powers of two up to 2^8, and in their mantissas."""
    return np.float32(2.0 ** rng.integers(-12, -3, shape) * rng.uniform(1, 2, shape))


def weight(rng: np.random.Generator, *shape: int) -> tuple[np.ndarray, np.ndarray]:
    """Codes [..., out, in] and scales of a weight."""
    *outer, rows, width = shape
    return codes(rng, *shape), scales(rng, *outer, -(-rows // GROUP), -(-width // GROUP))


def weight_values(codes: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """float64 [..., out, in]."""
    every = scales.repeat(GROUP, axis=-2).repeat(GROUP, axis=-1)
    every = every[..., : codes.shape[-2], : codes.shape[-1]]
    return E4M3_VALUES[codes].astype(np.float64) * every


def activations(rng: np.random.Generator, rows: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Return codes and scales of Fp8Rows, with NaN as the scales of padding."""
    stride = max(8, -(-rows // 4) * 4)
    every = np.full((-(-width // GROUP), stride), np.nan, np.float32)
    every[:, :rows] = scales(rng, len(every), rows)
    return codes(rng, rows, width), every


def row_values(codes: np.ndarray, scales: np.ndarray, group: int = GROUP) -> np.ndarray:
    """float64 [rows, width] of Fp8Rows."""
    rows, width = codes.shape
    every = scales[:, :rows].T.repeat(group, axis=1)[:, :width]
    # scales of rows that no kernel writes may be signalling NaNs
    with np.errstate(invalid="ignore"):
        return E4M3_VALUES[codes].astype(np.float64) * every


def put_pair(m: KernelMemory, pair: tuple[np.ndarray, np.ndarray]) -> Fp8Rows:
    """Codes and scales, of rows or of a weight, in a memory."""
    return Fp8Rows(m.put(pair[0]), m.put(pair[1]))


def check_quantized(
    m: KernelMemory, found: Fp8Rows, values: np.ndarray, round_scales: bool, group: int = GROUP
) -> None:
    """The codes and scales are those of float32 `values`, to the bit."""
    from fd_dsa.ops.fp8 import encode_e4m3

    rows, width = values.shape
    groups = -(-width // group)
    padded = np.zeros((rows, groups * group), np.float32)
    padded[:, :width] = values
    tiles = padded.reshape(rows, groups, group)
    largest = np.fmax.reduce(np.abs(tiles), axis=2, initial=np.float32(0))
    wanted = np.maximum(largest / np.float32(448), np.float32(1e-12))
    if round_scales:
        mantissa, exponent = np.frexp(wanted)
        power = np.ldexp(np.float32(1), exponent - (mantissa == 0.5)).astype(np.float32)
        wanted = np.where(np.isinf(wanted), wanted, power)
    with np.errstate(invalid="ignore"):
        tiles = tiles / wanted[:, :, None]
    made = m.get(found.scales)
    assert made.shape == (groups, max(8, -(-rows // 4) * 4))
    np.testing.assert_array_equal(made[:, :rows].T, wanted)
    wanted_codes = encode_e4m3(tiles).reshape(rows, -1)[:, :width]
    np.testing.assert_array_equal(m.get(found.codes), wanted_codes)
