"""Copies between tensors of a device in one launch, into memory that does not move."""

from __future__ import annotations

from math import prod
from typing import Any

from fd_dsa.errors import ShapeError
from fd_dsa.ops._host import check_shape
from fd_dsa.triton_runtime import paddle_jit

import triton.language as tl  # isort: skip

_BLOCK = 4096
_HEADS_BLOCK = 1024


@paddle_jit(do_not_specialize=("num_values",), contiguous=("source_ptr", "target_ptr"))
def copy_kernel(source_ptr, target_ptr, num_values, BLOCK: tl.constexpr):
    """`num_values` values, a block a program."""
    offset = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offset < num_values
    tl.store(target_ptr + offset, tl.load(source_ptr + offset, mask=mask), mask=mask)


def copy_rows(source: Any, target: Any) -> None:
    """Copy a contiguous tensor to the start of another of the same dtype.

    Raises:
        ShapeError: `target` is smaller.
        LaunchError: one is not contiguous, or not on the device of the other.
    """
    num_values = prod(source.shape)
    if num_values > prod(target.shape):
        raise ShapeError(
            f"copy_rows: source has {num_values} values, allowed are the {prod(target.shape)} of "
            "target"
        )
    if num_values:
        blocks = -(-num_values // _BLOCK)
        copy_kernel[(blocks,)](source, target, num_values, BLOCK=_BLOCK, num_warps=4)


@paddle_jit(contiguous=("source_ptr", "target_ptr"))
def copy_heads_kernel(
    source_ptr,
    target_ptr,
    SOURCE_ROW: tl.constexpr,
    TARGET_ROW: tl.constexpr,
    COPIED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The first COPIED values of row `program 0`, block `program 1` of them."""
    row = tl.program_id(0).to(tl.int64)
    value = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = value < COPIED
    copied = tl.load(source_ptr + row * SOURCE_ROW + value, mask=mask)
    tl.store(target_ptr + row * TARGET_ROW + value, copied, mask=mask)


def copy_heads(source: Any, target: Any) -> None:
    """Copy the heads that both tensors have, of each row; the others of `target` stay.

    Args:
        source, target: contiguous [num_rows, heads, width] of one dtype, each with its own number
            of heads.

    Raises:
        ShapeError: another number of rows or another width.
        LaunchError: one is not contiguous, or not on the device of the other.
    """
    num_rows, source_heads, width = source.shape
    target_heads = target.shape[1]
    check_shape("copy_heads", "target", target, (num_rows, None, width))
    copied = min(source_heads, target_heads) * width
    if num_rows:
        copy_heads_kernel[(num_rows, -(-copied // _HEADS_BLOCK))](
            source,
            target,
            SOURCE_ROW=source_heads * width,
            TARGET_ROW=target_heads * width,
            COPIED=copied,
            BLOCK=_HEADS_BLOCK,
            num_warps=4,
        )
