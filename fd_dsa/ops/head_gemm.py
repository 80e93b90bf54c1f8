"""GEMMs of heads on a device, one launch: each head of a token times the weight of that head.

In batch-invariant mode the same kernel multiplies by whole weights. Another kernel joins parts of
results, such as the heads or columns of several ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fd_dsa.errors import ShapeError
from fd_dsa.ops.arrays import dtype_name, outer_strides
from fd_dsa.ops.dense_kernels import (
    GROUP,
    empty_beside,
    empty_fp8_rows,
    kernel_arguments,
    quantized,
)
from fd_dsa.ops.device_functions import store_pairs, stored, to_bfloat16, widened
from fd_dsa.ops.query_kernels import rotated_pairs
from fd_dsa.ops.split_sums import rows_of_tiles
from fd_dsa.ops.step_kernel import step_kernel
from fd_dsa.tensor import Fp8Rows, Tensor
from fd_dsa.triton_runtime import next_power_of_2, start_next, wait_for_inputs

import triton  # isort: skip
import triton.language as tl  # isort: skip

# columns that a program joins
_BLOCK = 1024


@triton.jit
def store_heads(
    values, token, column, head, heads, live, inside, out_ptr, codes_ptr, scales_ptr,
    scales_stride, WIDTH: tl.constexpr, ROUND_SCALES: tl.constexpr,
):  # fmt: skip
    """Store float32 `values` [tokens, columns] of a head to rows [heads * WIDTH] of `token`.

    Without `out_ptr` the values are quantized. The columns are then one group.
    """
    place = (token[:, None] * heads + head) * WIDTH + column[None, :]
    if out_ptr is not None:
        if out_ptr.dtype.element_ty == tl.bfloat16:
            values = to_bfloat16(values)
        tl.store(out_ptr + place, values, mask=live[:, None] & inside[None, :])
    else:
        # quantize the values that a result without FP8 has
        values = widened(to_bfloat16(values))
        codes, scale = quantized(values, ROUND_SCALES)
        tl.store(scales_ptr + head * scales_stride + token, scale, mask=live)
        tl.store(codes_ptr + place, codes, mask=live[:, None])


@step_kernel(strided=("x_ptr",), waits=True)
def head_gemm_kernel(
    x_ptr,
    token_stride,
    head_stride,
    weight_ptr,
    rows_ptr,
    count_ptr,
    angle_rows_ptr,
    cos_sin_ptr,
    num_angles,
    out_ptr,
    codes_ptr,
    scales_ptr,
    scales_stride,
    num_tokens,
    IN: tl.constexpr,
    OUT: tl.constexpr,
    HALF: tl.constexpr,
    IN_FIRST: tl.constexpr,
    ROUND_SCALES: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
):
    """Compute block `program 0` of the outputs of head `program 1` for token tile `program 2`.

    The weight of a head is [IN, OUT], or [OUT, IN] without IN_FIRST. Without `out_ptr` the block,
    which is one group, is quantized. A tile past the tokens at `count_ptr` reads and writes
    nothing. With HALF a head of `x` has HALF pairs after its IN values. The program after the last
    block rotates them.
    """
    wait_for_inputs()
    head, heads = tl.program_id(1).to(tl.int64), tl.num_programs(1)
    token = tl.program_id(2).to(tl.int64) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    live = token < num_tokens
    x = x_ptr + token * token_stride + head * head_stride
    if HALF > 0:  # noqa: SIM102, a constant and a number of the device
        if tl.program_id(0) * BLOCK_OUT >= OUT:
            start_next()
            first, second = rotated_pairs(
                x + IN, token, live, angle_rows_ptr, cos_sin_ptr, num_angles, HALF
            )
            pairs = (out_ptr + (token * heads + head) * (OUT + 2 * HALF) + OUT)[:, None]
            first, second = stored(first, pairs), stored(second, pairs)
            store_pairs(pairs, first, second, live[:, None], HALF, True)
            return
    column = tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    inside, end = column < OUT, IN
    if count_ptr is not None:
        count = tl.load(count_ptr)
        live &= token < count
        end = tl.where(tl.program_id(2) * BLOCK_TOKENS < count, IN, 0)
    step = tl.arange(0, BLOCK_IN)
    row = x[:, None] + step[None, :]
    if IN_FIRST:
        weight = weight_ptr + (head * IN + step[:, None]) * OUT + column[None, :]
    else:
        weight = weight_ptr + (head * OUT + column[None, :]) * IN + step[:, None]
    to_next: tl.constexpr = OUT if IN_FIRST else 1
    total = tl.zeros([BLOCK_TOKENS, BLOCK_OUT], tl.float32)
    for start in range(0, end, BLOCK_IN):
        here = start + step < IN
        left = tl.load(row + start, mask=live[:, None] & here[None, :], other=0.0)
        right = tl.load(weight + start * to_next, mask=here[:, None] & inside[None, :], other=0.0)
        total = tl.dot(left, right, acc=total, input_precision="ieee")
    start_next()
    if rows_ptr is not None:
        token = tl.load(rows_ptr + token, mask=live, other=-1).to(tl.int64)
        live = token >= 0
    store_heads(
        total, token, column, head, heads, live, inside, out_ptr, codes_ptr, scales_ptr,
        scales_stride, OUT + 2 * HALF, ROUND_SCALES,
    )  # fmt: skip


def head_gemm(
    x: Tensor,
    weight: Tensor,
    round_scales: bool | None = None,
    out: Tensor | Fp8Rows | None = None,
    rows: Tensor | None = None,
    *,
    in_first: bool = True,
    count: Tensor | None = None,
) -> Any:
    """Multiply x [num_tokens, heads, in] by weight [heads, in, out]: [num_tokens, heads, out].

    Args:
        x: float32 or bfloat16. The values of a head are contiguous. All heads share an x of
            [num_tokens, in].
        weight: contiguous, of the dtype of x.
        round_scales: None returns a tensor of the dtype of x. Otherwise x is bfloat16, `out` is
            128, and the result is Fp8Rows [num_tokens, heads * out] with such scales.
        out: memory of the result with at least num_tokens rows. None allocates.
        rows: integers [num_tokens], row of `out` for each token, -1 = no row. None = the first rows
            in order.
        in_first: False for a weight [heads, out, in].
        count: int32 [1], number of tokens on the device. Later ones have no result. None = all.
    """
    heads, in_width, out_width = weight.shape
    if not in_first:
        in_width, out_width = out_width, in_width
    if out is None:
        out = empty_heads(x, x.shape[0], heads, out_width, round_scales)
    shape = heads, in_width, out_width
    how: dict[str, Any] = {"in_first": in_first, "round_scales": bool(round_scales)}
    _launch(x, weight, shape, out, rows, count, **how)
    return out


def absorb_queries(
    q: Tensor, weight: Tensor, cos_sin: Tensor, out: Tensor, rows: Tensor | None = None
) -> Tensor:
    """Make MLA's absorbed query in one launch: a GEMM by heads, and the rotation beside it.

        out[t, h] = q[t, h, :in] @ weight[h], then RoPE(q[t, h, in:]) in interleaved pairs

    Rotated values have the bits of `fd_dsa.ops.mla_query.prepare_mla_query`.

    Args:
        q: float32 or bfloat16 [num_tokens, heads, in + rope_dim]. The values of a head are
            contiguous.
        weight: [heads, in, rank], contiguous, of the dtype of q.
        cos_sin: float32 [num_angles, rope_dim], cos in the first half, sin in the second.
        out: [num_tokens, heads, rank + rope_dim], contiguous, of the dtype of q.
        rows: integers [num_tokens], row of `cos_sin` for each token, clamped to the table. None =
            the first rows in order.

    Raises:
        ShapeError: the kernel does not support a width or stride.
    """
    half, strides = cos_sin.shape[1] // 2, outer_strides("absorb_queries", "q", q)
    pairs_at = weight.shape[1], *strides, q.data_ptr() // q.element_size()
    if half & (half - 1) or any(place % 2 for place in pairs_at):
        raise ShapeError(
            "absorb_queries: a device needs a power of two as rope_dim, and pairs of q at even "
            f"places, got {2 * half}, and {pairs_at} as first pair, strides and address in values"
        )
    _launch(q, weight, weight.shape, out, angles=(rows, cos_sin))
    return out


def linear_in_one_order(x: Tensor, weight: Tensor, dtype: str) -> Tensor:
    """Multiply x [num_tokens, in] by weight^T: [num_tokens, out]. Sums are in float32.

    In batch-invariant mode a row has the same bits for every number of rows.

    Args:
        x: float32 or bfloat16. The values of a row are contiguous.
        weight: [out, in], contiguous, of the dtype of x.
        dtype: dtype of the result, "float32" or that of x.
    """
    out_width, width = weight.shape
    out = empty_beside(x, x.shape[0], out_width, dtype=dtype)
    _launch(x, weight, (1, width, out_width), out, in_first=False)
    return out


def _launch(
    x: Tensor,
    weight: Tensor,
    shape: Sequence[int],
    out: Tensor | Fp8Rows,
    rows: Tensor | None = None,
    count: Tensor | None = None,
    *,
    angles: tuple[Tensor | None, Tensor] | None = None,
    in_first: bool = True,
    round_scales: bool = False,
) -> None:
    """Launch the kernel that fills `out`, for a weight of `shape` (heads, in, out).

    Args:
        angles: `rows` and `cos_sin` of `absorb_queries`, None without a rotation.
    """
    num_tokens, is_shared, (heads, width, out_width) = x.shape[0], len(x.shape) == 2, shape
    if num_tokens:
        tiled = rows_of_tiles(num_tokens)
        few = tiled <= 64
        tokens = min(64 if few else 128, max(16, next_power_of_2(tiled)))
        columns = min(128, max(16, next_power_of_2(out_width)))
        depth = min(128 if few else 64, max(16, next_power_of_2(width)))
        if dtype_name(x.dtype) == "float32":
            # without tensor cores the registers hold the whole tile
            tokens, columns, depth = min(tokens, 32), min(columns, 32), min(depth, 32)
        angle_rows, cos_sin = angles or (None, None)
        num_angles, half = (0, 0) if cos_sin is None else (cos_sin.shape[0], cos_sin.shape[1] // 2)
        grid = -(-out_width // columns) + (half > 0), heads, -(-num_tokens // tokens)
        head_gemm_kernel[grid](
            x, x.strides[0], 0 if is_shared else x.strides[1], weight, rows, count,
            angle_rows, cos_sin, num_angles, *kernel_arguments(out), num_tokens,
            IN=width, OUT=out_width, HALF=half, IN_FIRST=in_first, ROUND_SCALES=round_scales,
            BLOCK_TOKENS=tokens, BLOCK_IN=depth, BLOCK_OUT=columns,
            num_warps=4 if few else 8, num_stages=3, enable_fp_fusion=half == 0,
        )  # fmt: skip


def empty_heads(
    beside: Tensor, num_tokens: int, heads: int, width: int, round_scales: bool | None
) -> Any:
    """Allocate a result of `head_gemm`."""
    if round_scales is None:
        return empty_beside(beside, num_tokens, heads, width)
    assert width == GROUP and dtype_name(beside.dtype) == "bfloat16", width
    return empty_fp8_rows(beside, num_tokens, heads * width)


@step_kernel(waits=True)
def join_columns_kernel(parts_ptr, out_ptr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Copy block `program 2` of row `program 1` of part `program 0` to its columns of the result.

    The values are rounded to the type of the result.
    """
    wait_for_inputs()
    start_next()
    part, parts = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    row, rows = tl.program_id(1).to(tl.int64), tl.num_programs(1)
    column = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    inside = column < WIDTH
    values = tl.load(parts_ptr + (part * rows + row) * WIDTH + column, mask=inside, other=0.0)
    place = out_ptr + (row * parts + part) * WIDTH + column
    tl.store(place, values.to(out_ptr.dtype.element_ty), mask=inside)


def join_columns(parts: Tensor, out: Tensor) -> Tensor:
    """Write parts of rows side by side to `out`, in one launch.

    Args:
        parts: float32 or bfloat16 [num_parts, rows, width], contiguous.
        out: [rows, num_parts * width], contiguous, float32 or of the dtype of the parts.
    """
    num_parts, rows, width = parts.shape
    if rows and width:
        block = min(_BLOCK, next_power_of_2(width))
        grid = num_parts, rows, -(-width // block)
        join_columns_kernel[grid](parts, out, WIDTH=width, BLOCK=block, num_warps=4)
    return out
