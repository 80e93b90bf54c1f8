"""GEMM of FP8 activations and an FP8 weight, with scales for each 128 values along K.

Tensor cores multiply the codes. Each group of 128 along K is scaled and added in float32.

With few rows the time is that of reading the weight. The kernel then computes the transpose,
because the instructions have at least 16 or 64 rows. With up to 8 rows the warps of a program
divide K, so that small tiles of columns fill the device. With more rows programs divide K until
they fill the device. Many rows fill it without a division.

A GEMM by group multiplies each group of a row's inputs by a weight of its own.

Source: DeepSeek-V3 (arXiv 2412.19437) §3.3.2, promotion of partial sums every 128 values.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from fd_dsa.errors import ShapeError
from fd_dsa.ops.dense_kernels import (
    GROUP,
    empty_beside,
    empty_fp8_rows,
    kernel_arguments,
    native_fp8,
)
from fd_dsa.ops.device_functions import stored
from fd_dsa.ops.fixed_order import fixed_order
from fd_dsa.ops.fp8_sums import fp8_pointer, fp8_sums, sums_of_stages
from fd_dsa.ops.head_gemm import store_heads
from fd_dsa.ops.split_sums import (
    MAX_SPLITS,
    PROCESSORS,
    Tiling,
    columns_of_parts,
    rows_of_tiles,
    scratch_beside,
    splits_of,
    sum_of_parts,
)
from fd_dsa.ops.step_kernel import step_kernel
from fd_dsa.tensor import Fp8Rows, Tensor
from fd_dsa.triton_runtime import start_next, wait_for_inputs

import triton.language as tl  # isort: skip

_GROUP = tl.constexpr(GROUP)
# row tiles of a band, whose programs are neighbours and so read the same rows and columns
_BAND = tl.constexpr(8)
# a tile of few rows that quantizes its columns
_WHOLE_GROUP = Tiling(16, GROUP, 4, 3)


@lru_cache(maxsize=4096)
def configuration(rows: int, columns: int, width: int, *, quantizes: bool = False) -> Tiling:
    """Return the tiling for a shape that is the fastest in `benchmarks.gpu_gemms`.

    With `quantizes` a tile of columns is a group that can be quantized. Or tiles are joined to one,
    and split no sum.
    """
    few = _few_rows(rows, columns, width, quantizes)
    if few is not None:
        return few
    tile = next((tile for tile in (16, 32, 64) if rows <= tile), 128)
    if rows > 32:
        return Tiling(tile, 128, 8, 4, PROCESSORS)
    of_processor = 4
    if rows > 4:
        # With more rows the last program of a tile adds the parts of its sum more slowly. So fewer
        # parts are faster, unless a processor has many steps.
        steps = -(-columns // 64) * -(-width // GROUP) / PROCESSORS
        of_processor = 2 if steps <= 16 else 3 if steps <= 64 else 4
    # three stages: with four and 32 rows a processor has room for only four programs, so that the
    # 576 programs of the largest weight would not run at once
    return Tiling(tile, GROUP if quantizes else 64, 4, 3, of_processor * PROCESSORS)


def _few_rows(rows: int, columns: int, width: int, quantizes: bool) -> Tiling | None:
    """Return the tiling with several groups in a stage. None if another form is faster."""
    groups, tile, tiles = width // GROUP, 8 if rows <= 8 else 16, -(-columns // 16)
    divisor = groups & -groups
    if rows > 16 or width % GROUP or divisor < 2 or tiles > 4 * PROCESSORS:
        return None
    if divisor == groups <= 4:
        # the programs read their weights while the launch before runs
        return Tiling(tile, 32, 4, 1, groups=groups)
    if quantizes:
        return Tiling(tile, 32 if tiles > 2 * PROCESSORS else 16, 4, 3, groups=min(divisor, 8))
    if rows > 8 or tiles < 64:
        return None
    # of a longer sum a program has larger stages, unless it shares its processor with many
    most = 8 if tiles > 2 * PROCESSORS else 4 if groups <= 16 else 8 if groups < 64 else 16
    return Tiling(tile, 16, 4, 3, groups=min(divisor, most))


@step_kernel(waits=True)
def fp8_linear_kernel(
    x_ptr,
    x_scales_ptr,
    weight_ptr,
    weight_scales_ptr,
    out_ptr,
    codes_ptr,
    scales_ptr,
    scales_stride,
    scratch_ptr,
    num_rows,
    x_stride,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    ROUND_SCALES: tl.constexpr,
    NATIVE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    GROUPS: tl.constexpr,
    STEPS: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """Compute tile `program 0` of the result from the groups of 128 along K of `program 1`.

    The columns are those of NUM_GROUPS weights, each of which reads WIDTH inputs of a row. Without
    `out_ptr` the columns of a tile are quantized, which are one group or a part of one.
    """
    tile = tl.program_id(0)
    if GROUPS > 1:
        # there is one row tile
        row, first_column = tl.arange(0, BLOCK_ROWS), tile * BLOCK_COLUMNS
    else:
        row_tiles = (num_rows + BLOCK_ROWS - 1) // BLOCK_ROWS
        in_band: tl.constexpr = (COLUMNS + BLOCK_COLUMNS - 1) // BLOCK_COLUMNS * _BAND
        first_tile = tile // in_band * _BAND
        height = tl.minimum(row_tiles - first_tile, _BAND)
        row = (first_tile + tile % in_band % height) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        first_column = tile % in_band // height * BLOCK_COLUMNS
    column = first_column + tl.arange(0, BLOCK_COLUMNS)
    live, row = row < num_rows, row.to(tl.int64)
    groups: tl.constexpr = (WIDTH + _GROUP - 1) // _GROUP
    first = tl.program_id(1) * STEPS if SPLITS > 1 else 0
    x = fp8_pointer(x_ptr, NATIVE) + row[:, None] * (NUM_GROUPS * WIDTH)
    x_scales = x_scales_ptr + row
    if NUM_GROUPS > 1:
        own = (first_column // (COLUMNS // NUM_GROUPS)).to(tl.int64)
        x += own * WIDTH
        x_scales += own * groups * x_stride
    # columns past the end repeat the last column, so that loads need no mask
    source = tl.minimum(column, COLUMNS - 1).to(tl.int64)
    weight = fp8_pointer(weight_ptr, NATIVE) + source[:, None] * WIDTH
    scales = weight_scales_ptr + first_column // _GROUP * groups
    end = tl.minimum(first + STEPS, groups) if SPLITS > 1 else groups
    if GROUPS > 1:
        total = sums_of_stages(
            x, x_scales, live, weight, scales, x_stride, first, end, BLOCK_ROWS, BLOCK_COLUMNS,
            NATIVE, GROUPS, STEPS == GROUPS,
        )  # fmt: skip
    else:
        wait_for_inputs()
        total, _ = fp8_sums(
            x, x_scales, live, weight, scales, 0, 0, x_stride, first, end, WIDTH, False,
            BLOCK_ROWS, BLOCK_COLUMNS, NATIVE,
        )  # fmt: skip
        start_next()
    last = True
    if SPLITS > 1:
        total, last = sum_of_parts(
            total, scratch_ptr, tile, tl.program_id(1), SPLITS, live[:, None]
        )
    elif out_ptr is None and BLOCK_COLUMNS < _GROUP:
        # a sum without parts
        total, last = columns_of_parts(
            total, scratch_ptr, tile, _GROUP // BLOCK_COLUMNS, live[:, None]
        )
    if last:
        if out_ptr is not None:
            to = out_ptr + row[:, None] * COLUMNS + column[None, :]
            mask = live[:, None] & (column < COLUMNS)[None, :]
            tl.store(to, stored(total, out_ptr), mask=mask)
        else:
            place = tl.arange(0, _GROUP)
            store_heads(
                total, row, place, first_column // _GROUP, COLUMNS // _GROUP, live, place < _GROUP,
                None, codes_ptr, scales_ptr, scales_stride, _GROUP, ROUND_SCALES,
            )  # fmt: skip


def launch_options(
    num_rows: int, columns: int, width: int, tiling: Tiling
) -> tuple[tuple[int, int], dict[str, int]]:
    """Return the grid of a launch with a tiling, and its constants and options."""
    if tiling.groups > 1:
        assert num_rows <= tiling.rows and not width % (tiling.groups * GROUP), (width, tiling)
    tiles = -(-num_rows // tiling.rows) * -(-columns // tiling.columns)
    tile_size, steps = tiling.rows * tiling.columns, -(-width // (tiling.groups * GROUP))
    most = min(MAX_SPLITS, tiling.programs // tiles)
    splits, of_part = splits_of(steps, tiles, tile_size, most)
    constants = {"GROUPS": tiling.groups, "STEPS": of_part * tiling.groups, "SPLITS": splits}
    return (tiles, splits), tiling.options | constants


def check_weight(codes: Tensor, scales: Tensor, width: int) -> None:
    """Raise ShapeError unless a weight has rows of `width` codes and scales that fit."""
    *outer, columns, own = codes.shape
    wanted = [*outer, -(-columns // GROUP), -(-own // GROUP)]
    if own != width or list(scales.shape) != wanted:
        raise ShapeError(
            f"FP8 weight: got codes {list(codes.shape)} and scales {list(scales.shape)}, allowed "
            f"are rows of {width} codes and scales {wanted}"
        )


def fp8_linear(
    rows: Fp8Rows,
    codes: Tensor,
    scales: Tensor,
    out_dtype: str = "bfloat16",
    *,
    tiling: Tiling | None = None,
) -> Tensor:
    """Multiply rows by weight^T: [num_rows, out]. Sums are in float32, in a fixed order.

    Args:
        rows: activations [num_rows, width].
        codes: uint8 [out, width], contiguous, e4m3 bits.
        scales: float32 [ceil(out / 128), ceil(width / 128)], contiguous.
        out_dtype: dtype of the result, "bfloat16" or "float32".
        tiling: tiling for benchmarks and tests. None takes that of `configuration`.

    Raises:
        ShapeError: the weight does not fit the rows, or its scales do not fit its codes.
    """
    num_rows, width = rows.codes.shape
    check_weight(codes, scales, width)
    out = empty_beside(rows.codes, num_rows, codes.shape[0], dtype=out_dtype)
    shape = rows_of_tiles(num_rows), codes.shape[0], width
    _launch(rows, codes, scales, out, tiling or configuration(*shape))
    return out


def fp8_linear_by_group(
    rows: Fp8Rows, codes: Tensor, scales: Tensor, round_scales: bool | None = None
) -> Any:
    """Multiply each group of the inputs of a row by its weight^T: [num_rows, groups * out].

    Args:
        rows: activations [num_rows, groups * width].
        codes: uint8 [groups * out, width], contiguous, e4m3 bits; both multiples of 128.
        scales: float32 [groups * out / 128, width / 128], contiguous.
        round_scales: None returns bfloat16. Otherwise the result is Fp8Rows with such scales.

    Raises:
        ShapeError: as for `fp8_linear`.
    """
    (num_rows, inputs), (columns, width) = rows.codes.shape, codes.shape
    groups = inputs // width
    check_weight(codes, scales, width)
    if inputs % width or width % GROUP or columns % (groups * GROUP):
        raise ShapeError(
            f"FP8 weight by group: got {[columns, width]} and rows of {inputs} codes, allowed are "
            f"groups of multiples of {GROUP}"
        )
    tiling = configuration(rows_of_tiles(num_rows), columns, width, quantizes=True)
    if round_scales is None:
        out: Any = empty_beside(rows.codes, num_rows, columns, dtype="bfloat16")
    else:
        out = empty_fp8_rows(rows.codes, num_rows, columns)
    _launch(rows, codes, scales, out, tiling, groups, bool(round_scales))
    return out


def _launch(
    rows: Fp8Rows,
    codes: Tensor,
    scales: Tensor,
    out: Tensor | Fp8Rows,
    tiling: Tiling,
    num_groups: int = 1,
    round_scales: bool = False,
) -> None:
    """Launch the kernel that fills `out`."""
    num_rows, (columns, width) = rows.codes.shape[0], codes.shape
    if not num_rows or not columns:
        return
    sizes = num_rows, columns, width
    if fixed_order():
        tiling = tiling._replace(programs=1)
    grid, options = launch_options(*sizes, tiling)
    is_joined = isinstance(out, Fp8Rows) and tiling.columns < GROUP
    scratch = None
    if grid[1] > 1 or is_joined:
        scratch = scratch_beside(rows.scales, "FP8 GEMM")
        if scratch is None:
            alone = _WHOLE_GROUP if is_joined else tiling._replace(programs=1)
            grid, options = launch_options(*sizes, alone)
    fp8_linear_kernel[grid](
        rows.codes, rows.scales, codes, scales, *kernel_arguments(out), scratch, num_rows,
        rows.scales.shape[1], WIDTH=width, COLUMNS=columns, NUM_GROUPS=num_groups,
        ROUND_SCALES=round_scales, NATIVE=native_fp8(codes), **options,
    )  # fmt: skip
