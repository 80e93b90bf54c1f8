"""Launches of the operations between two GEMMs of a layer: one each, no wait for the device.

Activations are float32 or bfloat16; sums are in float32, and results have the type of the
activations, rounded once. The quantised forms write FP8 of the rounded values in the same launch.
Each allocates its result, so a capture by Paddle has it in the memory of the graph.
"""

from __future__ import annotations

from typing import Any

from fd_dsa.ops.device_functions import stored, widened
from fd_dsa.ops.fp8_rows import GROUP, Fp8Rows, empty_fp8_rows, places_of, store_groups
from fd_dsa.ops.step_kernel import step_kernel
from fd_dsa.tensor import Tensor
from fd_dsa.triton_runtime import start_next, wait_for_inputs

import triton  # isort: skip
import triton.language as tl  # isort: skip

_BLOCK = 1024


def empty_beside(x: Tensor, *shape: int, dtype: str | None = None) -> Tensor:
    """An uninitialised tensor on the device of `x`, of its type unless another one is named."""
    import paddle

    return paddle.empty(list(shape), dtype or x.dtype, device=x.place)


@step_kernel(strided=("x_ptr",), waits=True)
def rms_norm_kernel(
    x_ptr,
    delta_ptr,
    weight_ptr,
    sum_ptr,
    out_ptr,
    codes_ptr,
    scales_ptr,
    stride,
    scale_stride,
    epsilon,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ROUND_SCALES: tl.constexpr,
):
    """Row `program 0`; `delta_ptr` and `sum_ptr`, `codes_ptr` and `scales_ptr` may be None."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < WIDTH
    weight = tl.load(weight_ptr + column, mask=inside, other=0.0)
    wait_for_inputs()
    start_next()
    x = widened(tl.load(x_ptr + row * stride + column, mask=inside, other=0.0))
    if delta_ptr is not None:
        x += widened(tl.load(delta_ptr + row * WIDTH + column, mask=inside, other=0.0))
        rounded = stored(x, sum_ptr)
        tl.store(sum_ptr + row * WIDTH + column, rounded, mask=inside)
        x = widened(rounded)
    mean_square = tl.sum(x * x, axis=0) / WIDTH
    normed = stored(x * (1.0 / tl.sqrt_rn(mean_square + epsilon)) * weight, out_ptr)
    tl.store(out_ptr + row * WIDTH + column, normed, mask=inside)
    if codes_ptr is not None:
        codes, scales = codes_ptr + row * WIDTH, scales_ptr + row
        store_groups(widened(normed), codes, scales, scale_stride, WIDTH, BLOCK, ROUND_SCALES)


def rms_norm(
    x: Tensor,
    delta: Tensor | None,
    weight: Tensor,
    epsilon: float,
    round_scales: bool | None = None,
) -> tuple[Tensor | None, Tensor, Fp8Rows | None]:
    """x + delta, that sum's norm, and the norm in FP8; one launch.

    The sum is rounded to the type of `x`; of that, sum * rsqrt(mean(sum^2) + epsilon) * weight.

    Args:
        x: float32 or bfloat16 [num_tokens, width]; there may be gaps between its rows.
        delta: like `x`, contiguous; None: the norm is that of `x`, and the sum None.
        weight: float32 [width].
        epsilon: added to the mean square.
        round_scales: whether scales are powers of two (`scale_fmt` "ue8m0"); None: no FP8.
    """
    rows, width = x.shape
    out = empty_beside(x, rows, width)
    total = None if delta is None else empty_beside(x, rows, width)
    quantized = None if round_scales is None else empty_fp8_rows(x, rows, width)
    if rows and width:
        _, codes, scales, scale_stride = places_of(quantized)
        block = max(GROUP, triton.next_power_of_2(width))
        rms_norm_kernel[(rows,)](
            x,
            delta,
            weight,
            total,
            out,
            codes,
            scales,
            x.strides[0],
            scale_stride,
            epsilon,
            WIDTH=width,
            BLOCK=block,
            ROUND_SCALES=bool(round_scales),
            # a few rows wait for memory alone: more threads have more of the row on its way
            num_warps=4 if block <= 2048 else 8 if block <= 4096 else 16,
        )
    return total, out, quantized


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x)); no intermediate overflows."""
    small = tl.exp(-tl.abs(x))
    return tl.where(x >= 0, 1.0, small) / (1.0 + small)


@step_kernel(waits=True)
def activate_kernel(
    x_ptr,
    out_ptr,
    codes_ptr,
    scales_ptr,
    scale_stride,
    WIDTH: tl.constexpr,
    GATED: tl.constexpr,
    BLOCK: tl.constexpr,
    ROUND_SCALES: tl.constexpr,
):
    """Block `program 1` of row `program 0`; with `codes_ptr` the result is written in FP8 alone.

    GATED: silu of the first half of a row times the second one; else the row as it is.
    """
    wait_for_inputs()
    start_next()
    row, first = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK
    column = first + tl.arange(0, BLOCK)
    inside = column < WIDTH
    place = x_ptr + row * (2 * WIDTH if GATED else WIDTH) + column
    values = tl.load(place, mask=inside, other=0.0)
    if GATED:
        gate, up = widened(values), widened(tl.load(place + WIDTH, mask=inside, other=0.0))
        values = stored(gate * sigmoid(gate) * up, x_ptr)
    if codes_ptr is None:
        tl.store(out_ptr + row * WIDTH + column, values, mask=inside)
    else:
        codes = codes_ptr + row * WIDTH + first
        scales = scales_ptr + (first // 128) * scale_stride + row
        left = WIDTH - first
        store_groups(widened(values), codes, scales, scale_stride, left, BLOCK, ROUND_SCALES)


def silu_and_mul(gate_up: Tensor, round_scales: bool | None = None) -> Tensor | Fp8Rows:
    """silu(gate) * up of the two halves of each row, in the type of `gate_up` or as Fp8Rows.

    Args:
        gate_up: float32 or bfloat16 [num_tokens, 2 * width], contiguous.
        round_scales: of FP8, as of `rms_norm`.
    """
    return _activated(gate_up, gate_up.shape[1] // 2, round_scales, gated=True)


def quantize_rows(x: Tensor, round_scales: bool) -> Fp8Rows:
    """FP8 of rows: codes by rounding to nearest even, past 448 the largest, NaN 0x7F.

    A scale is a 448th of its group's largest magnitude, at least 1e-12; NaN does not count.

    Args:
        x: float32 or bfloat16 [rows, width], contiguous.
        round_scales: scales are rounded up to powers of two (`scale_fmt` "ue8m0").
    """
    return _activated(x, x.shape[1], round_scales, gated=False)


def _activated(x: Tensor, width: int, round_scales: bool | None, *, gated: bool) -> Any:
    """A launch over `x`, whose result has `width` columns."""
    rows, empty = x.shape[0], empty_beside if round_scales is None else empty_fp8_rows
    out = empty(x, rows, width)
    if rows and width:
        block = min(_BLOCK, max(GROUP, triton.next_power_of_2(width)))
        activate_kernel[rows, -(-width // block)](
            x, *places_of(out), width, gated, block, bool(round_scales), num_warps=4
        )
    return out


@step_kernel(waits=True)
def rows_at_kernel(
    table_ptr, index_ptr, out_ptr, table_rows, WIDTH: tl.constexpr, BLOCK: tl.constexpr
):
    """Block `program 1` of row `program 0`; zeros where the table has no such row."""
    wait_for_inputs()
    start_next()
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < WIDTH
    # one beside every column: a mask of a scalar and a block is none to some interpreters
    source = tl.load(index_ptr + row).to(tl.int64) + tl.zeros([BLOCK], tl.int64)
    exists = (source >= 0) & (source < table_rows)
    values = tl.load(table_ptr + source * WIDTH + column, mask=inside & exists, other=0.0)
    tl.store(out_ptr + row * WIDTH + column, values, mask=inside)


def rows_at(table: Tensor, index: Tensor, out: Tensor | None = None) -> Tensor:
    """Rows `index` of a table, [n, width] in its type; zeros for an index that it has not.

    Args:
        table: float32 or bfloat16 [num_rows, width], contiguous.
        index: int32 or int64 [n].
        out: what they are written to; None: a new tensor.
    """
    width = table.shape[1]
    out = empty_beside(table, index.shape[0], width) if out is None else out
    if index.shape[0] and width:
        block = min(_BLOCK, triton.next_power_of_2(width))
        grid = index.shape[0], -(-width // block)
        rows_at_kernel[grid](table, index, out, table.shape[0], width, BLOCK=block, num_warps=4)
    return out
