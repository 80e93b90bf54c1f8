"""Index arrays of a step in one Triton launch, from tensors that an engine has on the device.

`expand_kernel` makes all lists of a step from a slab that the host has copied. This kernel makes
only the arrays that kernels of a device read. It reads token counts and block tables where the
engine keeps them, so it may be captured. The slot of a row is its number.
"""

from __future__ import annotations

from fd_dsa.ops.step_kernel import step_kernel
from fd_dsa.v4_prepare.kernel import clear_plans, write_plans

import triton  # isort: skip
import triton.language as tl  # isort: skip


@triton.jit
def _sums_before(
    before_ptr,
    new_ptr,
    limit,
    CSA_RATIO: tl.constexpr,
    HCA_RATIO: tl.constexpr,
    ROW_TILE: tl.constexpr,
):
    """Return tokens and plan rows, summed below row `limit`."""
    tokens = tl.zeros((ROW_TILE,), tl.int32)
    csa_plan = tl.zeros((ROW_TILE,), tl.int32)
    csa_kept = tl.zeros((ROW_TILE,), tl.int32)
    hca_plan = tl.zeros((ROW_TILE,), tl.int32)
    hca_kept = tl.zeros((ROW_TILE,), tl.int32)
    for first in range(0, limit, ROW_TILE):
        rows = first + tl.arange(0, ROW_TILE)
        start = tl.load(before_ptr + rows, mask=rows < limit, other=0)
        new = tl.load(new_ptr + rows, mask=rows < limit, other=0)
        tokens += new
        csa_plan += (start + new) // CSA_RATIO - start // CSA_RATIO
        hca_plan += (start + new) // HCA_RATIO - start // HCA_RATIO
        csa_kept += tl.minimum(new, 2 * CSA_RATIO)
        hca_kept += tl.minimum(new, HCA_RATIO)
    return (
        tl.sum(tokens),
        tl.sum(csa_plan),
        tl.sum(csa_kept),
        tl.sum(hca_plan),
        tl.sum(hca_kept),
    )


@triton.jit
def _write_sources(
    kept_ptr, slot, end, first_token, start, POOL: tl.constexpr, TILE: tl.constexpr
):  # fmt: skip
    """Write the POOL sources before position `end` for slot `slot`, or -1 for no source.

    Position p is token `first_token + p`. Positions before `start` are not of the step.
    """
    for first in range(0, POOL, TILE):
        numbers = first + tl.arange(0, TILE)
        positions, inside = end - POOL + numbers, numbers < POOL
        tokens = tl.where((slot >= 0) & (positions >= start), first_token + positions, -1)
        cells, none = kept_ptr + 4 * numbers, tl.zeros((TILE,), tl.int32)
        tl.store(cells, tokens, mask=inside)
        tl.store(cells + 1, none + slot, mask=inside)
        tl.store(cells + 2, positions, mask=inside)
        tl.store(cells + 3, none, mask=inside)


@step_kernel()
def place_step_kernel(
    before_ptr,
    new_ptr,
    block_table_ptr,
    slots_ptr,
    positions_ptr,
    rows_ptr,
    starts_ptr,
    ring_rows_ptr,
    newest_ptr,
    csa_entries_ptr,
    csa_rows_ptr,
    csa_kept_ptr,
    hca_entries_ptr,
    hca_rows_ptr,
    hca_kept_ptr,
    snapshot_rows_ptr,
    num_rows,
    num_tokens,
    columns,
    csa_num_entries,
    csa_num_kept,
    hca_num_entries,
    hca_num_kept,
    WINDOW: tl.constexpr,
    RING: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    CSA_RATIO: tl.constexpr,
    HCA_RATIO: tl.constexpr,
    ROW_TILE: tl.constexpr,
    TILE: tl.constexpr,
):
    """Place the tokens of row `program 0`, or the padding after the last row.

    `before_ptr` and `new_ptr` have the tokens of each row before the step and in it. A ring has
    RING keys: a window, and one for each draft of a row. Grid: (rows + 1, parts of a row).

    `slots_ptr` has the place for a snapshot of each row, after the last full block before the row's
    last token, or -1. The window keys of a snapshot get `snapshot_rows_ptr`. Its CSA sources follow
    the kept ones, 2 * CSA_RATIO a row. Without `slots_ptr` the step writes no snapshots.
    """
    row, part, parts = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    sums = _sums_before(before_ptr, new_ptr, row, CSA_RATIO, HCA_RATIO, ROW_TILE)
    csa = (csa_entries_ptr, csa_rows_ptr, csa_kept_ptr, csa_num_entries, csa_num_kept)
    hca = (hca_entries_ptr, hca_rows_ptr, hca_kept_ptr, hca_num_entries, hca_num_kept)
    if row == num_rows:
        clear_plans(csa, sums[1], sums[2], part, parts, TILE)
        clear_plans(hca, sums[3], sums[4], part, parts, TILE)
        if part == 0:
            tl.store(starts_ptr, 0)
        for first in range(sums[0] + part * TILE, num_tokens, parts * TILE):
            tokens = first + tl.arange(0, TILE)
            exists, none = tokens < num_tokens, tl.full((TILE,), -1, tl.int32)
            tl.store(positions_ptr + tokens, tl.zeros((TILE,), tl.int32), mask=exists)
            tl.store(rows_ptr + tokens, none, mask=exists)
            tl.store(ring_rows_ptr + tokens, none, mask=exists)
            if slots_ptr is not None:
                tl.store(snapshot_rows_ptr + tokens, none, mask=exists)
            tl.store(newest_ptr + tokens, none.to(tl.int64), mask=exists)
    else:
        start, new = tl.load(before_ptr + row), tl.load(new_ptr + row)
        if part == 0:
            tl.store(starts_ptr + row + 1, sums[0] + new)
        here = (row, start, new)
        slot = -1
        # the end of the block, with a snapshot
        end = (start + new - 1) // BLOCK_SIZE * BLOCK_SIZE
        if slots_ptr is not None:
            slot = tl.load(slots_ptr + row)
            if part == 0:
                sources = csa_kept_ptr + 4 * (csa_num_kept + row * 2 * CSA_RATIO)
                _write_sources(sources, slot, end, sums[0] - start, start, 2 * CSA_RATIO, TILE)
        for first in range(part * TILE, new, parts * TILE):
            numbers = first + tl.arange(0, TILE)
            live, tokens, positions = numbers < new, sums[0] + numbers, start + numbers
            # further drafts may be past the longest row
            positions = tl.minimum(positions, columns * BLOCK_SIZE - 1)
            tl.store(positions_ptr + tokens, positions, mask=live)
            tl.store(rows_ptr + tokens, row, mask=live)
            # only the last keys of a prompt are kept, so that no two keys share a place
            kept = (new - numbers <= WINDOW) | (new <= RING - WINDOW + 1)
            place = tl.where(kept, row * RING + positions % RING, -1)
            tl.store(ring_rows_ptr + tokens, place, mask=live)
            if slots_ptr is not None:
                kept = (slot >= 0) & (positions < end) & (positions >= end - WINDOW)
                place = tl.where(kept, slot * RING + positions % RING, -1)
                tl.store(snapshot_rows_ptr + tokens, place, mask=live)
            newest = (positions + 1) // CSA_RATIO - 1
            tl.store(newest_ptr + tokens, newest.to(tl.int64), mask=live)
            cell = block_table_ptr + row * columns + positions // BLOCK_SIZE
            work = (tokens, numbers, tl.load(cell, mask=live, other=0), 0)
            write_plans(csa, sums[1:3], work, here, CSA_RATIO, 2 * CSA_RATIO, BLOCK_SIZE)
            write_plans(hca, sums[3:], work, here, HCA_RATIO, HCA_RATIO, BLOCK_SIZE)
