"""Device functions that several kernels share."""

from __future__ import annotations

# the runtime decides before Triton is imported whether kernels are compiled or interpreted
import fd_dsa.triton_runtime  # noqa: F401  isort: skip
import triton
import triton.language as tl


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
