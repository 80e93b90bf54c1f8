"""Activations in block FP8, and the operations between two GEMMs of a layer, one launch each.

Activations are float32 or bfloat16. Sums are in float32, and results are rounded once to the type
of the activations. The quantized forms write FP8 of the rounded values in the same launch. Each
call allocates its result, so in a capture by Paddle the graph owns the memory.

Source: DeepSeek-V3 (arXiv 2412.19437) §3.3.2, fine-grained quantization.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from math import prod
from typing import Any

from fd_dsa.ops.device_functions import (
    absolute_maximum,
    magnitude,
    over_448,
    power_above,
    power_of,
    quotient,
    stored,
    to_e4m3,
    widened,
)
from fd_dsa.ops.step_kernel import step_kernel
from fd_dsa.tensor import Fp8Rows, Normed, Tensor
from fd_dsa.triton_runtime import INTERPRETING, next_power_of_2, start_next, wait_for_inputs
from fd_dsa.triton_runtime.device_api import traits_for
from fd_dsa.triton_runtime.driver import FP8_CAPABILITY

import triton  # isort: skip
import triton.language as tl  # isort: skip

_BLOCK = 1024
GROUP = 128
"""Number of values of a row that share a scale. Blocks of a weight are GROUP x GROUP."""
_GROUP = tl.constexpr(GROUP)


def padded_rows(num_tokens: int) -> int:
    """Return the rows of Fp8Rows for some tokens, as cuBLASLt needs them.

    It is a multiple of 4, at least 8.
    """
    return max(8, -(-num_tokens // 4) * 4)


def empty_fp8_rows(beside: Tensor, rows: int, width: int, group: int = GROUP) -> Fp8Rows:
    """Allocate Fp8Rows on the device of a tensor, without values."""
    place = beside.place
    groups, stride = -(-width // group), padded_rows(rows)
    padded = empty((stride, width), "uint8", place)
    scales = empty((groups, stride), "float32", place)
    return Fp8Rows(padded if rows == stride else padded[:rows], scales, padded)


def kernel_arguments(x: Tensor | Fp8Rows | None) -> tuple[Any, Any, Any, int]:
    """Return (tensor, codes, scales, stride of scales) of a tensor or Fp8Rows for a kernel.

    The stride is the distance from the scales of a group to those of the next group. Entries that
    do not apply are None, or 0 for the stride.
    """
    if isinstance(x, Fp8Rows):
        return None, x.codes, x.scales, x.scales.shape[1]
    return x, None, None, 0


def values_and_scales(x: Tensor | Fp8Rows) -> tuple[Tensor, Tensor | None, int]:
    """Return (tensor or codes, scales, stride of scales), see `kernel_arguments`."""
    plain, codes, scales, stride = kernel_arguments(x)
    return plain if codes is None else codes, scales, stride


def empty_norm(
    beside: Tensor, width: int, round_scales: bool | None
) -> tuple[Tensor | Normed, tuple[Any, Any, Any, int]]:
    """Allocate normed rows [rows of `beside`, width], without values.

    Args:
        beside: activations, whose dtype the rows have.
        round_scales: as for `rms_norm`.

    Returns:
        The rows, as Normed if there is `round_scales`; and (tensor, codes, scales, stride of
        scales) of them for a kernel, see `kernel_arguments`.
    """
    rows = beside.shape[0]
    plain = empty_beside(beside, rows, width)
    if round_scales is None:
        return plain, (plain, None, None, 0)
    fp8 = empty_fp8_rows(beside, rows, width)
    return Normed(plain, fp8), (plain, *kernel_arguments(fp8)[1:])


def native_fp8(x: Tensor) -> bool:
    """Return True if the device of a tensor multiplies e4m3 numbers (capability 8.9 and later)."""
    return not INTERPRETING and traits_for(x).capability >= FP8_CAPABILITY


def empty(shape: Sequence[int], dtype: object, place: object) -> Tensor:
    """Allocate a contiguous Paddle tensor without values.

    `paddle.empty` takes two and a half times as long, because it resolves the names of dtype and
    device. A step of a model with 61 layers allocates 2,000 tensors.

    Args:
        dtype: name of a dtype, or the dtype of a tensor.
        place: place of a tensor.
    """
    # only names, because the hash of a Paddle dtype takes a sixth of the time of the allocation
    native = _paddle_dtype(dtype) if isinstance(dtype, str) else dtype
    return _native_empty()(list(shape), native, place)


@cache
def _native_empty() -> Callable[..., Tensor]:
    import paddle

    native: Callable[..., Tensor] = paddle._C_ops.empty
    return native


@cache
def _paddle_dtype(name: str) -> object:
    import paddle

    return getattr(paddle, name)


def empty_beside(x: Tensor, *shape: int, dtype: str | None = None) -> Tensor:
    """Allocate a tensor on the device of `x`, of its dtype unless another one is named."""
    return empty(shape, dtype or x.dtype, x.place)


@triton.jit
def quantized(groups, ROUND_SCALES: tl.constexpr):
    """Return uint8 codes of `groups` of values [N, M], and the float32 scale of each group [N].

    A scale is the largest magnitude of its group / 448, at least 1e-12. With ROUND_SCALES it is
    rounded up to a power of two.
    """
    scale = tl.maximum(over_448(absolute_maximum(magnitude(groups), 1)), 1e-12)
    if ROUND_SCALES:
        scale = power_of(power_above(scale))
    return to_e4m3(quotient(groups, scale[:, None])), scale


@triton.jit
def store_groups(
    values, codes, scales, stride, left, BLOCK: tl.constexpr, ROUND_SCALES: tl.constexpr
):
    """Quantize and store the first `left` of `values` [BLOCK], a part of a row.

    Values past them are zero. `codes` and `scales` point to the first code and the first scale.
    `stride` is the distance from the scale of a group to that of the next group.
    """
    groups: tl.constexpr = BLOCK // _GROUP
    own, scale = quantized(tl.reshape(values, [groups, _GROUP]), ROUND_SCALES)
    group = tl.arange(0, groups)
    tl.store(scales + group * stride, scale, mask=group * _GROUP < left)
    column = group[:, None] * _GROUP + tl.arange(0, _GROUP)[None, :]
    tl.store(codes + column, own, mask=column < left)


@triton.jit
def store_norm(
    x, weight, epsilon, row, out_ptr, codes_ptr, scales_ptr, scale_stride, WIDTH: tl.constexpr,
    BLOCK: tl.constexpr, ROUND_SCALES: tl.constexpr,
):  # fmt: skip
    """Norm `x` float32 [BLOCK] and store it as row `row`, in FP8 too if there is `codes_ptr`."""
    column = tl.arange(0, BLOCK)
    mean_square = tl.sum(x * x, axis=0) / WIDTH
    normed = stored(x * (1.0 / tl.sqrt_rn(mean_square + epsilon)) * weight, out_ptr)
    tl.store(out_ptr + row * WIDTH + column, normed, mask=column < WIDTH)
    if codes_ptr is not None:
        codes, scales = codes_ptr + row * WIDTH, scales_ptr + row
        store_groups(widened(normed), codes, scales, scale_stride, WIDTH, BLOCK, ROUND_SCALES)


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
    """Compute row `program 0` of `rms_norm`.

    `delta_ptr` and `sum_ptr` may be None together, and so may `codes_ptr` and `scales_ptr`.
    """
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
    store_norm(
        x, weight, epsilon, row, out_ptr, codes_ptr, scales_ptr, scale_stride, WIDTH, BLOCK,
        ROUND_SCALES,
    )  # fmt: skip


def rms_norm(
    x: Tensor,
    delta: Tensor | None,
    weight: Tensor,
    epsilon: float,
    round_scales: bool | None = None,
) -> tuple[Tensor | None, Tensor | Normed]:
    """Add a residual and normalize the sum, in one launch.

    The sum is rounded to the type of `x`, and then becomes
    sum * rsqrt(mean(sum^2) + epsilon) * weight.

    Args:
        x: float32 or bfloat16 [num_tokens, width]. There may be gaps between rows.
        delta: like `x`, contiguous. None normalizes `x` itself.
        weight: float32 [width].
        epsilon: term added to the mean square.
        round_scales: True for scales that are powers of two (`scale_fmt` "ue8m0"). None makes no
            FP8.

    Returns:
        The sum, None without `delta`; and the norm, which is Normed if there is `round_scales`.
    """
    rows, width = x.shape
    total = None if delta is None else empty_beside(x, rows, width)
    normed, (out, codes, scales, scale_stride) = empty_norm(x, width, round_scales)
    if rows and width:
        block = max(GROUP, next_power_of_2(width))
        rms_norm_kernel[(rows,)](
            x, delta, weight, total, out, codes, scales, x.strides[0], scale_stride, epsilon,
            WIDTH=width, BLOCK=block, ROUND_SCALES=bool(round_scales),
            # a few rows are bound by memory latency, and more threads have more loads in flight
            num_warps=4 if block <= 2048 else 8 if block <= 4096 else 16,
        )  # fmt: skip
    return total, normed


@triton.jit
def sigmoid(x):
    """Return 1 / (1 + exp(-x)), without an intermediate that overflows."""
    small = tl.exp(-tl.abs(x))
    return tl.where(x >= 0, 1.0, small) / (1.0 + small)


@triton.jit
def clamped(gate, up, LIMIT: tl.constexpr):
    """Return min(gate, LIMIT) and `up` between -LIMIT and LIMIT. NaN stays NaN. None = no limit."""
    if LIMIT is not None:
        # comparisons instead of a minimum keep NaN
        gate = tl.where(gate > LIMIT, LIMIT, gate)
        up = tl.where(up > LIMIT, LIMIT, tl.where(up < -LIMIT, -LIMIT, up))
    return gate, up


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
    LIMIT: tl.constexpr,
):
    """Compute block `program 1` of row `program 0`, and write it in FP8 if there is `codes_ptr`.

    With GATED the result is silu of the first half of a row times the second half, else the row
    itself. Both halves are clamped.
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
        gate, up = clamped(gate, up, LIMIT)
        values = stored(gate * sigmoid(gate) * up, x_ptr)
    if codes_ptr is None:
        tl.store(out_ptr + row * WIDTH + column, values, mask=inside)
    else:
        codes = codes_ptr + row * WIDTH + first
        scales = scales_ptr + (first // 128) * scale_stride + row
        left = WIDTH - first
        store_groups(widened(values), codes, scales, scale_stride, left, BLOCK, ROUND_SCALES)


def silu_and_mul(
    gate_up: Tensor, round_scales: bool | None = None, limit: float | None = None
) -> Tensor | Fp8Rows:
    """Return silu(gate) * up of the two halves of each row, in the type of `gate_up` or as Fp8Rows.

    Args:
        gate_up: float32 or bfloat16 [num_tokens, 2 * width], contiguous.
        round_scales: as for `rms_norm`. None returns the type of `gate_up`.
        limit: largest gate, and largest magnitude of `up`; None = no limit.
    """
    return _activated(gate_up, gate_up.shape[1] // 2, round_scales, gated=True, limit=limit)


def quantize_rows(x: Tensor, round_scales: bool) -> Fp8Rows:
    """Return rows in FP8, rounded to nearest even.

    A scale is the largest magnitude of its group / 448, at least 1e-12, and ignores NaN. Values
    past 448 become the largest code, NaN becomes 0x7F.

    Args:
        x: float32 or bfloat16 [rows, width], contiguous.
        round_scales: True to round scales up to powers of two (`scale_fmt` "ue8m0").
    """
    return _activated(x, x.shape[1], round_scales, gated=False)


def _activated(
    x: Tensor, width: int, round_scales: bool | None, *, gated: bool, limit: float | None = None
) -> Any:
    """Launch `activate_kernel` over `x` for a result of `width` columns."""
    rows, empty = x.shape[0], empty_beside if round_scales is None else empty_fp8_rows
    out = empty(x, rows, width)
    if rows and width:
        block = min(_BLOCK, max(GROUP, next_power_of_2(width)))
        activate_kernel[rows, -(-width // block)](
            x, *kernel_arguments(out), width, gated, block, bool(round_scales), limit, num_warps=4
        )
    return out


@step_kernel(waits=True)
def rows_at_kernel(
    table_ptr,
    index_ptr,
    out_ptr,
    table_rows,
    WIDTH: tl.constexpr,
    MISSING: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Copy block `program 1` of row `program 0`, or MISSING for an index outside of the table."""
    wait_for_inputs()
    start_next()
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < WIDTH
    # a vector, because some versions of the interpreter refuse masks of a scalar and a vector
    source = tl.load(index_ptr + row).to(tl.int64) + tl.zeros([BLOCK], tl.int64)
    exists = (source >= 0) & (source < table_rows)
    values = tl.load(table_ptr + source * WIDTH + column, mask=inside & exists, other=MISSING)
    tl.store(out_ptr + row * WIDTH + column, values, mask=inside)


def rows_at(table: Tensor, index: Tensor, out: Tensor | None = None, missing: int = 0) -> Tensor:
    """Gather rows of a table: [n, ...] of its dtype.

    Args:
        table: float32, bfloat16 or int32 [num_rows, ...], contiguous.
        index: int32 or int64 [n].
        out: tensor for the result. None allocates.
        missing: all values of the row of an index outside of the table.
    """
    num_rows, *row = table.shape
    num_found, width = index.shape[0], prod(row)
    out = empty_beside(table, num_found, *row) if out is None else out
    if num_found and width:
        block = min(_BLOCK, next_power_of_2(width))
        grid = num_found, -(-width // block)
        rows_at_kernel[grid](
            table, index, out, num_rows, width, MISSING=missing, BLOCK=block, num_warps=4
        )
    return out
