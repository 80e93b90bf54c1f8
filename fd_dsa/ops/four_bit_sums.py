"""Sums of a GEMM whose weight has four bits and whose activations are bfloat16.

Codes become bfloat16 in registers, exactly. Scales of one byte multiply the values there, because
bfloat16 holds an e2m1 number times an e4m3 number or a power of two. Scales of integers have more
bits, so they multiply the float32 sum of their group.

Source: PTX ISA 8.5, `fma` for bf16, which keeps denormal numbers.
"""

from __future__ import annotations

from fd_dsa.ops.device_functions import added_dot, to_bfloat16, widened
from fd_dsa.triton_runtime import INTERPRETING

import triton  # isort: skip
import triton.language as tl  # isort: skip

_INTERPRETING = tl.constexpr(INTERPRETING)


@triton.jit
def _product(x, y):
    """Multiply bfloat16 tiles with exact results. The interpreter multiplies only float32."""
    if _INTERPRETING:
        return to_bfloat16(widened(x) * widened(y))
    return x * y


@triton.jit
def _difference(x, y):
    """Subtract bfloat16 tiles with exact results."""
    if _INTERPRETING:
        return to_bfloat16(widened(x) - widened(y))
    return x - y


@triton.jit
def _halves(pairs):
    """Return the lower and the upper bfloat16 of each uint32."""
    low = pairs.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return low, (pairs >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)


@triton.jit
def _power(EXPONENT: tl.constexpr):
    """Return 2^EXPONENT as bfloat16 [1, 1]."""
    return tl.full([1, 1], (EXPONENT + 127) << 7, tl.uint16).to(tl.bfloat16, bitcast=True)


@triton.jit
def _small_scales(codes, KIND: tl.constexpr):
    """Return bfloat16 scales times 2^100 of e4m3 or e8m0 codes, see `fp4.FACTOR_POWER`."""
    bits = codes.to(tl.uint16)
    if KIND == "e8m0":
        return ((bits + 100) << 7).to(tl.bfloat16, bitcast=True)
    # the biases differ by 120, and 2^220 is no bfloat16
    scales = ((bits & 0x7F) << 4 | (bits & 0x80) << 8).to(tl.bfloat16, bitcast=True)
    return _product(_product(scales, _power(127)), _power(93))


@triton.jit
def _e2m1_sums(
    rows, codes, scales, at, total, COLUMNS: tl.constexpr, GROUP: tl.constexpr, KIND: tl.constexpr
):
    """Add the dots of 32 values along K to `total`, in e2m1."""
    byte = tl.arange(0, 16)[None, :]
    bits = tl.load(codes + at // 2 * COLUMNS + byte).to(tl.uint32)
    to_scales = scales + at // GROUP * COLUMNS
    scale = _small_scales(tl.load(to_scales), KIND)
    if GROUP == 16:
        scale = tl.where(
            tl.arange(0, 32)[None, :] < 16, scale, _small_scales(tl.load(to_scales + COLUMNS), KIND)
        )
    # a factor shifts the bits of both codes
    low, high = _halves(bits * 0x40040 & 0x01C001C0 | bits * 0x01001000 & 0x80008000)
    columns = _product(tl.interleave(low, high), scale)
    return added_dot(rows, columns, total)


@triton.jit
def _int4_sums(rows, codes, scales, zeros, at, total, COLUMNS: tl.constexpr, GROUP: tl.constexpr):
    """Add the scaled dots of a group of integers to `total`."""
    byte = tl.arange(0, GROUP // 2)[None, :]
    bits = tl.load(codes + at // 2 * COLUMNS + byte).to(tl.uint32)
    group = at // GROUP * COLUMNS
    scale = widened(tl.load(scales + group)).to(tl.float32)
    # the last bits of a bfloat16 from 128 to 255 count ones
    zero = tl.full([1, 1], 8, tl.uint16)
    if zeros is not None:
        zero = tl.load(zeros + group).to(tl.uint16)
    zero = (zero | 0x4300).to(tl.bfloat16, bitcast=True)
    low, high = _halves(bits * 0x1001 & 0x000F000F | 0x43004300)
    columns = _difference(tl.interleave(low, high), zero)
    part = added_dot(rows, columns, tl.zeros_like(total))
    return total + part * (scale if rows.shape[0] < 128 else tl.trans(scale))


@triton.jit
def _added_piece(
    rows,
    codes,
    scales,
    zeros,
    at,
    total,
    COLUMNS: tl.constexpr,
    GROUP: tl.constexpr,
    KIND: tl.constexpr,
):
    """Add the dots of the values from `at` on along K to `total`."""
    if KIND == "int4":
        return _int4_sums(rows, codes, scales, zeros, at, total, COLUMNS, GROUP)
    else:
        return _e2m1_sums(rows, codes, scales, at, total, COLUMNS, GROUP, KIND)


@triton.jit
def four_bit_sums(
    x,
    live,
    expert,
    column,
    codes_ptr,
    scales_ptr,
    zeros_ptr,
    factors_ptr,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    GATED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    GROUP: tl.constexpr,
    KIND: tl.constexpr,
):
    """Return the float32 sums [rows, columns] of both parts of a FourBitWeight, see `fp8_sums`.

    Args:
        x: pointers [rows, 1] to the first value of each row.
        live: mask [rows] of the rows to load.
        expert: expert of the tile, int64.
        column: columns of the tile in a part [columns, 1].
    """
    values: tl.constexpr = GROUP if KIND == "int4" else 32
    # a turn of the loop has the loads of 128 values in flight
    pieces: tl.constexpr = 128 // values if WIDTH % 128 == 0 else 1
    parts: tl.constexpr = 2 if GATED else 1
    to_up: tl.constexpr = COLUMNS * (WIDTH // 2)
    to_up_scales: tl.constexpr = COLUMNS * (WIDTH // GROUP)
    codes = codes_ptr + expert * (parts * to_up) + column * (values // 2)
    scales = scales_ptr + expert * (parts * to_up_scales) + column
    zeros = None if zeros_ptr is None else zeros_ptr + expert * (parts * to_up_scales) + column
    up_zeros = None if zeros_ptr is None else zeros + to_up_scales
    place = tl.arange(0, values)[None, :]
    if BLOCK_ROWS < 128:
        total = tl.zeros([BLOCK_COLUMNS, BLOCK_ROWS], tl.float32)
    else:
        total = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], tl.float32)
    up_total = total
    for start in range(0, WIDTH, values * pieces):
        for piece in tl.static_range(pieces):
            at = start + piece * values
            rows = tl.load(x + at + place, mask=live[:, None], other=0.0)
            total = _added_piece(rows, codes, scales, zeros, at, total, COLUMNS, GROUP, KIND)
            if GATED:
                up_total = _added_piece(
                    rows, codes + to_up, scales + to_up_scales, up_zeros, at, up_total,
                    COLUMNS, GROUP, KIND,
                )  # fmt: skip
    if BLOCK_ROWS < 128:
        total, up_total = tl.trans(total), tl.trans(up_total)
    if factors_ptr is not None:
        factor = factors_ptr + expert * parts
        total *= tl.load(factor)
        if GATED:
            up_total *= tl.load(factor + 1)
    return total, up_total
