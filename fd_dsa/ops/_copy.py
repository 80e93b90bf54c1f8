"""Copies between tensors of a device in one launch, into memory that does not move."""

from __future__ import annotations

from math import prod
from typing import Any

from fd_dsa.errors import ShapeError
from fd_dsa.triton_runtime import paddle_jit

import triton.language as tl  # isort: skip

_BLOCK = 4096


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
