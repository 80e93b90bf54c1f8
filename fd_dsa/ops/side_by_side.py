"""Two GEMMs of a few rows in one launch: an FP8 weight beside a bfloat16 one.

A decode step has a few rows, so the time of a GEMM is that of reading its weight plus that of its
launches. Here one grid has the tiles of both weights. K is split so that each program reads about
the same number of bytes, and so that all programs run at once.

The FP8 weight may be that of gate and up. A program that has the sums of both then stores the FP8
codes of the activation.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from fd_dsa.errors import ShapeError
from fd_dsa.ops.dense_kernels import (
    GROUP,
    clamped,
    empty_beside,
    empty_fp8_rows,
    kernel_arguments,
    native_fp8,
    quantized,
    sigmoid,
)
from fd_dsa.ops.device_functions import stored, to_bfloat16, widened
from fd_dsa.ops.expert_gemm import plain_sums
from fd_dsa.ops.fp8_gemm import check_weight
from fd_dsa.ops.fp8_sums import fp8_pointer, fp8_sums
from fd_dsa.ops.split_sums import MAX_SPLITS, PROCESSORS, Tiling, scratch_beside, sum_of_parts
from fd_dsa.ops.step_kernel import step_kernel
from fd_dsa.tensor import Fp8Rows, Normed, Tensor
from fd_dsa.triton_runtime import start_next, wait_for_inputs

import triton  # isort: skip
import triton.language as tl  # isort: skip

MAX_ROWS = 32
"""Maximum number of rows of a launch."""
MAX_GATED_ROWS = 8
"""Maximum number of rows of a gated launch, whose sums too few programs would add."""
_GROUP = tl.constexpr(GROUP)
# columns of a tile of the bfloat16 weight
_OTHER_COLUMNS = 64


class Division(NamedTuple):
    """Programs of a launch, and the constants that divide the work among them."""

    num_programs: int
    constants: dict[str, int]


@lru_cache(maxsize=4096)
def division(
    rows: int, columns: int, other_columns: int, width: int, gated: bool, is_split: bool = True
) -> Division:
    """Return the programs of a launch, and its constants and options.

    Args:
        columns: columns of the result; a gated weight has twice as many.
        other_columns: columns of the bfloat16 weight.
        is_split: False computes each tile in one program.
    """
    if gated:
        # two programs fit a processor of an H200
        tiling, other_width = Tiling(16, GROUP, 4, 3, 2 * PROCESSORS), 128
    else:
        # tiles as in `fp8_gemm.configuration`
        tile, stages = (16, 4) if rows <= 16 else (32, 3)
        tiling, other_width = Tiling(tile, 64, 4, stages, 3 * PROCESSORS), 64
    tiles = -(-columns // tiling.columns), -(-other_columns // _OTHER_COLUMNS)
    steps = -(-width // GROUP), -(-width // other_width)
    # steps of the bfloat16 weight that read as many bytes as one of the FP8 weight
    ratio = tiling.columns * (1 + gated) * GROUP // (_OTHER_COLUMNS * other_width * 2)
    splits, of_part = _splits(tiles, steps, ratio, tiling.programs if is_split else 0)
    sizes = tiling.rows * tiling.columns * (1 + gated), tiling.rows * _OTHER_COLUMNS
    # parts of the bfloat16 weight follow those of the FP8 weight
    parts = tiles[0] * splits[0] * sizes[0] if splits[0] > 1 else 0
    first_sum = max(tiles[0], -(-parts // (splits[1] * sizes[1])))
    return Division(
        tiles[0] * splits[0] + tiles[1] * splits[1],
        tiling.options
        | {
            "STEPS": of_part[0],
            "SPLITS": splits[0],
            "OTHER_BLOCK": _OTHER_COLUMNS,
            "OTHER_WIDTH": other_width,
            "OTHER_STEPS": of_part[1],
            "OTHER_SPLITS": splits[1],
            "FIRST_SUM": first_sum,
        },
    )


def _splits(
    tiles: Sequence[int], steps: Sequence[int], ratio: int, programs: int
) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return the number of parts of the sums of each weight, and the steps of a part.

    A program has as few steps as possible if there are at most `programs` programs.

    Args:
        tiles, steps: tiles of each weight, and steps of each of its sums.
        ratio: steps of the second weight that take the time of one of the first.
    """
    most = max(steps[0], -(-steps[1] // ratio))
    splits = 1, 1
    for few in range(1, most):
        found = -(-steps[0] // few), -(-steps[1] // (few * ratio))
        if max(found) <= MAX_SPLITS and tiles[0] * found[0] + tiles[1] * found[1] <= programs:
            splits = found
            break
    of_part = -(-steps[0] // splits[0]), -(-steps[1] // splits[1])
    return (-(-steps[0] // of_part[0]), -(-steps[1] // of_part[1])), of_part


@triton.jit
def _fp8_tile(
    x, x_scales, x_stride, live, weight_ptr, weight_scales_ptr, scratch_ptr, tile, split,
    WIDTH: tl.constexpr, COLUMNS: tl.constexpr, GATED: tl.constexpr, NATIVE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, STEPS: tl.constexpr,
    SPLITS: tl.constexpr,
):  # fmt: skip
    """Return the sums of a tile, those of its second half, and True in the program that has them.

    See `fp8_sums`.
    """
    first_column = tile * BLOCK_COLUMNS
    # columns past the end repeat the last column, so that loads need no mask
    source = tl.minimum(first_column + tl.arange(0, BLOCK_COLUMNS), COLUMNS - 1).to(tl.int64)
    groups: tl.constexpr = (WIDTH + _GROUP - 1) // _GROUP
    first = split * STEPS
    total, up = fp8_sums(
        fp8_pointer(x, NATIVE), x_scales, live,
        fp8_pointer(weight_ptr, NATIVE) + source[:, None] * WIDTH,
        weight_scales_ptr + first_column // _GROUP * groups, COLUMNS * WIDTH,
        COLUMNS // _GROUP * groups, x_stride, first, tl.minimum(first + STEPS, groups), WIDTH,
        GATED, BLOCK_ROWS, BLOCK_COLUMNS, NATIVE,
    )  # fmt: skip
    start_next()
    last = True
    if SPLITS > 1:
        if GATED:
            both = tl.reshape(tl.join(total, up), [BLOCK_ROWS, 2 * BLOCK_COLUMNS])
            both, last = sum_of_parts(both, scratch_ptr, tile, split, SPLITS, live[:, None])
            total, up = tl.split(tl.reshape(both, [BLOCK_ROWS, BLOCK_COLUMNS, 2]))
        else:
            total, last = sum_of_parts(total, scratch_ptr, tile, split, SPLITS, live[:, None])
    return total, up, last


@step_kernel(waits=True)
def side_by_side_kernel(
    x_ptr,
    x_codes_ptr,
    x_scales_ptr,
    weight_ptr,
    weight_scales_ptr,
    other_ptr,
    out_ptr,
    codes_ptr,
    scales_ptr,
    scales_stride,
    other_out_ptr,
    scratch_ptr,
    num_rows,
    x_stride,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    OTHER_COLUMNS: tl.constexpr,
    GATED: tl.constexpr,
    LIMIT: tl.constexpr,
    ROUND_SCALES: tl.constexpr,
    NATIVE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    STEPS: tl.constexpr,
    SPLITS: tl.constexpr,
    OTHER_BLOCK: tl.constexpr,
    OTHER_WIDTH: tl.constexpr,
    OTHER_STEPS: tl.constexpr,
    OTHER_SPLITS: tl.constexpr,
    FIRST_SUM: tl.constexpr,
):
    """Compute a part of a tile of the FP8 weight, or in later programs of the bfloat16 weight.

    With GATED the FP8 weight has gate and up of COLUMNS columns each, and a tile is one group of
    the codes. FIRST_SUM is the number of the first sum of the bfloat16 weight.
    """
    wait_for_inputs()
    row = tl.arange(0, BLOCK_ROWS)
    live, row = row < num_rows, row.to(tl.int64)
    tiles: tl.constexpr = (COLUMNS + BLOCK_COLUMNS - 1) // BLOCK_COLUMNS
    program = tl.program_id(0)
    if program < tiles * SPLITS:
        tile = program % tiles
        total, up, last = _fp8_tile(
            x_codes_ptr + row[:, None] * WIDTH, x_scales_ptr + row, x_stride, live, weight_ptr,
            weight_scales_ptr, scratch_ptr, tile, program // tiles, WIDTH, COLUMNS, GATED, NATIVE,
            BLOCK_ROWS, BLOCK_COLUMNS, STEPS, SPLITS,
        )  # fmt: skip
        if last:
            column = tile * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
            place = row[:, None] * COLUMNS + column[None, :]
            if GATED:
                # the values that a result without FP8 has
                gate, up = widened(to_bfloat16(total)), widened(to_bfloat16(up))
                gate, up = clamped(gate, up, LIMIT)
                values = widened(to_bfloat16(gate * sigmoid(gate) * up))
                codes, scale = quantized(values, ROUND_SCALES)
                tl.store(scales_ptr + tile * scales_stride + row, scale, mask=live)
                tl.store(codes_ptr + place, codes, mask=live[:, None])
            else:
                mask = live[:, None] & (column < COLUMNS)[None, :]
                tl.store(out_ptr + place, stored(total, out_ptr), mask=mask)
    else:
        # other names than above, because a name has one type
        other_tiles: tl.constexpr = (OTHER_COLUMNS + OTHER_BLOCK - 1) // OTHER_BLOCK
        other_tile = (program - tiles * SPLITS) % other_tiles
        split = (program - tiles * SPLITS) // other_tiles
        other_column = other_tile * OTHER_BLOCK + tl.arange(0, OTHER_BLOCK)
        source = tl.minimum(other_column, OTHER_COLUMNS - 1).to(tl.int64)
        first = split * (OTHER_STEPS * OTHER_WIDTH)
        sums, _ = plain_sums(
            x_ptr + row[:, None] * WIDTH, live, other_ptr + source[:, None] * WIDTH, 0, first,
            tl.minimum(first + OTHER_STEPS * OTHER_WIDTH, WIDTH), WIDTH, False, BLOCK_ROWS,
            OTHER_BLOCK, OTHER_WIDTH,
        )  # fmt: skip
        start_next()
        has_sums = True
        if OTHER_SPLITS > 1:
            number = FIRST_SUM + other_tile
            sums, has_sums = sum_of_parts(
                sums, scratch_ptr, number, split, OTHER_SPLITS, live[:, None]
            )
        if has_sums:
            other_place = row[:, None] * OTHER_COLUMNS + other_column[None, :]
            inside = live[:, None] & (other_column < OTHER_COLUMNS)[None, :]
            tl.store(other_out_ptr + other_place, sums, mask=inside)


def side_by_side(
    x: Normed,
    weight: tuple[Tensor, Tensor],
    other: Tensor,
    round_scales: bool | None = None,
    limit: float | None = None,
) -> tuple[Any, Tensor]:
    """Multiply rows by both weights^T. Sums are in float32, in a fixed order.

    Args:
        x: at least one row and at most MAX_ROWS, bfloat16 and FP8 [num_rows, width].
        weight: codes, uint8 [out, width], and scales as for `fp8_linear`.
        other: bfloat16 [columns, width], contiguous.
        round_scales: None returns bfloat16. Otherwise the weight has gate and up, and the result is
            that of `silu_and_mul` with such scales. There are then at most MAX_GATED_ROWS rows.
        limit: as for `silu_and_mul`.

    Returns:
        bfloat16 [num_rows, out] or Fp8Rows [num_rows, out / 2]; and float32 [num_rows, columns].

    Raises:
        ShapeError: there are more rows, or the weight does not fit, or a group of 128 columns has
            columns of gate and up.
    """
    gated, (codes, scales), rows = round_scales is not None, weight, x.fp8
    (num_rows, width), other_columns = rows.codes.shape, other.shape[0]
    columns = codes.shape[0] // (1 + gated)
    check_weight(codes, scales, width)
    if gated and columns % GROUP:
        raise ShapeError(
            f"FP8 weight: got {columns} columns of the gate, allowed are multiples of {GROUP}"
        )
    most = MAX_GATED_ROWS if gated else MAX_ROWS
    if not 0 < num_rows <= most or other.shape[1] != width:
        raise ShapeError(
            f"GEMMs side by side: got {num_rows} rows of {width} values, and rows of "
            f"{other.shape[1]} values in the second weight; allowed are 1 to {most} rows, of "
            "the same number of values"
        )
    out: Tensor | Fp8Rows
    if gated:
        out = empty_fp8_rows(rows.codes, num_rows, columns)
    else:
        out = empty_beside(x.plain, num_rows, columns)
    others = empty_beside(x.plain, num_rows, other_columns, dtype="float32")
    sizes = num_rows, columns, other_columns, width, gated
    num_programs, constants = division(*sizes)
    scratch = None
    if max(constants["SPLITS"], constants["OTHER_SPLITS"]) > 1:
        scratch = scratch_beside(rows.scales, "GEMMs side by side")
        num_programs, constants = division(*sizes, scratch is not None)
    side_by_side_kernel[(num_programs,)](
        x.plain, rows.codes, rows.scales, codes, scales, other, *kernel_arguments(out), others,
        scratch, num_rows, rows.scales.shape[1], WIDTH=width, COLUMNS=columns,
        OTHER_COLUMNS=other_columns, GATED=gated, LIMIT=limit, ROUND_SCALES=bool(round_scales),
        NATIVE=native_fp8(codes), **constants,
    )  # fmt: skip
    return out, others
