"""What several kernels share: how they are launched, and device functions."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from fd_dsa.triton_runtime import paddle_jit

import triton  # isort: skip
import triton.language as tl  # isort: skip


def step_kernel(
    strided: tuple[str, ...] = (),
    specialized: tuple[str, ...] = (),
    unaligned: tuple[str, ...] = (),
    waits: bool = False,
) -> Callable[[Callable[..., Any]], Any]:
    """`paddle_jit` of a kernel whose numbers change from step to step.

    None of them selects another compiled form but those `specialized`, nor does the alignment of
    tensors `unaligned`; every tensor, named `*_ptr`, must be contiguous but those `strided`.
    One that `waits` may be launched while the kernel before it runs; see `paddle_jit`.
    """

    def decorate(function: Callable[..., Any]) -> Any:
        parameters = inspect.signature(function).parameters.values()
        names = {p.name for p in parameters if "constexpr" not in str(p.annotation)}
        tensors = {name for name in names if name.endswith("_ptr")}
        return paddle_jit(
            function,
            do_not_specialize=names - tensors - set(specialized),
            do_not_specialize_on_alignment=unaligned,
            contiguous=tensors - set(strided),
            waits=waits,
        )

    return decorate


@triton.jit
def stored_values(x, WIDE: tl.constexpr):
    """Values of a float32, bfloat16 or int16 (bfloat16 bits) load, as WIDE."""
    if x.dtype == tl.int16:
        x = x.to(tl.bfloat16, bitcast=True)
    return x.to(WIDE)


@triton.jit
def e4m3_values(x, WIDE: tl.constexpr):
    """Values of the e4m3 bits in a uint8 load, as WIDE; exact in float16 and wider."""
    return x.to(tl.float8e4nv, bitcast=True).to(tl.float16).to(WIDE)


@triton.jit
def blocks_of(
    block_tables_ptr, batch_id, positions, mask, table_width, num_blocks, BLOCK_SIZE: tl.constexpr
):
    """Physical block of each position of a row; -1 where there is none.

    int32, and never an entry outside the table or a block outside the cache.
    """
    column = positions // BLOCK_SIZE
    inside = mask & (column < table_width)
    entry = block_tables_ptr + batch_id.to(tl.int64) * table_width + column
    block = tl.load(entry, mask=inside, other=-1)
    return tl.where((block >= 0) & (block < num_blocks), block, -1)
