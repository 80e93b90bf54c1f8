"""What several kernels share: how they are launched, and device functions."""

from __future__ import annotations

import inspect
from collections.abc import Callable

from fd_dsa.triton_runtime import Kernel, paddle_jit

import triton  # isort: skip
import triton.language as tl  # isort: skip


def step_kernel(
    strided: tuple[str, ...] = (),
    specialized: tuple[str, ...] = (),
    unaligned: tuple[str, ...] = (),
    waits: bool = False,
) -> Callable[[Callable[..., object]], Kernel]:
    """`paddle_jit` of a kernel whose numbers change from step to step.

    None of them selects another compiled form but those `specialized`, nor does the alignment of
    tensors `unaligned`; every tensor, named `*_ptr`, must be contiguous but those `strided`.
    One that `waits` may be launched while the kernel before it runs; see `paddle_jit`.
    """

    def decorate(function: Callable[..., object]) -> Kernel:
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


@triton.jit
def key_bounds(
    token, batch_id, live, position_ids_ptr, offsets_ptr, key_starts_ptr, seq_lens_encoder_ptr
):
    """First key of each token and the end of its keys, int32; (0, 0) of what is not live.

    See `key_bounds.py`; pointers from `offsets_ptr` on are None in steps of decode tokens only.
    """
    row = tl.zeros_like(token) + batch_id
    live = live & (row >= 0)
    end = tl.load(position_ids_ptr + token, mask=live, other=-1).to(tl.int32) + 1
    first = tl.zeros_like(end)
    if offsets_ptr is not None:
        is_prompt = tl.load(seq_lens_encoder_ptr + row, mask=live, other=0) > 0
        start = tl.load(key_starts_ptr + row, mask=live, other=0)
        count = tl.load(key_starts_ptr + row + 1, mask=live, other=0) - start
        entry = offsets_ptr + 2 * token
        begin = tl.load(entry, mask=live, other=0) - start
        stop = tl.load(entry + 1, mask=live, other=0) - start
        begin = tl.minimum(tl.maximum(begin, 0), count)
        stop = tl.maximum(tl.minimum(stop, count), begin)
        first = tl.where(is_prompt, begin, 0)
        end = tl.where(is_prompt, stop, end)
    return first, end
