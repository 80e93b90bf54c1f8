"""GEMMs of heads on a device: each head of a token times that head's own weight, one launch."""

from __future__ import annotations

from typing import Any

from fd_dsa.ops._dense_kernels import empty_beside
from fd_dsa.ops._fp8_rows import GROUP, Fp8Rows, empty_fp8_rows, group_scales
from fd_dsa.ops._host import dtype_name
from fd_dsa.ops._triton import step_kernel
from fd_dsa.ops._triton_fp8 import (
    absolute_maximum,
    magnitude,
    quotient,
    to_bfloat16,
    to_e4m3,
    widened,
)
from fd_dsa.triton_runtime import start_next, wait_for_inputs

import triton  # isort: skip
import triton.language as tl  # isort: skip


@step_kernel(strided=("x_ptr",), waits=True)
def head_gemm_kernel(
    x_ptr,
    token_stride,
    head_stride,
    weight_ptr,
    out_ptr,
    codes_ptr,
    scales_ptr,
    scales_stride,
    num_tokens,
    IN: tl.constexpr,
    OUT: tl.constexpr,
    ROUND_SCALES: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
):
    """Block `program 0` of the outputs of head `program 1`, token tile `program 2`.

    Without `out_ptr` the block is quantised: it is one group of values.
    """
    wait_for_inputs()
    head, heads = tl.program_id(1).to(tl.int64), tl.num_programs(1)
    token = tl.program_id(2).to(tl.int64) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    column = tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    live, inside = (token < num_tokens)[:, None], (column < OUT)[None, :]
    step = tl.arange(0, BLOCK_IN)
    x = x_ptr + token[:, None] * token_stride + head * head_stride + step[None, :]
    weight = weight_ptr + (head * IN + step[:, None]) * OUT + column[None, :]
    total = tl.zeros([BLOCK_TOKENS, BLOCK_OUT], tl.float32)
    for start in range(0, IN, BLOCK_IN):
        here = start + step < IN
        left = tl.load(x + start, mask=live & here[None, :], other=0.0)
        right = tl.load(weight + start * OUT, mask=here[:, None] & inside, other=0.0)
        total = tl.dot(left, right, acc=total, input_precision="ieee")
    start_next()
    place = (token[:, None] * heads + head) * OUT + column[None, :]
    if out_ptr is not None:
        if out_ptr.dtype.element_ty == tl.bfloat16:
            total = to_bfloat16(total)
        tl.store(out_ptr + place, total, mask=live & inside)
    else:
        # what a plain result would hold
        total = widened(to_bfloat16(total))
        scale = group_scales(absolute_maximum(magnitude(total), 1), ROUND_SCALES)
        tl.store(scales_ptr + head * scales_stride + token, scale, mask=token < num_tokens)
        tl.store(codes_ptr + place, to_e4m3(quotient(total, scale[:, None])), mask=live)


def head_gemm(x: Any, weight: Any, round_scales: bool | None = None) -> Any:
    """x [num_tokens, heads, in] times weight [heads, in, out]: [num_tokens, heads, out].

    Args:
        x: float32 or bfloat16; the values of a head are contiguous.
        weight: of the same type, contiguous.
        round_scales: Fp8Rows of [num_tokens, heads * out] with such scales instead, of bfloat16
            with `out` of 128; None: a tensor of the type of x.
    """
    (num_tokens, heads, width), out_width = x.shape, weight.shape[2]
    out: Any = None
    rows = Fp8Rows(None, None)
    if round_scales is None:
        out = empty_beside(x, num_tokens, heads, out_width)
    else:
        assert out_width == GROUP and dtype_name(x.dtype) == "bfloat16", weight.shape
        rows = empty_fp8_rows(x, num_tokens, heads * out_width)
    if num_tokens:
        few = num_tokens <= 64
        tokens = min(64 if few else 128, max(16, triton.next_power_of_2(num_tokens)))
        columns = min(128, max(16, triton.next_power_of_2(out_width)))
        depth = min(128 if few else 64, max(16, triton.next_power_of_2(width)))
        if dtype_name(x.dtype) == "float32":
            # products without tensor cores keep a whole tile in registers
            tokens, columns, depth = min(tokens, 32), min(columns, 32), min(depth, 32)
        grid = -(-out_width // columns), heads, -(-num_tokens // tokens)
        token_stride, head_stride, _ = x.strides
        head_gemm_kernel[grid](
            x, token_stride, head_stride, weight, out, rows.codes, rows.scales,
            0 if rows.scales is None else rows.scales.shape[1], num_tokens, IN=width, OUT=out_width,
            ROUND_SCALES=bool(round_scales), BLOCK_TOKENS=tokens, BLOCK_IN=depth,
            BLOCK_OUT=columns, num_warps=4 if few else 8, num_stages=3,
        )  # fmt: skip
    return out if round_scales is None else rows
