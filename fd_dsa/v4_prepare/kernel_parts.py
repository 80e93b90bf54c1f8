# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""The parts of a row's work: its HCA lists, its windows, its tokens' scalars and plans.

Of a row's `q` tokens the first `kept` are sound, all or none of them; the others become padding.

Sources: ROCm/ATOM #728 (the lists), #817 and #894 (rows of the rings, prefill rows).
"""

from __future__ import annotations

from fd_dsa.triton_runtime import paddle_jit  # noqa: F401, before triton
from fd_dsa.v4_prepare.kernel_rows import load_cells, sum_capped, sum_quotients

import triton
import triton.language as tl


@triton.jit
def write_hca_lists(
    hca_idx_ptr,
    block_table_ptr,
    values_ptr,
    hca_before,
    row,
    start,
    kept,
    row_stride,
    first_changed,
    end_changed,
    comp_base,
    part,
    RATIO: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    PARTS: tl.constexpr,
    TILE: tl.constexpr,
    GROUP: tl.constexpr,
):
    """A share of a row's lists: tiles of entries, each loaded once for GROUP tokens."""
    per_block: tl.constexpr = BLOCK_SIZE // RATIO
    longest = tl.where(kept > 0, (start + kept) // RATIO, 0)
    num_tiles = tl.cdiv(longest, TILE)
    for item in range(part, num_tiles * tl.cdiv(kept, GROUP), PARTS):
        group = item // num_tiles
        entries = (item - group * num_tiles) * TILE + tl.arange(0, TILE)
        cells = load_cells(
            block_table_ptr,
            values_ptr,
            row,
            row_stride,
            first_changed,
            end_changed,
            entries // per_block,
            entries < longest,
        )
        listed = comp_base + cells * per_block + entries % per_block
        for number in range(group * GROUP, tl.minimum(group * GROUP + GROUP, kept)):
            position = start + number
            at = hca_before + sum_quotients(position, RATIO) - sum_quotients(start, RATIO)
            tl.store(hca_idx_ptr + at + entries, listed, mask=entries < (position + 1) // RATIO)


@triton.jit
def write_windows(
    win_idx_ptr,
    block_table_ptr,
    values_ptr,
    tokens_before,
    row,
    slot,
    start,
    q,
    kept,
    row_stride,
    first_changed,
    end_changed,
    share,
    num_shares,
    WINDOW: tl.constexpr,
    WINDOW_TILE: tl.constexpr,
    DRAFTS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    IS_PAGED: tl.constexpr,
    TILE: tl.constexpr,
):
    """A share of a row's windows: rows of the window pool, the oldest key first."""
    # a prefill row takes the keys of this step from their own tensor
    most_new = tl.where(kept > DRAFTS + 1, WINDOW, 0)
    for first in range(share * TILE, q, num_shares * TILE):
        numbers = first + tl.arange(0, TILE)
        seen = tl.minimum(start + numbers + 1, WINDOW)
        length = tl.where(numbers < kept, seen - tl.minimum(numbers + 1, most_new), 0)
        oldest = start + numbers + 1 - seen
        index = tl.arange(0, WINDOW_TILE)[None, :]
        positions = oldest[:, None] + index
        valid = index < length[:, None]
        if IS_PAGED:
            cells = load_cells(
                block_table_ptr,
                values_ptr,
                row,
                row_stride,
                first_changed,
                end_changed,
                positions // BLOCK_SIZE,
                valid,
            )
            pool_rows = cells * BLOCK_SIZE + positions % BLOCK_SIZE
        else:
            ring: tl.constexpr = WINDOW + DRAFTS
            pool_rows = slot * ring + positions % ring
        targets = win_idx_ptr + (tokens_before + numbers)[:, None] * WINDOW + index
        exists = (numbers < q)[:, None]
        if WINDOW_TILE != WINDOW:
            exists = exists & (index < WINDOW)
        tl.store(targets, tl.where(valid, pool_rows, -1), mask=exists)


@triton.jit
def _store_plan_rows(plan_ptr, at, tokens, row, positions, from_ring, mask):
    """Rows (token, row, position, sources from the state ring) of a plan."""
    cells = plan_ptr + at * 4
    tl.store(cells, tokens, mask=mask)
    tl.store(cells + 1, row, mask=mask)
    tl.store(cells + 2, positions, mask=mask)
    tl.store(cells + 3, from_ring, mask=mask)


@triton.jit
def _store_plans(
    plan_ptr,
    plan_dst_ptr,
    wplan_ptr,
    plan_before,
    wplan_before,
    tokens,
    numbers,
    row,
    start,
    kept,
    cells,
    comp_base,
    RATIO: tl.constexpr,
    POOL: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    """What one ratio's compressor has to do for the tokens of these numbers in their row."""
    positions = start + numbers
    live = numbers < kept
    from_ring = POOL - tl.minimum(numbers + 1, POOL)
    done = live & ((positions + 1) % RATIO == 0)
    at = plan_before + positions // RATIO - start // RATIO
    _store_plan_rows(plan_ptr, at, tokens, row, positions, from_ring, done)
    entries = comp_base + cells * (BLOCK_SIZE // RATIO) + positions % BLOCK_SIZE // RATIO
    tl.store(plan_dst_ptr + at, entries, mask=done)
    first_kept = kept - tl.minimum(kept, POOL)
    at = wplan_before + numbers - first_kept
    _store_plan_rows(
        wplan_ptr, at, tokens, row, positions, from_ring, live & (numbers >= first_kept)
    )


@triton.jit
def write_tokens(
    positions_ptr,
    req_of_token_ptr,
    win_len_ptr,
    ext_len_ptr,
    swa_write_ptr,
    hca_indptr_ptr,
    csa_visible_ptr,
    csa_indptr_ptr,
    plan_r1_ptr,
    plan_dst_r1_ptr,
    wplan_r1_ptr,
    plan_r2_ptr,
    plan_dst_r2_ptr,
    wplan_r2_ptr,
    block_table_ptr,
    values_ptr,
    tokens_before,
    hca_before,
    csa_before,
    csa_plan_before,
    csa_wplan_before,
    hca_plan_before,
    hca_wplan_before,
    row,
    slot,
    start,
    q,
    kept,
    row_stride,
    first_changed,
    end_changed,
    comp_base,
    share,
    num_shares,
    WINDOW: tl.constexpr,
    DRAFTS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    CSA_RATIO: tl.constexpr,
    HCA_RATIO: tl.constexpr,
    TOPK: tl.constexpr,
    IS_PAGED: tl.constexpr,
    TILE: tl.constexpr,
):
    """A share of what a row's tokens have one number of, and the plans."""
    is_prefill = kept > DRAFTS + 1
    most_new = tl.where(is_prefill, WINDOW, 0)
    # of a prefill row's keys a ring keeps the last ones, so that no two fall on one row
    first_kept = tl.where(is_prefill, start + kept - WINDOW, 0)
    hca_start = hca_before - sum_quotients(start, HCA_RATIO)
    csa_start = csa_before - sum_capped(start, CSA_RATIO, TOPK)
    for first in range(share * TILE, q, num_shares * TILE):
        numbers = first + tl.arange(0, TILE)
        exists, live = numbers < q, numbers < kept
        tokens, positions = tokens_before + numbers, start + numbers
        tl.store(positions_ptr + tokens, tl.where(live, positions, 0), mask=exists)
        tl.store(req_of_token_ptr + tokens, tl.where(live, row, -1), mask=exists)
        new = tl.minimum(numbers + 1, most_new)
        old = tl.minimum(positions + 1, WINDOW) - new
        tl.store(win_len_ptr + tokens, tl.where(live, old, 0), mask=exists)
        tl.store(ext_len_ptr + tokens, tl.where(live, new, 0), mask=exists)
        cells = load_cells(
            block_table_ptr,
            values_ptr,
            row,
            row_stride,
            first_changed,
            end_changed,
            positions // BLOCK_SIZE,
            live,
        )
        if IS_PAGED:
            written = cells * BLOCK_SIZE + positions % BLOCK_SIZE
        else:
            ring: tl.constexpr = WINDOW + DRAFTS
            written = tl.where(positions >= first_kept, slot * ring + positions % ring, -1)
        tl.store(swa_write_ptr + tokens, tl.where(live, written, -1), mask=exists)
        hca = tl.where(live, hca_start + sum_quotients(positions + 1, HCA_RATIO), hca_before)
        tl.store(hca_indptr_ptr + tokens + 1, hca, mask=exists)
        visible = tl.where(live, (positions + 1) // CSA_RATIO, 0)
        tl.store(csa_visible_ptr + tokens, visible, mask=exists)
        csa = tl.where(live, csa_start + sum_capped(positions + 1, CSA_RATIO, TOPK), csa_before)
        tl.store(csa_indptr_ptr + tokens + 1, csa, mask=exists)
        _store_plans(
            plan_r1_ptr,
            plan_dst_r1_ptr,
            wplan_r1_ptr,
            csa_plan_before,
            csa_wplan_before,
            tokens,
            numbers,
            row,
            start,
            kept,
            cells,
            comp_base,
            CSA_RATIO,
            2 * CSA_RATIO,
            BLOCK_SIZE,
        )
        _store_plans(
            plan_r2_ptr,
            plan_dst_r2_ptr,
            wplan_r2_ptr,
            hca_plan_before,
            hca_wplan_before,
            tokens,
            numbers,
            row,
            start,
            kept,
            cells,
            comp_base,
            HCA_RATIO,
            HCA_RATIO,
            BLOCK_SIZE,
        )
