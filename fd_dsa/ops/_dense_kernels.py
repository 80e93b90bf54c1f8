"""Launches of the operations between two GEMMs of a layer: one each, float32, no wait.

Each allocates its result, so a capture by Paddle has it in the memory of the graph.
"""

from __future__ import annotations

from typing import Any

import paddle

from fd_dsa.ops._triton import step_kernel

import triton  # isort: skip
import triton.language as tl  # isort: skip

_BLOCK = 1024


def empty_like_rows(x: Any, *shape: int) -> Any:
    """An uninitialised float32 tensor of a shape where `x` lies."""
    return paddle.empty(list(shape), "float32", device=x.place)


@step_kernel(strided=("x_ptr",))
def rms_norm_kernel(
    x_ptr, weight_ptr, out_ptr, stride, epsilon, WIDTH: tl.constexpr, BLOCK: tl.constexpr
):
    """Row `program 0`."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < WIDTH
    x = tl.load(x_ptr + row * stride + column, mask=inside, other=0.0)
    mean_square = tl.sum(x * x, axis=0) / WIDTH
    weight = tl.load(weight_ptr + column, mask=inside, other=0.0)
    normed = x * (1.0 / tl.sqrt_rn(mean_square + epsilon)) * weight
    tl.store(out_ptr + row * WIDTH + column, normed, mask=inside)


def rms_norm(x: Any, weight: Any, epsilon: float) -> Any:
    """x * rsqrt(mean(x^2) + epsilon) * weight over the last axis.

    Args:
        x: float32 [num_tokens, width]; its rows may lie apart.
        weight: float32 [width].
    """
    rows, width = x.shape
    out = empty_like_rows(x, rows, width)
    if rows and width:
        block = triton.next_power_of_2(width)
        options = {"BLOCK": block, "num_warps": 8 if block > 2048 else 4}
        rms_norm_kernel[(rows,)](x, weight, out, x.strides[0], epsilon, width, **options)
    return out


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x)); no intermediate overflows."""
    small = tl.exp(-tl.abs(x))
    return tl.where(x >= 0, 1.0, small) / (1.0 + small)


@step_kernel()
def silu_and_mul_kernel(gate_up_ptr, out_ptr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Block `program 1` of row `program 0`."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < WIDTH
    place = gate_up_ptr + row * (2 * WIDTH) + column
    gate = tl.load(place, mask=inside, other=0.0)
    up = tl.load(place + WIDTH, mask=inside, other=0.0)
    tl.store(out_ptr + row * WIDTH + column, gate * sigmoid(gate) * up, mask=inside)


def silu_and_mul(gate_up: Any) -> Any:
    """silu(gate) * up of the two halves of the last axis.

    Args:
        gate_up: float32 [..., 2 * width], contiguous.
    """
    *outer, both = gate_up.shape
    out, rows, width = empty_like_rows(gate_up, *outer, both // 2), 1, both // 2
    for extent in outer:
        rows *= extent
    if rows and width:
        block = min(_BLOCK, triton.next_power_of_2(width))
        grid = rows, -(-width // block)
        silu_and_mul_kernel[grid](gate_up, out, width, BLOCK=block, num_warps=4)
    return out


@step_kernel()
def rows_at_kernel(
    table_ptr, index_ptr, out_ptr, table_rows, WIDTH: tl.constexpr, BLOCK: tl.constexpr
):
    """Block `program 1` of row `program 0`; zeros where the table has no such row."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < WIDTH
    # one beside every column: a mask of a scalar and a block is none to some interpreters
    source = tl.load(index_ptr + row).to(tl.int64) + tl.zeros([BLOCK], tl.int64)
    exists = (source >= 0) & (source < table_rows)
    values = tl.load(table_ptr + source * WIDTH + column, mask=inside & exists, other=0.0)
    tl.store(out_ptr + row * WIDTH + column, values, mask=inside)


def rows_at(table: Any, index: Any) -> Any:
    """Rows `index` of a table; zeros for an index that it has not.

    Args:
        table: float32 [num_rows, width], contiguous.
        index: int32 or int64 [n].

    Returns:
        float32 [n, width].
    """
    width = table.shape[1]
    out = empty_like_rows(table, index.shape[0], width)
    if index.shape[0] and width:
        block = min(_BLOCK, triton.next_power_of_2(width))
        grid = index.shape[0], -(-width // block)
        rows_at_kernel[grid](table, index, out, table.shape[0], width, BLOCK=block, num_warps=4)
    return out
