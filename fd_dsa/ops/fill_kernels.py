"""Kernels that fill weights on a device with a constant or with random numbers."""

from __future__ import annotations

from collections.abc import Sequence

from fd_dsa.ops.device_functions import to_bfloat16, to_e4m3
from fd_dsa.ops.step_kernel import step_kernel
from fd_dsa.tensor import Tensor

import triton  # isort: skip
import triton.language as tl  # isort: skip

_BLOCK = 1024


@step_kernel()
def fill_kernel(
    out_ptr, start, count, seed, mean, deviation, RANDOM: tl.constexpr, BLOCK: tl.constexpr
):
    """Fill block `program 0` of `count` values from `start` on. uint8 values are e4m3 codes."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    values = tl.zeros([BLOCK], tl.float32) + mean
    if RANDOM:
        values += tl.randn(seed, place.to(tl.uint32)) * deviation
    if out_ptr.dtype.element_ty == tl.uint8:
        values = to_e4m3(values)
    elif out_ptr.dtype.element_ty == tl.bfloat16:
        values = to_bfloat16(values)
    tl.store(out_ptr + start + place, values, mask=place < count)


@step_kernel()
def fill_codes_kernel(out_ptr, start, count, seed, INTEGERS: tl.constexpr, BLOCK: tl.constexpr):
    """Fill block `program 0` of `count` bytes from `start` on with two codes of four bits each."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    low = tl.randint(seed, place.to(tl.uint32)).to(tl.uint32, bitcast=True)
    high = (low >> 4) & 15
    low = low & 15
    if INTEGERS:
        # 0 has no opposite number, as the zero point is 8
        low = tl.where(low == 0, 8, low)
        high = tl.where(high == 0, 8, high)
    tl.store(out_ptr + start + place, (high * 16 + low).to(tl.uint8), mask=place < count)


def fill_random(out: Tensor, start: int, count: int, seed: Sequence[int], deviation: float) -> None:
    """Fill `count` values of a contiguous tensor with normal numbers of mean 0.

    Args:
        out: float32, bfloat16, or uint8 (e4m3 codes).
        start: index of the first value, in memory order.
        count: number of values.
        seed: integers that select the sequence. After 2^32 values the sequence repeats.
        deviation: standard deviation of the numbers.
    """
    _fill(out, start, count, _mixed(seed), 0.0, deviation)


def fill_codes(out: Tensor, start: int, count: int, seed: Sequence[int], kind: str) -> None:
    """Fill `count` bytes of a contiguous tensor with uniform codes of four bits, of mean 0.

    A mean other than 0 would add the same vector to the rows of all requests in every layer. In the
    end all rows would select the same experts.

    Args:
        out: uint8, codes of FourBitWeight in any order.
        start: index of the first byte, in memory order.
        count: number of bytes.
        seed: integers that select the sequence.
        kind: as in FourBitWeight. Integers are 1 to 15 around the zero point 8.
    """
    if count:
        fill_codes_kernel[(triton.cdiv(count, _BLOCK),)](
            out, start, count, _mixed(seed),
            INTEGERS=kind == "int4", BLOCK=_BLOCK, num_warps=4,
        )  # fmt: skip


def fill_constant(out: Tensor, start: int, count: int, value: float) -> None:
    """Fill `count` values of a contiguous tensor from value `start` on, in memory order."""
    _fill(out, start, count, 0, value, None)


def _fill(
    out: Tensor, start: int, count: int, seed: int, mean: float, deviation: float | None
) -> None:
    if count:
        grid = (triton.cdiv(count, _BLOCK),)
        fill_kernel[grid](
            out, start, count, seed, mean, deviation or 0.0,
            RANDOM=deviation is not None, BLOCK=_BLOCK, num_warps=4,
        )  # fmt: skip


def _mixed(seed: Sequence[int]) -> int:
    """Return one seed of 31 bits."""
    mixed = 0
    for number in seed:
        mixed = (mixed * 0x9E3779B1 + number) & 0x7FFFFFFF
    return mixed
