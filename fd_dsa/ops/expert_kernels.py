"""Routed experts on a device: grouping, two grouped GEMMs and weighted sum.

A pair is a token and one of its experts, and a row of the grouped GEMMs. One launch lists the pairs
of each expert in order. A GEMM reads its rows through that list and writes them at the places of
the pairs, so rows are never copied. Grids depend only on the number of tokens, so the launches can
be captured. Every sum has a fixed order. Tokens of padding have expert ids of -1.
"""

from __future__ import annotations

from typing import Any

from fd_dsa.errors import ShapeError
from fd_dsa.ops.arrays import dtype_name
from fd_dsa.ops.dense_kernels import (
    GROUP,
    empty_beside,
    empty_fp8_rows,
    kernel_arguments,
    native_fp8,
)
from fd_dsa.ops.device_functions import stored, widened
from fd_dsa.ops.expert_gemm import block_sizes, configuration, expert_gemm_kernel
from fd_dsa.ops.expert_gemm_cuda import ExpertGemm, kernel_for, suits
from fd_dsa.ops.fp8_gemm import check_weight
from fd_dsa.ops.split_sums import Tiling, rows_of_tiles
from fd_dsa.ops.step_kernel import step_kernel
from fd_dsa.tensor import Fp8Rows, Tensor
from fd_dsa.triton_runtime import next_power_of_2, start_next, wait_for_inputs
from fd_dsa.triton_runtime.device_api import traits_for

import triton.language as tl  # isort: skip

_BLOCK = 1024
# maximum number of pairs that the program of an expert scans at a time
_MAX_PAIRS = 4096


@step_kernel(waits=True)
def group_pairs_kernel(ids_ptr, pairs_ptr, counts_ptr, num_pairs, num_tokens, BLOCK: tl.constexpr):
    """List the pairs of expert `program 0`, at most one for each token."""
    wait_for_inputs()
    start_next()
    expert = tl.program_id(0)
    count = 0
    for start in range(0, num_pairs, BLOCK):
        pair = start + tl.arange(0, BLOCK)
        mine = tl.load(ids_ptr + pair, mask=pair < num_pairs, other=-1) == expert
        place = expert.to(tl.int64) * num_tokens + count + tl.cumsum(mine.to(tl.int32), axis=0) - 1
        tl.store(pairs_ptr + place, pair, mask=mine)
        count += tl.sum(mine.to(tl.int32), axis=0)
    tl.store(counts_ptr + expert, count)


def group_pairs(ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """List the pairs of each expert. Pair i is expert i % top_k of token i // top_k.

    Args:
        ids: int32 [num_tokens, top_k], contiguous. The experts of a row are distinct, -1 = padding.

    Returns:
        Pairs of each expert in order, int32 [num_experts, num_tokens], and their numbers, int32
        [num_experts].
    """
    rows, top_k = ids.shape
    pairs = empty_beside(ids, num_experts, rows)
    counts = empty_beside(ids, num_experts)
    block = min(_MAX_PAIRS, next_power_of_2(max(rows * top_k, 1)))
    group_pairs_kernel[(num_experts,)](
        ids, pairs, counts, rows * top_k, rows, BLOCK=block, num_warps=8 if block > _BLOCK else 4
    )
    return pairs, counts


def expert_gemm(
    x: Tensor | Fp8Rows,
    weight: tuple[Tensor, Any],
    pairs: Tensor,
    counts: Tensor,
    *,
    top_k: int,
    gated: bool = False,
    round_scales: bool | None = None,
    tiling: Tiling | None = None,
    limit: float | None = None,
) -> Tensor | Fp8Rows:
    """Multiply the row of each pair by its expert's weight^T: [num_tokens * top_k, columns].

    Operands in float32 give float32, others bfloat16. A gated GEMM in FP8 gives FP8 of the values
    rounded to bfloat16. Rows of pairs without an expert are not written.

    Args:
        x: float32 or bfloat16 [num_tokens, width], contiguous, or its Fp8Rows; or a row for each
            pair, [num_tokens * top_k, width].
        weight: values of the dtype of `x` [num_experts, columns, width], contiguous, and None. With
            Fp8Rows: codes, uint8 of that shape, and scales, float32
            [num_experts, ceil(columns / 128), ceil(width / 128)]. A gated weight has 2 * columns,
            first those of the gate.
        pairs, counts: results of `group_pairs`.
        gated: True for silu of the first half of the columns times the second half.
        round_scales: True if scales of a result in FP8 are powers of two.
        tiling: tiling of Triton's kernel. None selects it by the shape, and may use the kernel of
            custom_ops/ for prompts in FP8.
        limit: as for `silu_and_mul`, of a gated GEMM.

    Raises:
        ShapeError: an FP8 weight does not fit, or a block of 128 columns of a gated weight has
            columns of both halves.
    """
    is_fp8, (values, scales) = isinstance(x, Fp8Rows), weight
    rows, (*_, x_scales, x_stride) = x.codes if isinstance(x, Fp8Rows) else x, kernel_arguments(x)
    experts, columns, width = values.shape
    columns //= 1 + gated
    if is_fp8:
        check_weight(values, scales, rows.shape[1])
        if gated and columns % GROUP:
            raise ShapeError(
                f"FP8 weight: got {columns} columns of the gate, allowed are multiples of {GROUP}"
            )
    num_tokens, kind = pairs.shape[1], dtype_name(values.dtype)
    num_pairs = num_tokens * top_k
    result: Tensor | Fp8Rows
    if is_fp8 and gated:
        result = empty_fp8_rows(rows, num_pairs, columns)
    else:
        out_dtype = "float32" if kind == "float32" else "bfloat16"
        result = empty_beside(rows, num_pairs, columns, dtype=out_dtype)
    *_, out_scales, out_stride = kernel_arguments(result)
    out: Tensor = result.codes if isinstance(result, Fp8Rows) else result
    by_library: ExpertGemm | None = None
    sizes = rows.shape[0], num_pairs, experts, columns, width
    may_use_library = is_fp8 and tiling is None and limit is None
    if may_use_library and num_pairs and columns and suits(*sizes):
        by_library = kernel_for(rows)
    if by_library is not None:
        by_library(
            (rows, x_scales), weight, pairs, counts, out, out_scales,
            empty_beside(rows, 1, dtype="int32"), round_scales=bool(round_scales),
        )  # fmt: skip
    elif num_pairs and columns:
        shared_bytes = traits_for(rows).shared_bytes
        shape = rows_of_tiles(num_pairs), experts, gated, shared_bytes
        tiling = tiling or configuration(kind, *shape)
        options = block_sizes(kind, columns, width, tiling)
        max_tiles = min(experts, num_pairs) + num_pairs // tiling.rows
        expert_gemm_kernel[-(-columns // options["BLOCK_COLUMNS"]), max_tiles](
            rows, x_scales, values, scales, pairs, counts, out, out_scales, num_tokens,
            x_stride, out_stride, ROW_PAIRS=num_pairs // rows.shape[0], NUM_EXPERTS=experts,
            WIDTH=width, COLUMNS=columns, GATED=gated, ROUND_SCALES=bool(round_scales),
            NATIVE=native_fp8(rows), EXPERTS=next_power_of_2(experts), LIMIT=limit, **options,
        )  # fmt: skip
    return result


@step_kernel(waits=True)
def sum_experts_kernel(
    parts_ptr,
    weights_ptr,
    ids_ptr,
    base_ptr,
    out_ptr,
    TOP_K: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sum block `program 1` of token `program 0` over its experts, in the order of their ids."""
    wait_for_inputs()
    start_next()
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < WIDTH
    total = widened(tl.load(base_ptr + token * WIDTH + column, mask=inside, other=0.0))
    # unrolled, so that all loads are in flight before the first sum
    for choice in tl.static_range(TOP_K):
        pair = token * TOP_K + choice
        # a vector, because some versions of the interpreter refuse masks of a scalar and a vector
        expert = tl.load(ids_ptr + pair) + tl.zeros([BLOCK], tl.int32)
        part = tl.load(parts_ptr + pair * WIDTH + column, mask=inside & (expert >= 0), other=0.0)
        total += widened(part) * tl.load(weights_ptr + pair)
    tl.store(out_ptr + token * WIDTH + column, stored(total, out_ptr), mask=inside)


def sum_experts(parts: Tensor, weights: Tensor, ids: Tensor, base: Tensor) -> Tensor:
    """Add the weighted results of a token's experts to `base`, in float32, rounded to its dtype.

    Args:
        parts: float32 or bfloat16 [num_tokens * top_k, width], contiguous. Rows with ids of -1 are
            not read.
        weights: float32 [num_tokens, top_k].
        ids: int32 [num_tokens, top_k]; -1 = padding.
        base: float32 or bfloat16 [num_tokens, width], contiguous; result of the shared expert.
    """
    (rows, top_k), width = weights.shape, parts.shape[1]
    out = empty_beside(base, rows, width)
    if rows and width:
        block = min(_BLOCK, next_power_of_2(width))
        grid = rows, -(-width // block)
        sum_experts_kernel[grid](
            parts, weights, ids, base, out, TOP_K=top_k, WIDTH=width, BLOCK=block, num_warps=4
        )
    return out
