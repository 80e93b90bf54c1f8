"""Kernel that fills weights on a device with a constant or with random numbers."""

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


def fill_random(out: Tensor, start: int, count: int, seed: Sequence[int], deviation: float) -> None:
    """Fill `count` values of a contiguous tensor with normal numbers of mean 0.

    Args:
        out: float32, bfloat16, or uint8 (e4m3 codes).
        start: index of the first value, in memory order.
        count: number of values.
        seed: integers that select the sequence. After 2^32 values the sequence repeats.
        deviation: standard deviation of the numbers.
    """
    mixed = 0
    for number in seed:
        mixed = (mixed * 0x9E3779B1 + number) & 0x7FFFFFFF
    _fill(out, start, count, mixed, 0.0, deviation)


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
