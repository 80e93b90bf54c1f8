"""Grouped GEMM of routed experts: its kernel, its tilings and its launch.

A GEMM reads the rows of its pairs through the lists of `expert_pairs.group_pairs`. It writes the
results at the places of the pairs, so rows are never copied.

With few tokens the time is that of reading the weights of the selected experts. Tiles then have 16
rows, and each processor has as many bytes in flight as its shared memory holds. Prompts fill tiles
of 128 rows.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from fd_dsa.errors import ShapeError
from fd_dsa.ops.arrays import dtype_name
from fd_dsa.ops.dense_kernels import (
    GROUP,
    clamped,
    empty_beside,
    empty_fp8_rows,
    native_fp8,
    quantized,
    sigmoid,
    values_and_scales,
)
from fd_dsa.ops.device_functions import added_dot, stored, to_bfloat16, widened
from fd_dsa.ops.expert_gemm_cuda import kernel_for, suits
from fd_dsa.ops.four_bit_sums import four_bit_sums
from fd_dsa.ops.fp8_gemm import check_weight
from fd_dsa.ops.fp8_sums import fp8_pointer, fp8_sums
from fd_dsa.ops.split_sums import PROCESSORS, Tiling, rows_of_tiles
from fd_dsa.ops.step_kernel import step_kernel
from fd_dsa.tensor import FourBitWeight, Fp8Rows, Tensor
from fd_dsa.triton_runtime import TRITON_VERSION, next_power_of_2, start_next, wait_for_inputs
from fd_dsa.triton_runtime.device_api import traits_for

import triton  # isort: skip
import triton.language as tl  # isort: skip

_GROUP = tl.constexpr(GROUP)
_FOUR_BITS = "e4m3", "e8m0", "int4"
# Rows of a tile, and up to which mean number of pairs it holds those of nearly all experts.
_ROWS = (16, 8), (32, 16), (64, 32)
# The same for e4m3 and int4. Triton has 8 rows from 3.5 on. In 3.6 each warp multiplies them by
# itself. Rows in the order of kind "e8m0" would pass through shared memory twice.
_FEW_ROWS = *([(8, 6)] if TRITON_VERSION >= (3, 5) else []), (16, 12), (32, 24), (64, 32)
# Number of tiles of a program whose K is short. It is odd, because programs that begin a power of
# two apart in the weight load from few memory channels.
_COLUMN_TILES = 7


@lru_cache(maxsize=4096)
def configuration(
    kind: str,
    num_pairs: int,
    num_experts: int,
    gated: bool,
    columns: int,
    width: int,
    shared_bytes: int,
) -> Tiling:
    """Return the tiling for a number of pairs, with stages that fit the shared memory of a block.

    A stage is 128 bytes along K. A gated tile in FP8 has 128 columns. `kind` is the dtype of the
    weight, or the kind of a FourBitWeight.
    """
    tiling = _fastest(kind, num_pairs, num_experts, gated, columns)
    num_programs = min(num_pairs, num_experts) * (columns // (tiling.columns * _COLUMN_TILES))
    # fewer programs would leave processors without work
    fewest = PROCESSORS * (1 if tiling.rows == 8 else 8)
    if num_programs > fewest and _is_short(kind, tiling.rows, width):
        tiling = tiling._replace(column_tiles=_COLUMN_TILES)
    # if shared memory is the limit, one more stage is in registers
    max_stages = 1 + shared_bytes // ((tiling.columns * (1 + gated) + tiling.rows) * 128)
    if kind in _FOUR_BITS:
        turn = _four_bit_width(kind, tiling)
        # with at most a scale of four bytes for 16 values
        weight_bytes = tiling.columns * (1 + gated) * turn * 3 // 4
        row_bytes = tiling.rows * turn * 2
        # rows, which the tensor cores read from shared memory, have a buffer for each stage
        max_stages = (shared_bytes + weight_bytes) // (weight_bytes + row_bytes)
    return tiling._replace(num_stages=min(tiling.num_stages, max_stages))


def _fastest(kind: str, num_pairs: int, num_experts: int, gated: bool, columns: int) -> Tiling:
    """Return the fastest tiling of `benchmarks.gpu_gemms` and `four_bit_experts` on Hopper."""
    mean = num_pairs / num_experts
    if kind == "float32":
        return Tiling(16 if mean <= 16 else 32, 64, 4, 3)
    sizes = _FEW_ROWS if kind in ("e4m3", "int4") else _ROWS
    rows = next((rows for rows, most in sizes if mean <= most), 128)
    if kind in _FOUR_BITS:
        narrow = 64 >> gated
        # up to one or four tiles for each processor of an H200 are narrow
        most = PROCESSORS * narrow * (1 if rows == 8 else 4)
        if rows <= 16 and min(num_pairs, num_experts) * columns <= most:
            return Tiling(rows, narrow, 4, 6)
        if rows == 128 and kind == "e8m0":
            # Two blocks fill the registers and the shared memory of a processor. One converts codes
            # while the tensor cores work for the other. With scales of e4m3 a block needs 1 KiB
            # more, and integers need many more registers.
            return Tiling(rows, 128 >> gated, 8, 3, maxnreg=128)
        num_stages = 3 if rows in (32, 64) or (rows == 8 and not gated) else 4
        has_4_warps = rows <= 16 or (rows == 32 and gated and kind != "e8m0")
        return Tiling(rows, 128 >> gated, 4 if has_4_warps else 8, num_stages)
    if rows == 128:
        # with 8 warps the registers do not hold the sums of both halves
        return Tiling(128, 128, 16 if gated else 8, 4)
    # with at most 8 pairs each processor has one gated tile, which may take all shared memory
    return Tiling(rows, 128, 8, 6 if gated and num_pairs <= 8 else 3)


def _is_short(kind: str, rows: int, width: int) -> bool:
    """Return True if the start of a program takes long beside the sums of its tile.

    The limits are those of launches that several tiles a program made faster on an H200.
    """
    is_quantized = kind == "uint8" or kind in _FOUR_BITS
    max_groups = 2 if kind == "uint8" and rows == 16 else 4
    return is_quantized and rows <= 32 and width <= max_groups * GROUP


def _four_bit_width(kind: str, tiling: Tiling) -> int:
    """Return the values along K of a turn in four bits, as many as the registers hold."""
    is_wide = tiling.rows < 128 if tiling.num_warps == 8 else kind == "int4" and tiling.rows == 8
    return 256 if is_wide else 128


def block_sizes(kind: str, columns: int, width: int, tiling: Tiling) -> dict[str, int]:
    """Return the constants and options of a launch with a tiling."""
    block_columns, block_width = tiling.columns, GROUP
    if kind in _FOUR_BITS:
        block_width = _four_bit_width(kind, tiling)
    elif kind != "uint8":
        max_width = 32 if kind == "float32" else 64
        block_width = min(max_width, max(16, next_power_of_2(width)))
    if kind != "uint8":
        block_columns = min(block_columns, max(16, next_power_of_2(columns)))
    sizes = {"BLOCK_COLUMNS": block_columns, "BLOCK_WIDTH": block_width}
    return tiling.options | sizes | {"COLUMN_TILES": tiling.column_tiles}


@triton.jit
def plain_sums(
    x,
    live,
    weight,
    to_up,
    first,
    last,
    WIDTH: tl.constexpr,
    GATED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    """Return the sums of `fp8_sums` for operands in float32 or bfloat16.

    They are over the values from `first` to `last` along K.
    """
    place = tl.arange(0, BLOCK_WIDTH)[None, :]
    if BLOCK_ROWS < 128:
        total = tl.zeros([BLOCK_COLUMNS, BLOCK_ROWS], tl.float32)
    else:
        total = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], tl.float32)
    up_total = total
    for start in range(first, last, BLOCK_WIDTH):
        at = start + place
        inside = at < WIDTH
        rows = tl.load(x + at, mask=live[:, None] & inside, other=0.0)
        columns = tl.load(weight + at, mask=inside, other=0.0)
        total = added_dot(rows, columns, total)
        if GATED:
            columns = tl.load(weight + to_up + at, mask=inside, other=0.0)
            up_total = added_dot(rows, columns, up_total)
    if BLOCK_ROWS < 128:
        total, up_total = tl.trans(total), tl.trans(up_total)
    return total, up_total


@triton.jit
def _own_tile(
    counts_ptr,
    tile,
    NUM_EXPERTS: tl.constexpr,
    EXPERTS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    """Return the expert of a tile, its first place in the expert's list, and the list's length.

    An expert has as many tiles as its pairs fill. Past the last tile the expert is NUM_EXPERTS.
    """
    expert_ids = tl.arange(0, EXPERTS)
    counts = tl.load(counts_ptr + expert_ids, mask=expert_ids < NUM_EXPERTS, other=0)
    tiles = (counts + BLOCK_ROWS - 1) // BLOCK_ROWS
    ends = tl.cumsum(tiles, axis=0)
    expert = tl.sum((ends <= tile).to(tl.int32), axis=0)
    own = expert_ids == expert
    first = (tile - tl.sum(tl.where(own, ends - tiles, 0), axis=0)) * BLOCK_ROWS
    return expert, first, tl.sum(tl.where(own, counts, 0), axis=0)


@step_kernel(waits=True)
def expert_gemm_kernel(
    x_ptr,
    x_scales_ptr,
    weight_ptr,
    weight_scales_ptr,
    weight_factors_ptr,
    pairs_ptr,
    counts_ptr,
    out_ptr,
    out_scales_ptr,
    num_tokens,
    x_stride,
    out_stride,
    ROW_PAIRS: tl.constexpr,
    NUM_EXPERTS: tl.constexpr,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    GATED: tl.constexpr,
    ROUND_SCALES: tl.constexpr,
    NATIVE: tl.constexpr,
    EXPERTS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    LIMIT: tl.constexpr,
    GROUP: tl.constexpr,
    KIND: tl.constexpr,
    COLUMN_TILES: tl.constexpr,
):
    """Compute COLUMN_TILES column blocks of tile `program 1`. A pair reads row pair // ROW_PAIRS.

    With GATED the result is silu of the first COLUMNS columns times the second ones. Both
    are clamped. With `out_scales_ptr` it is rounded to bfloat16 and stored in FP8. With GROUP the
    weight is a FourBitWeight.
    """
    wait_for_inputs()
    expert, first, count = _own_tile(counts_ptr, tl.program_id(1), NUM_EXPERTS, EXPERTS, BLOCK_ROWS)
    if expert < NUM_EXPERTS:
        # offsets in the weight of all experts need 64 bits
        wide = expert.to(tl.int64)
        place = first + tl.arange(0, BLOCK_ROWS)
        live = place < count
        pair = tl.load(pairs_ptr + wide * num_tokens + place, mask=live, other=0).to(tl.int64)
        row = pair // ROW_PAIRS
        # in one loop with that along K, so that the loads of the next block begin early
        for step in tl.range(0, COLUMN_TILES, flatten=COLUMN_TILES > 1):
            block = tl.program_id(0) * COLUMN_TILES + step
            if COLUMN_TILES > 1:
                # programs past the last block repeat it
                block = tl.minimum(block, (COLUMNS - 1) // BLOCK_COLUMNS)
            first_column = block * BLOCK_COLUMNS
            column = first_column + tl.arange(0, BLOCK_COLUMNS)
            stride: tl.constexpr = 2 * COLUMNS if GATED else COLUMNS
            # columns past the end repeat the last column, so that loads need no mask
            known = tl.minimum(column, COLUMNS - 1)
            source = wide * stride + known
            if GROUP > 0:
                total, up = four_bit_sums(
                    x_ptr + row[:, None] * WIDTH, live, wide, known, weight_ptr,
                    weight_scales_ptr, weight_factors_ptr, WIDTH, COLUMNS, GATED,
                    BLOCK_ROWS, BLOCK_COLUMNS, BLOCK_WIDTH, GROUP, KIND,
                )  # fmt: skip
            elif x_scales_ptr is None:
                total, up = plain_sums(
                    x_ptr + row[:, None] * WIDTH, live, weight_ptr + source[:, None] * WIDTH,
                    COLUMNS * WIDTH, 0, WIDTH, WIDTH, GATED, BLOCK_ROWS, BLOCK_COLUMNS, BLOCK_WIDTH,
                )  # fmt: skip
            else:
                groups: tl.constexpr = (WIDTH + _GROUP - 1) // _GROUP
                blocks: tl.constexpr = (stride + _GROUP - 1) // _GROUP
                scales = weight_scales_ptr + (wide * blocks + first_column // _GROUP) * groups
                total, up = fp8_sums(
                    fp8_pointer(x_ptr, NATIVE) + row[:, None] * WIDTH, x_scales_ptr + row, live,
                    fp8_pointer(weight_ptr, NATIVE) + source[:, None] * WIDTH, scales,
                    COLUMNS * WIDTH, COLUMNS // _GROUP * groups, x_stride, 0, groups, WIDTH, GATED,
                    BLOCK_ROWS, BLOCK_COLUMNS, NATIVE,
                )  # fmt: skip
            start_next()
            if GATED:
                total, up = clamped(total, up, LIMIT)
                total = total * sigmoid(total) * up
            to = out_ptr + pair[:, None] * COLUMNS + column[None, :]
            mask = live[:, None] & (column < COLUMNS)[None, :]
            if out_scales_ptr is None:
                tl.store(to, stored(total, out_ptr), mask=mask)
            else:
                codes, scale = quantized(widened(to_bfloat16(total)), ROUND_SCALES)
                group = out_scales_ptr + (first_column // _GROUP) * out_stride
                tl.store(group + pair, scale, mask=live)
                tl.store(to, codes, mask=mask)


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
        pairs, counts: results of `expert_pairs.group_pairs`.
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
    rows = x.codes if isinstance(x, Fp8Rows) else x
    experts, columns, width = values.shape
    columns //= 1 + gated
    if is_fp8:
        check_weight(values, scales, rows.shape[1])
        if gated and columns % GROUP:
            raise ShapeError(
                f"FP8 weight: got {columns} columns of the gate, allowed are multiples of {GROUP}"
            )
    num_pairs = pairs.shape[1] * top_k
    out: Tensor | Fp8Rows
    if is_fp8 and gated:
        out = empty_fp8_rows(rows, num_pairs, columns)
    else:
        out_dtype = "float32" if dtype_name(values.dtype) == "float32" else "bfloat16"
        out = empty_beside(rows, num_pairs, columns, dtype=out_dtype)
    if not num_pairs or not columns:
        return out
    given, rounds = (pairs, counts, out), bool(round_scales)
    sizes = rows.shape[0], num_pairs, experts, columns, width
    if isinstance(x, Fp8Rows) and tiling is None and suits(*sizes):
        by_library = kernel_for(rows, limit)
        if by_library is not None:
            by_library(x, weight, *given, round_scales=rounds)
            return out
    launch_grouped(x, weight, *given, tiling, gated=gated, limit=limit, round_scales=rounds)
    return out


def launch_grouped(
    x: Tensor | Fp8Rows,
    weight: tuple[Tensor, Any] | FourBitWeight,
    pairs: Tensor,
    counts: Tensor,
    out: Tensor | Fp8Rows,
    tiling: Tiling | None,
    *,
    gated: bool,
    limit: float | None,
    round_scales: bool = False,
) -> None:
    """Launch Triton's kernel for `expert_gemm` or `four_bit_gemm`, whose arguments it has.

    Args:
        out: result of that function, with at least one value.
    """
    rows, x_scales, x_stride = values_and_scales(x)
    to, out_scales, out_stride = values_and_scales(out)
    (num_pairs, columns), width = to.shape, rows.shape[1]
    values, scales, factors, group, kind = (
        weight[:5] if isinstance(weight, FourBitWeight) else (*weight, None, 0, "")
    )
    experts, tiled = values.shape[0], kind or dtype_name(values.dtype)
    if tiling is None:
        shape = rows_of_tiles(num_pairs), experts, gated, columns, width
        tiling = configuration(tiled, *shape, traits_for(rows).shared_bytes)
    options = block_sizes(tiled, columns, width, tiling)
    max_tiles = min(experts, num_pairs) + num_pairs // tiling.rows
    program_columns = options["BLOCK_COLUMNS"] * tiling.column_tiles
    expert_gemm_kernel[-(-columns // program_columns), max_tiles](
        rows, x_scales, values, scales, factors, pairs, counts, to, out_scales, pairs.shape[1],
        x_stride, out_stride, ROW_PAIRS=num_pairs // rows.shape[0], NUM_EXPERTS=experts,
        WIDTH=width, COLUMNS=columns, GATED=gated, ROUND_SCALES=round_scales,
        NATIVE=not group and native_fp8(rows), EXPERTS=next_power_of_2(experts), LIMIT=limit,
        GROUP=group, KIND=kind, **options,
    )  # fmt: skip
