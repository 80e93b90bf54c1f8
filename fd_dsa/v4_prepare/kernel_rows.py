# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""What the parts of the expand kernel share: rows of a slab, sums over them, table cells.

No sum runs over tokens or programs: what a row adds to an offset is a closed form of its lengths.
Sums are int32 and may pass 2^31 on the way. They are right modulo 2^32, as nothing is divided
after a product, and every offset that is stored fits int32 (`V4PrepareConfig` sees to that).
"""

from __future__ import annotations

from fd_dsa.triton_runtime import paddle_jit  # noqa: F401, before triton

import triton
import triton.language as tl


@triton.jit
def sum_quotients(n, RATIO: tl.constexpr):
    """x // RATIO summed over x = 0..n, modulo 2^32; n >= 0."""
    whole = n // RATIO
    # whole * (whole - 1) / 2, divided before it is multiplied
    pairs = (whole >> 1) * ((whole - 1) | 1)
    return RATIO * pairs + whole * (n - whole * RATIO + 1)


@triton.jit
def sum_capped(n, RATIO: tl.constexpr, MOST: tl.constexpr):
    """min(x // RATIO, MOST) summed over x = 0..n, modulo 2^32; n >= 0."""
    below = tl.minimum(n, RATIO * MOST - 1)
    return sum_quotients(below, RATIO) + MOST * (n - below)


@triton.jit
def effective(q, ctx, rollback):
    """How many of a row's tokens are sound, and its length; of one row or of many.

    All or none of a row's tokens are sound: none where the rollback is negative or leaves less
    than the step adds. Such a row has length 0; an idle row keeps its own.
    """
    kept = tl.where((rollback < 0) | (rollback > ctx - q), 0, q)
    return kept, tl.where(kept > 0, ctx - rollback, tl.where(q > 0, 0, ctx))


@triton.jit
def load_rows(slab, rollback_ptr, rows, limit, num_rollback, ctx_at, q_at):
    """Tokens, sound tokens and length of a tile of rows; 0 from row `limit` on.

    The tile may end in the sections behind: without a mask four rows are one load.
    """
    exists = rows < limit
    q = tl.where(exists, tl.load(slab + q_at + rows), 0)
    ctx = tl.where(exists, tl.load(slab + ctx_at + rows), 0)
    kept = q
    if rollback_ptr is not None:
        held = rows < tl.minimum(limit, num_rollback)
        kept, ctx = effective(q, ctx, tl.load(rollback_ptr + rows, mask=held, other=0))
    return q, kept, ctx


@triton.jit
def tokens_before(slab, q_at, limit, ROW_TILE: tl.constexpr):
    """Tokens of the rows below `limit`."""
    tokens = tl.zeros((ROW_TILE,), tl.int32)
    for first in range(0, limit, ROW_TILE):
        rows = first + tl.arange(0, ROW_TILE)
        tokens += tl.where(rows < limit, tl.load(slab + q_at + rows), 0)
    return tl.sum(tokens)


@triton.jit
def hca_before(
    slab,
    rollback_ptr,
    num_rollback,
    ctx_at,
    q_at,
    limit,
    HCA_RATIO: tl.constexpr,
    ROW_TILE: tl.constexpr,
):
    """HCA entries that the tokens of the rows below `limit` list."""
    hca = tl.zeros((ROW_TILE,), tl.int32)
    for first in range(0, limit, ROW_TILE):
        rows = first + tl.arange(0, ROW_TILE)
        _, kept, ctx = load_rows(slab, rollback_ptr, rows, limit, num_rollback, ctx_at, q_at)
        hca += sum_quotients(ctx, HCA_RATIO) - sum_quotients(ctx - kept, HCA_RATIO)
    return tl.sum(hca)


@triton.jit
def sums_before(
    slab,
    rollback_ptr,
    num_rollback,
    ctx_at,
    q_at,
    limit,
    CSA_RATIO: tl.constexpr,
    HCA_RATIO: tl.constexpr,
    TOPK: tl.constexpr,
    ROW_TILE: tl.constexpr,
):
    """Tokens, HCA and CSA entries, plan and write-plan rows of both ratios, below row `limit`."""
    tokens = tl.zeros((ROW_TILE,), tl.int32)
    hca = tl.zeros((ROW_TILE,), tl.int32)
    csa = tl.zeros((ROW_TILE,), tl.int32)
    csa_plan = tl.zeros((ROW_TILE,), tl.int32)
    hca_plan = tl.zeros((ROW_TILE,), tl.int32)
    csa_wplan = tl.zeros((ROW_TILE,), tl.int32)
    hca_wplan = tl.zeros((ROW_TILE,), tl.int32)
    for first in range(0, limit, ROW_TILE):
        rows = first + tl.arange(0, ROW_TILE)
        q, kept, ctx = load_rows(slab, rollback_ptr, rows, limit, num_rollback, ctx_at, q_at)
        start = ctx - kept
        tokens += q
        hca += sum_quotients(ctx, HCA_RATIO) - sum_quotients(start, HCA_RATIO)
        csa += sum_capped(ctx, CSA_RATIO, TOPK) - sum_capped(start, CSA_RATIO, TOPK)
        csa_plan += ctx // CSA_RATIO - start // CSA_RATIO
        hca_plan += ctx // HCA_RATIO - start // HCA_RATIO
        csa_wplan += tl.minimum(kept, 2 * CSA_RATIO)
        hca_wplan += tl.minimum(kept, HCA_RATIO)
    return (
        tl.sum(tokens),
        tl.sum(hca),
        tl.sum(csa),
        tl.sum(csa_plan),
        tl.sum(csa_wplan),
        tl.sum(hca_plan),
        tl.sum(hca_wplan),
    )


@triton.jit
def load_cells(
    block_table_ptr,
    values_ptr,
    row,
    row_stride,
    first_changed,
    end_changed,
    columns,
    mask,
):
    """Blocks of a row's table columns: of the slab where they changed, else of the table.

    `values_ptr` points to where the cell of column 0 would lie in the slab.
    """
    changed = (columns >= first_changed) & (columns < end_changed)
    new = tl.load(values_ptr + columns, mask=mask & changed, other=0)
    table = block_table_ptr + row * row_stride
    old = tl.load(table + columns, mask=mask & (changed == 0), other=0)
    return tl.where(changed, new, old)
