# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""Every index list of a step in one Triton launch, from one slab.

A program has a row and a part of its work: its tokens' scalars and plans, its tokens' windows, or
its HCA lists. Programs past the last row take the padding behind the last token as a row whose
tokens are not sound. A program sums what the rows before its own add to the offsets it needs, so
there is one launch, no atomic and no order among the programs.

Sources: ROCm/ATOM #728 (the lists), #817 and #894 (rows of the rings, prefill rows), #2039 (lists
made on the device); vLLM #57122 (what is valid is found where it is written).
"""

from __future__ import annotations

from fd_dsa.triton_runtime import paddle_jit
from fd_dsa.v4_prepare.kernel_parts import write_hca_lists, write_tokens, write_windows
from fd_dsa.v4_prepare.kernel_rows import (
    effective,
    hca_before,
    load_rows,
    sums_before,
    tokens_before,
)

import triton
import triton.language as tl


@triton.jit
def _clear(list_ptr, begin, end, program, num_programs, TILE: tl.constexpr):
    """-1 in the cells [begin, end), a share of them per program."""
    for first in range(begin + program * TILE, end, num_programs * TILE):
        cells = first + tl.arange(0, TILE)
        tl.store(list_ptr + cells, tl.full((TILE,), -1, tl.int32), mask=cells < end)


@triton.jit
def _report_fault(
    slab,
    rollback_ptr,
    num_rows,
    num_rollback,
    ctx_at,
    q_at,
    error_address,
    ERROR_SLOTS: tl.constexpr,
    ERROR_WORDS: tl.constexpr,
    ROW_TILE: tl.constexpr,
):
    """Fault, row, value, limit and stamp of the lowest row that is not sound, if there is one."""
    lowest = num_rows
    for first in range(0, num_rows, ROW_TILE):
        rows = first + tl.arange(0, ROW_TILE)
        q, kept, _ = load_rows(slab, rollback_ptr, rows, num_rows, num_rollback, ctx_at, q_at)
        lowest = tl.minimum(lowest, tl.min(tl.where(q > kept, rows, num_rows)))
    if lowest < num_rows:
        rollback = tl.load(rollback_ptr + lowest)
        q = tl.load(slab + q_at + lowest)
        left = tl.load(slab + ctx_at + lowest) - rollback
        stamp = tl.load(slab)
        # host memory, which the device writes through the bus
        words = (error_address + stamp % ERROR_SLOTS * (4 * ERROR_WORDS)).to(
            tl.pointer_type(tl.int32)
        )
        is_negative = rollback < 0
        tl.store(words, tl.where(is_negative, 1, 2))
        tl.store(words + 1, lowest)
        tl.store(words + 2, tl.where(is_negative, rollback, left))
        tl.store(words + 3, tl.where(is_negative, 0, q))
        tl.store(words + 4, stamp)


@triton.jit
def _write_ends(
    plan_r1_ptr,
    plan_dst_r1_ptr,
    wplan_r1_ptr,
    plan_r2_ptr,
    plan_dst_r2_ptr,
    wplan_r2_ptr,
    csa_plan,
    csa_wplan,
    hca_plan,
    hca_wplan,
    csa_plan_rows,
    csa_wplan_rows,
    hca_plan_rows,
    hca_wplan_rows,
    share,
    num_shares,
    TILE: tl.constexpr,
):
    """A share of the plan rows behind the last one: a row left there would be done again."""
    _clear(plan_r1_ptr, 4 * csa_plan, 4 * csa_plan_rows, share, num_shares, TILE)
    _clear(plan_dst_r1_ptr, csa_plan, csa_plan_rows, share, num_shares, TILE)
    _clear(wplan_r1_ptr, 4 * csa_wplan, 4 * csa_wplan_rows, share, num_shares, TILE)
    _clear(plan_r2_ptr, 4 * hca_plan, 4 * hca_plan_rows, share, num_shares, TILE)
    _clear(plan_dst_r2_ptr, hca_plan, hca_plan_rows, share, num_shares, TILE)
    _clear(wplan_r2_ptr, 4 * hca_wplan, 4 * hca_wplan_rows, share, num_shares, TILE)


@paddle_jit(
    do_not_specialize=(
        "slab_offset",
        "num_rollback",
        "error_address",
        "num_rows",
        "num_tokens",
        "row_stride",
        "comp_base",
        "csa_plan_rows",
        "csa_wplan_rows",
        "hca_plan_rows",
        "hca_wplan_rows",
    ),
    do_not_specialize_on_alignment=("rollback_ptr",),
)
def expand_kernel(
    slabs_ptr,
    rollback_ptr,
    block_table_ptr,
    positions_ptr,
    req_of_token_ptr,
    cu_q_ptr,
    ctx_ptr,
    win_idx_ptr,
    win_len_ptr,
    ext_len_ptr,
    swa_write_ptr,
    hca_indptr_ptr,
    hca_idx_ptr,
    csa_visible_ptr,
    csa_indptr_ptr,
    plan_r1_ptr,
    plan_dst_r1_ptr,
    wplan_r1_ptr,
    plan_r2_ptr,
    plan_dst_r2_ptr,
    wplan_r2_ptr,
    counts_ptr,
    slab_offset,
    num_rollback,
    error_address,
    num_rows,
    num_tokens,
    row_stride,
    comp_base,
    csa_plan_rows,
    csa_wplan_rows,
    hca_plan_rows,
    hca_wplan_rows,
    ctx_at,
    q_at,
    slot_at,
    run_column_at,
    run_start_at,
    values_at,
    WINDOW: tl.constexpr,
    DRAFTS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    CSA_RATIO: tl.constexpr,
    HCA_RATIO: tl.constexpr,
    TOPK: tl.constexpr,
    IS_PAGED: tl.constexpr,
    ERROR_SLOTS: tl.constexpr,
    ERROR_WORDS: tl.constexpr,
    TOKEN_PARTS: tl.constexpr,
    WINDOW_PARTS: tl.constexpr,
    HCA_PARTS: tl.constexpr,
    ROW_TILE: tl.constexpr,
    TOKEN_TILE: tl.constexpr,
    WINDOW_ROWS: tl.constexpr,
    WINDOW_TILE: tl.constexpr,
    HCA_TILE: tl.constexpr,
    HCA_GROUP: tl.constexpr,
    RUN_TILE: tl.constexpr,
):
    """All outputs of a step; names, shapes and values are those of `V4Arrays`.

    Grid: (rows + programs for padding, parts). `slabs_ptr` holds slabs as `SlabLayout` says;
    `error_address` points to host memory of ERROR_SLOTS * ERROR_WORDS words.
    """
    # slabs and their sections start at multiples of 16 words; here the compiler is told so
    slab = slabs_ptr + slab_offset // 16 * 16
    row = tl.program_id(0)
    part = tl.program_id(1)

    q = tl.load(slab + q_at + row, mask=row < num_rows, other=0)
    ctx = tl.load(slab + ctx_at + row, mask=row < num_rows, other=0)
    kept = q
    if rollback_ptr is not None:
        held = row < tl.minimum(num_rows, num_rollback)
        kept, ctx = effective(q, ctx, tl.load(rollback_ptr + row, mask=held, other=0))
    start = ctx - kept
    slot = tl.load(slab + slot_at + row, mask=row < num_rows, other=0)
    first_changed = tl.load(slab + run_column_at + row, mask=row < num_rows, other=0)
    run_start = tl.load(slab + run_start_at + row, mask=row < num_rows, other=0)
    run_end = tl.load(slab + run_start_at + row + 1, mask=row < num_rows, other=0)
    end_changed = first_changed + run_end - run_start
    values = slab + values_at + run_start - first_changed

    is_padding = row >= num_rows
    padding_program = tl.where(is_padding, row - num_rows, 0)
    num_programs = tl.where(is_padding, tl.num_programs(0) - num_rows, 1)
    limit = tl.minimum(row, num_rows)

    if part < TOKEN_PARTS:
        tokens, hca, csa, csa_plan, csa_wplan, hca_plan, hca_wplan = sums_before(
            slab,
            rollback_ptr,
            num_rollback,
            ctx_at,
            q_at,
            limit,
            CSA_RATIO,
            HCA_RATIO,
            TOPK,
            ROW_TILE,
        )
        q = tl.where(is_padding, num_tokens - tokens, q)
        share = padding_program * TOKEN_PARTS + part
        num_shares = num_programs * TOKEN_PARTS
        if is_padding:
            _write_ends(
                plan_r1_ptr,
                plan_dst_r1_ptr,
                wplan_r1_ptr,
                plan_r2_ptr,
                plan_dst_r2_ptr,
                wplan_r2_ptr,
                csa_plan,
                csa_wplan,
                hca_plan,
                hca_wplan,
                csa_plan_rows,
                csa_wplan_rows,
                hca_plan_rows,
                hca_wplan_rows,
                share,
                num_shares,
                TOKEN_TILE,
            )
            if share == 0:
                tl.store(cu_q_ptr, 0)
                tl.store(hca_indptr_ptr, 0)
                tl.store(csa_indptr_ptr, 0)
                tl.store(counts_ptr, tl.load(slab + 1))
                tl.store(counts_ptr + 1, tokens)
                tl.store(counts_ptr + 2, hca)
                tl.store(counts_ptr + 3, csa)
                tl.store(counts_ptr + 4, csa_plan)
                tl.store(counts_ptr + 5, csa_wplan)
                tl.store(counts_ptr + 6, hca_plan)
                tl.store(counts_ptr + 7, hca_wplan)
                if rollback_ptr is not None:
                    _report_fault(
                        slab,
                        rollback_ptr,
                        num_rows,
                        num_rollback,
                        ctx_at,
                        q_at,
                        error_address,
                        ERROR_SLOTS,
                        ERROR_WORDS,
                        ROW_TILE,
                    )
        else:
            if part == 0:
                tl.store(cu_q_ptr + row + 1, tokens + q)
                tl.store(ctx_ptr + row, ctx)
        write_tokens(
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
            values,
            tokens,
            hca,
            csa,
            csa_plan,
            csa_wplan,
            hca_plan,
            hca_wplan,
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
            WINDOW,
            DRAFTS,
            BLOCK_SIZE,
            CSA_RATIO,
            HCA_RATIO,
            TOPK,
            IS_PAGED,
            TOKEN_TILE,
        )
    elif part < TOKEN_PARTS + WINDOW_PARTS:
        tokens = tokens_before(slab, q_at, limit, ROW_TILE)
        q = tl.where(is_padding, num_tokens - tokens, q)
        write_windows(
            win_idx_ptr,
            block_table_ptr,
            values,
            tokens,
            row,
            slot,
            start,
            q,
            kept,
            row_stride,
            first_changed,
            end_changed,
            padding_program * WINDOW_PARTS + part - TOKEN_PARTS,
            num_programs * WINDOW_PARTS,
            WINDOW,
            WINDOW_TILE,
            DRAFTS,
            BLOCK_SIZE,
            IS_PAGED,
            WINDOW_ROWS,
        )
    elif hca_idx_ptr is not None:
        hca = hca_before(
            slab,
            rollback_ptr,
            num_rollback,
            ctx_at,
            q_at,
            # a row that lists nothing needs no offset
            tl.where(kept > 0, row, 0),
            HCA_RATIO,
            ROW_TILE,
        )
        write_hca_lists(
            hca_idx_ptr,
            block_table_ptr,
            values,
            hca,
            row,
            start,
            kept,
            row_stride,
            first_changed,
            end_changed,
            comp_base,
            part - TOKEN_PARTS - WINDOW_PARTS,
            HCA_RATIO,
            BLOCK_SIZE,
            HCA_PARTS,
            HCA_TILE,
            HCA_GROUP,
        )

    # no program reads these cells of the table in this launch
    table = block_table_ptr + row * row_stride
    num_parts: tl.constexpr = TOKEN_PARTS + WINDOW_PARTS + HCA_PARTS
    for first in range(part * RUN_TILE, run_end - run_start, num_parts * RUN_TILE):
        columns = first_changed + first + tl.arange(0, RUN_TILE)
        new = tl.load(values + columns, mask=columns < end_changed, other=0)
        tl.store(table + columns, new, mask=columns < end_changed)
