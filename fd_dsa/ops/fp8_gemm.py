"""GEMM of FP8 activations and an FP8 weight, with scales for each 128 values along K.

Tensor cores multiply the codes; each group of 128 along K is scaled and added in float32.

Few rows make it a read of the weight: their columns are the rows of the instructions, of which
there are 64 at least, and K is split among programs until they fill the device. Many rows fill the
device unsplit.

Source: DeepSeek-V3 (arXiv 2412.19437) §3.3.2, promotion of partial sums every 128 values.
"""

from __future__ import annotations

from typing import NamedTuple

from fd_dsa.errors import ShapeError
from fd_dsa.ops.dense_kernels import GROUP, Fp8Rows, empty_beside
from fd_dsa.ops.fixed_order import fixed_order
from fd_dsa.ops.split_sums import (
    clear_counters,
    rows_of_tiles,
    scratch_beside,
    splits_of,
    sum_of_parts,
)
from fd_dsa.ops.step_kernel import step_kernel
from fd_dsa.ops.triton_fp8 import stored
from fd_dsa.tensor import Tensor
from fd_dsa.triton_runtime import INTERPRETING, start_next, wait_for_inputs
from fd_dsa.triton_runtime.device_api import traits_for
from fd_dsa.triton_runtime.driver import FP8_CAPABILITY

import triton  # isort: skip
import triton.language as tl  # isort: skip

_GROUP = tl.constexpr(GROUP)
# row tiles whose programs are neighbours: together they read few rows and few columns
_BAND = tl.constexpr(8)


class Tiling(NamedTuple):
    """How a launch is cut.

    Attributes:
        rows, columns: of a tile; of FP8 128 is a multiple of `columns`.
        num_warps, num_stages: as of a launch; a stage is a group of 128 along K.
        programs: K is split as long as a launch has no more of them.
    """

    rows: int
    columns: int
    num_warps: int
    num_stages: int
    programs: int = 1

    @property
    def options(self) -> dict[str, int]:
        """Constants and options of a launch."""
        return {
            "BLOCK_ROWS": self.rows,
            "BLOCK_COLUMNS": self.columns,
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
        }


def configuration(rows: int) -> Tiling:
    """The tiling for so many rows: the fastest of those that `benchmarks.gpu_gemms` times."""
    tile = next((tile for tile in (16, 32, 64) if rows <= tile), 128)
    if rows > 32:
        return Tiling(tile, 128, 8, 4, 132)
    # of 32 rows four stages leave room for four programs on a processor: the 576 of the largest
    # weight are more than a Hopper GPU runs at once then
    return Tiling(tile, 64, 4, 4 if tile == 16 else 3, 396)


@triton.jit
def operand(codes, NATIVE: tl.constexpr):
    """A tile of e4m3 codes for `tl.dot`: unchanged, or float16, which holds all of their values."""
    if not NATIVE:
        bits = codes.to(tl.uint16)
        # the exponents' biases differ by 8
        half = ((bits & 0x7F) << 7 | (bits & 0x80) << 8).to(tl.float16, bitcast=True) * 256.0
        codes = tl.where((bits & 0x7F) == 0x7F, float("nan"), half)
    return codes


@triton.jit
def fp8_pointer(pointer, NATIVE: tl.constexpr):
    """Where codes begin, as tensor cores read them or as bytes."""
    return pointer.to(tl.pointer_type(tl.float8e4nv)) if NATIVE else pointer


@triton.jit
def _scaled_dot(rows, columns, scale):
    """Products of tiles [rows, K] and [columns, K] times `scale` [rows]; transposed of few rows."""
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
    """float32 [rows, columns] sums over the groups from `first` to `last` along K, and, if GATED,
    those of the weight's second half, which is `to_up` values and `to_up_scales` scales away.

    Args:
        x: pointers [rows, 1] to the first code of each row, x_scales [rows] to its first scale;
            from a group's scale to the next one's it is `x_stride`.
        live: which rows are there.
        weight: pointers [columns, 1], scales a pointer to the first scale of these columns.
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
        # scales are read a group ahead: a wait for them would end the copies ahead
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


@step_kernel(waits=True)
def fp8_linear_kernel(
    x_ptr,
    x_scales_ptr,
    weight_ptr,
    weight_scales_ptr,
    out_ptr,
    scratch_ptr,
    num_rows,
    x_stride,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    NATIVE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    STEPS: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """Tile `program 0` of the result; `program 1` adds STEPS groups of 128 along K."""
    wait_for_inputs()
    row_tiles = (num_rows + BLOCK_ROWS - 1) // BLOCK_ROWS
    in_band: tl.constexpr = (COLUMNS + BLOCK_COLUMNS - 1) // BLOCK_COLUMNS * _BAND
    tile = tl.program_id(0)
    first_tile = tile // in_band * _BAND
    height = tl.minimum(row_tiles - first_tile, _BAND)
    row = (first_tile + tile % in_band % height) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    first_column = tile % in_band // height * BLOCK_COLUMNS
    column = first_column + tl.arange(0, BLOCK_COLUMNS)
    live, row = row < num_rows, row.to(tl.int64)
    groups: tl.constexpr = (WIDTH + _GROUP - 1) // _GROUP
    first = tl.program_id(1) * STEPS
    x = fp8_pointer(x_ptr, NATIVE) + row[:, None] * WIDTH
    # past the last column it is the last one again, which needs no mask
    source = tl.minimum(column, COLUMNS - 1).to(tl.int64)
    weight = fp8_pointer(weight_ptr, NATIVE) + source[:, None] * WIDTH
    scales = weight_scales_ptr + first_column // _GROUP * groups
    total, _ = fp8_sums(
        x, x_scales_ptr + row, live, weight, scales, 0, 0, x_stride, first,
        tl.minimum(first + STEPS, groups), WIDTH, False, BLOCK_ROWS, BLOCK_COLUMNS, NATIVE,
    )  # fmt: skip
    start_next()
    last = True
    if SPLITS > 1:
        total, last = sum_of_parts(total, scratch_ptr, tile, tl.program_id(1), SPLITS)
    if last:
        to = out_ptr + row[:, None] * COLUMNS + column[None, :]
        mask = live[:, None] & (column < COLUMNS)[None, :]
        tl.store(to, stored(total, out_ptr), mask=mask)


def native_fp8(x: Tensor) -> bool:
    """Whether the device of a tensor multiplies e4m3 numbers: from compute capability 8.9 on."""
    return not INTERPRETING and traits_for(x).capability >= FP8_CAPABILITY


def launch_options(
    num_rows: int, columns: int, width: int, tiling: Tiling
) -> tuple[tuple[int, int], dict[str, int]]:
    """Grid and sizes of a launch with a tiling."""
    tiles = -(-num_rows // tiling.rows) * -(-columns // tiling.columns)
    tile_size, steps = tiling.rows * tiling.columns, -(-width // GROUP)
    splits, each = splits_of(steps, tiles, tile_size, tiling.programs)
    return (tiles, splits), tiling.options | {"STEPS": each, "SPLITS": splits}


def check_weight(codes: Tensor, scales: Tensor, width: int) -> None:
    """Raise ShapeError unless a weight has rows of `width` and its scales fit it."""
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
    scratch: Tensor | None = None,
) -> Tensor:
    """rows times weight^T, [num_rows, out] in `out_dtype`; sums in float32, in a fixed order.

    Args:
        rows: activations, [num_rows, width].
        codes: uint8 [out, width], contiguous, e4m3 bits.
        scales: float32 [ceil(out / 128), ceil(width / 128)], contiguous.
        out_dtype: "bfloat16" or "float32".
        tiling: another than that of `configuration`, for benchmarks and tests.
        scratch: of `new_scratch`, for launches beside those that use the device's own.

    Raises:
        ShapeError: the weight does not fit the rows, or its scales not its codes.
    """
    (num_rows, width), columns = rows.codes.shape, codes.shape[0]
    check_weight(codes, scales, width)
    out = empty_beside(rows.codes, num_rows, columns, dtype=out_dtype)
    if not num_rows or not columns:
        return out
    sizes, tiling = (num_rows, columns, width), tiling or configuration(rows_of_tiles(num_rows))
    if fixed_order():
        tiling = tiling._replace(programs=1)
    grid, options = launch_options(*sizes, tiling)
    if grid[1] > 1 and scratch is None:
        scratch = scratch_beside(rows.scales, "FP8 GEMM")
        if scratch is None:
            grid, options = launch_options(*sizes, tiling._replace(programs=1))
    try:
        fp8_linear_kernel[grid](
            rows.codes, rows.scales, codes, scales, out, scratch if grid[1] > 1 else None,
            num_rows, rows.scales.shape[1], WIDTH=width, COLUMNS=columns,
            NATIVE=native_fp8(codes), **options,
        )  # fmt: skip
    except BaseException:
        clear_counters(scratch)
        raise
    return out
