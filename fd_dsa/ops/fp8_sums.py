"""Sums of FP8 tiles for kernels of other modules: device functions.

Tensor cores multiply the codes. Each group of 128 along K is scaled and added in float32.

Source: DeepSeek-V3 (arXiv 2412.19437) §3.3.2, promotion of partial sums every 128 values.
"""

from __future__ import annotations

from fd_dsa.ops.dense_kernels import GROUP
from fd_dsa.triton_runtime import start_next, wait_for_inputs

import triton  # isort: skip
import triton.language as tl  # isort: skip

_GROUP = tl.constexpr(GROUP)


@triton.jit
def operand(codes, NATIVE: tl.constexpr):
    """Return a tile of e4m3 codes for `tl.dot`, as float16 if not NATIVE. The values are exact."""
    if not NATIVE:
        bits = codes.to(tl.uint16)
        # the exponents' biases differ by 8
        half = ((bits & 0x7F) << 7 | (bits & 0x80) << 8).to(tl.float16, bitcast=True) * 256.0
        codes = tl.where((bits & 0x7F) == 0x7F, float("nan"), half)
    return codes


@triton.jit
def fp8_pointer(pointer, NATIVE: tl.constexpr):
    """Return a pointer to codes, of Triton's e4m3 type if NATIVE, else to bytes."""
    return pointer.to(tl.pointer_type(tl.float8e4nv)) if NATIVE else pointer


@triton.jit
def _scaled_dot(rows, columns, scale):
    """Multiply tiles [rows, K] and [columns, K], and scale rows. Few rows give the transpose."""
    if rows.shape[0] < 128:
        return tl.dot(columns, tl.trans(rows)) * scale[None, :]
    else:
        return tl.dot(rows, tl.trans(columns)) * scale[:, None]


@triton.jit
def fp8_sums(
    x,
    x_scales,
    live,
    weight,
    scales,
    to_up,
    to_up_scales,
    x_stride,
    first,
    last,
    WIDTH: tl.constexpr,
    GATED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    NATIVE: tl.constexpr,
):
    """Return float32 [rows, columns] sums over the groups from `first` to `last` along K.

    With GATED also the sums of the second half of the weight are returned.

    Args:
        x: pointers [rows, 1] to the first code of each row.
        x_scales: pointers [rows] to the first scale of each row.
        x_stride: distance from the scale of a group to that of the next group.
        live: mask [rows] of the rows to load.
        weight: pointers [columns, 1] to the first code of each column.
        scales: pointer to the first scale of these columns.
        to_up, to_up_scales: distances to the second half, in codes and in scales.
    """
    place = tl.arange(0, _GROUP)[None, :]
    if BLOCK_ROWS < 128:
        total = tl.zeros([BLOCK_COLUMNS, BLOCK_ROWS], tl.float32)
    else:
        total = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], tl.float32)
    up_total = total
    row_scale = tl.load(x_scales + first * x_stride, mask=live, other=0.0)
    scale, up_scale = tl.load(scales + first), 0.0
    if GATED:
        up_scale = tl.load(scales + to_up_scales + first)
    for group in range(first, last):
        at = group * _GROUP + place
        if WIDTH % 128 == 0:
            rows = tl.load(x + at, mask=live[:, None], other=0.0)
            columns = tl.load(weight + at)
        else:
            rows = tl.load(x + at, mask=live[:, None] & (at < WIDTH), other=0.0)
            columns = tl.load(weight + at, mask=at < WIDTH, other=0.0)
        # scales are loaded one group ahead, because a wait for them would stall the copies ahead
        ahead = tl.minimum(group + 1, last - 1)
        next_row_scale = tl.load(x_scales + ahead * x_stride, mask=live, other=0.0)
        next_scale = tl.load(scales + ahead)
        rows = operand(rows, NATIVE)
        total += _scaled_dot(rows, operand(columns, NATIVE), row_scale * scale)
        if GATED:
            if WIDTH % 128 == 0:
                columns = tl.load(weight + to_up + at)
            else:
                columns = tl.load(weight + to_up + at, mask=at < WIDTH, other=0.0)
            next_up_scale = tl.load(scales + to_up_scales + ahead)
            up_total += _scaled_dot(rows, operand(columns, NATIVE), row_scale * up_scale)
            up_scale = next_up_scale
        row_scale, scale = next_row_scale, next_scale
    if BLOCK_ROWS < 128:
        total, up_total = tl.trans(total), tl.trans(up_total)
    return total, up_total


@triton.jit
def sums_of_stages(
    x, x_scales, live, weight, scales, x_stride, first, last, BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr, NATIVE: tl.constexpr, GROUPS: tl.constexpr,
    ONE_STAGE: tl.constexpr,
):  # fmt: skip
    """Wait for inputs, and return the first result of `fp8_sums` by stages of GROUPS groups.

    The warps divide the groups of a stage, and add their sums at the end. So a tile may have 16
    columns, and a few rows give a launch enough programs without parts of a sum.
    """
    group = tl.arange(0, GROUPS)
    place = group[:, None, None] * _GROUP + tl.arange(0, _GROUP)[None, None, :]
    x, weight = x[None, :, :] + place, weight[None, :, :] + place
    x_scales = x_scales[None, :] + group[:, None] * x_stride
    scales += group
    # nothing writes weights, so their loads need no inputs
    scale = tl.load(scales + first)
    if ONE_STAGE:
        columns = operand(tl.load(weight + first * _GROUP), NATIVE)
        wait_for_inputs()
        start_next()
        row_scale = tl.load(x_scales + first * x_stride, mask=live[None, :], other=0.0)
        rows = tl.load(x + first * _GROUP, mask=live[None, :, None], other=0.0)
        rows = tl.permute(operand(rows, NATIVE), (0, 2, 1))
        total = tl.dot(columns, rows) * (row_scale * scale[:, None])[:, None, :]
    else:
        wait_for_inputs()
        total = tl.zeros([GROUPS, BLOCK_COLUMNS, BLOCK_ROWS], tl.float32)
        row_scale = tl.load(x_scales + first * x_stride, mask=live[None, :], other=0.0)
        for step in range(first, last, GROUPS):
            rows = tl.load(x + step * _GROUP, mask=live[None, :, None], other=0.0)
            columns = tl.load(weight + step * _GROUP)
            # as in `fp8_sums`
            ahead = tl.minimum(step + GROUPS, last - GROUPS)
            next_row_scale = tl.load(x_scales + ahead * x_stride, mask=live[None, :], other=0.0)
            next_scale = tl.load(scales + ahead)
            rows = tl.permute(operand(rows, NATIVE), (0, 2, 1))
            both = row_scale * scale[:, None]
            total += tl.dot(operand(columns, NATIVE), rows) * both[:, None, :]
            row_scale, scale = next_row_scale, next_scale
        start_next()
    return tl.trans(tl.sum(total, 0))
