# long on purpose: one kernel
# mypy: disable-error-code="no-redef"
"""All index lists of a step in one Triton launch, and rows of selected CSA entries.

A program of `expand_kernel` has a row and one kind of its work: its tokens' scalars and plans, its
tokens' windows, or its HCA lists. Programs past the last row write the padding after the last
token, like a row whose tokens are all invalid. A program computes its offsets from the lengths of
all earlier rows. So one launch suffices, without atomics or an order among programs.

No sum runs over tokens or programs: the contribution of a row to an offset is a closed form of its
lengths. Intermediate int32 sums may exceed 2^31. They are correct modulo 2^32, because no division
follows a multiplication, and every stored offset fits int32 (`V4PrepareConfig` checks it).

A slab has the int32 words that are copied from host to device in one copy a step: a header, five
sections of equal size, then the changed cells of the block table, one run a row. Words after the
last cell are not copied and have values of an earlier step.

    header     | stamp, rows B, tokens T, number n of changed cells; the rest is not read
    ctx, q     | [max_num_seqs] each; 0 from row B on
    slot       | [max_num_seqs]
    run_column | [max_num_seqs], first changed column of a row
    run_start  | [max_num_seqs + 1], index of a row's first new cell in `values`
    values     | [n], new cells of row b from run_start[b] to run_start[b + 1]

Functions pass related values as tuples:

    lengths | pointers to ctx and q of a slab, and the number of rows with a rollback
    table   | pointers to column 0 of a row in the block table, and in the slab if it had column 0;
            | columns [first, end) of the slab
    row     | number, first position, and number of valid tokens: all or 0
    plans   | pointers to plan, destinations and write plan of one ratio, and the rows of both plans

Sources: ROCm/ATOM #728 (the lists), #817 and #894 (rows of the rings, prefill rows), #2039 (lists
made on the device). vLLM #57122 (validity decided where values are written), #57434 and #57659
(rows of selected entries once per selection, not per layer that reads them).
"""

from __future__ import annotations

from fd_dsa.ops.step_kernel import step_kernel

import triton
import triton.language as tl

HEADER_WORDS = 16
"""Alignment of sections in words: 64 bytes."""
ERROR_SLOTS = 16
"""Number of steps whose faults are stored.

A step's fault goes to slot `stamp % ERROR_SLOTS`.
"""
ERROR_WORDS = 8
"""Words of such a slot: fault, row, value, q of the row, stamp of the step.

Fault 1 is a negative rollback, fault 2 a row with fewer tokens than it adds. The value is the
rollback, or ctx - rollback. The remaining words are unused.
"""

_HEADER = tl.constexpr(HEADER_WORDS)
_ERROR_SLOTS = tl.constexpr(ERROR_SLOTS)
_ERROR_WORDS = tl.constexpr(ERROR_WORDS)


@triton.jit
def sum_quotients(n, RATIO: tl.constexpr):
    """Return x // RATIO summed over x = 0..n, modulo 2^32, for n >= 0."""
    whole = n // RATIO
    # whole * (whole - 1) / 2, divided before the multiplication
    pairs = (whole >> 1) * ((whole - 1) | 1)
    return RATIO * pairs + whole * (n - whole * RATIO + 1)


@triton.jit
def sum_capped(n, RATIO: tl.constexpr, CAP: tl.constexpr):
    """Return min(x // RATIO, CAP) summed over x = 0..n, modulo 2^32, for n >= 0."""
    below = tl.minimum(n, RATIO * CAP - 1)
    return sum_quotients(below, RATIO) + CAP * (n - below)


@triton.jit
def effective(q, ctx, rollback):
    """Return the number of valid tokens and the length, for one row or a tile of rows.

    All tokens are invalid if the rollback is negative or leaves less than the step adds. Such a row
    has length 0, an idle row keeps its own.
    """
    kept = tl.where((rollback < 0) | (rollback > ctx - q), 0, q)
    return kept, tl.where(kept > 0, ctx - rollback, tl.where(q > 0, 0, ctx))


@triton.jit
def load_rows(lengths, rollback_ptr, rows, limit):
    """Return tokens, valid tokens and length of a tile of rows, 0 from row `limit` on.

    The tile may extend into the next sections, because without a mask four rows are one load.
    """
    ctx_ptr, q_ptr, num_rollback = lengths
    exists = rows < limit
    q = tl.where(exists, tl.load(q_ptr + rows), 0)
    ctx = tl.where(exists, tl.load(ctx_ptr + rows), 0)
    kept = q
    if rollback_ptr is not None:
        held = rows < tl.minimum(limit, num_rollback)
        kept, ctx = effective(q, ctx, tl.load(rollback_ptr + rows, mask=held, other=0))
    return q, kept, ctx


@triton.jit
def hca_before(lengths, rollback_ptr, limit, HCA_RATIO: tl.constexpr, ROW_TILE: tl.constexpr):
    """Return the number of HCA entries listed by the tokens of rows below `limit`."""
    hca = tl.zeros((ROW_TILE,), tl.int32)
    for first in range(0, limit, ROW_TILE):
        rows = first + tl.arange(0, ROW_TILE)
        _, kept, ctx = load_rows(lengths, rollback_ptr, rows, limit)
        hca += sum_quotients(ctx, HCA_RATIO) - sum_quotients(ctx - kept, HCA_RATIO)
    return tl.sum(hca)


@triton.jit
def sums_before(
    lengths,
    rollback_ptr,
    limit,
    CSA_RATIO: tl.constexpr,
    HCA_RATIO: tl.constexpr,
    TOPK: tl.constexpr,
    ROW_TILE: tl.constexpr,
):
    """Return tokens, HCA and CSA entries, and plan rows, summed below row `limit`."""
    tokens = tl.zeros((ROW_TILE,), tl.int32)
    hca = tl.zeros((ROW_TILE,), tl.int32)
    csa = tl.zeros((ROW_TILE,), tl.int32)
    csa_plan = tl.zeros((ROW_TILE,), tl.int32)
    hca_plan = tl.zeros((ROW_TILE,), tl.int32)
    csa_wplan = tl.zeros((ROW_TILE,), tl.int32)
    hca_wplan = tl.zeros((ROW_TILE,), tl.int32)
    for first in range(0, limit, ROW_TILE):
        rows = first + tl.arange(0, ROW_TILE)
        q, kept, ctx = load_rows(lengths, rollback_ptr, rows, limit)
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
def load_cells(table, columns, mask):
    """Return blocks of a row's columns, from the slab if changed, else from the table."""
    table_ptr, values_ptr, first_changed, end_changed = table
    changed = (columns >= first_changed) & (columns < end_changed)
    new = tl.load(values_ptr + columns, mask=mask & changed, other=0)
    old = tl.load(table_ptr + columns, mask=mask & (changed == 0), other=0)
    return tl.where(changed, new, old)


@triton.jit
def _store_plan_rows(plan_ptr, at, tokens, row, positions, from_ring, mask):
    """Store rows (token, row, position, sources from the state ring) of a plan."""
    cells = plan_ptr + at * 4
    tl.store(cells, tokens, mask=mask)
    tl.store(cells + 1, row, mask=mask)
    tl.store(cells + 2, positions, mask=mask)
    tl.store(cells + 3, from_ring, mask=mask)


@triton.jit
def write_plans(
    plans, before, work, row, RATIO: tl.constexpr, POOL: tl.constexpr, BLOCK_SIZE: tl.constexpr
):
    """Write the work of one ratio's compressor for some tokens of a row.

    `work` has the tokens, their numbers in the row, their blocks and the first row of entries.
    """
    tokens, numbers, cells, comp_base = work
    plan_ptr, plan_dst_ptr, wplan_ptr = plans[:3]
    number, start, kept = row
    positions = start + numbers
    live = numbers < kept
    from_ring = POOL - tl.minimum(numbers + 1, POOL)
    done = live & ((positions + 1) % RATIO == 0)
    at = before[0] + positions // RATIO - start // RATIO
    _store_plan_rows(plan_ptr, at, tokens, number, positions, from_ring, done)
    entries = comp_base + cells * (BLOCK_SIZE // RATIO) + positions % BLOCK_SIZE // RATIO
    tl.store(plan_dst_ptr + at, entries, mask=done)
    first_kept = kept - tl.minimum(kept, POOL)
    at = before[1] + numbers - first_kept
    is_kept = live & (numbers >= first_kept)
    _store_plan_rows(wplan_ptr, at, tokens, number, positions, from_ring, is_kept)


@triton.jit
def _clear(list_ptr, begin, end, share, num_shares, TILE: tl.constexpr):
    """Write -1 to this program's share of the cells [begin, end)."""
    for first in range(begin + share * TILE, end, num_shares * TILE):
        cells = first + tl.arange(0, TILE)
        tl.store(list_ptr + cells, tl.full((TILE,), -1, tl.int32), mask=cells < end)


@triton.jit
def clear_plans(plans, num_plan, num_wplan, share, num_shares, TILE: tl.constexpr):
    """Clear a share of the plan rows after the last one, which would be executed again."""
    plan_ptr, plan_dst_ptr, wplan_ptr, plan_rows, wplan_rows = plans
    _clear(plan_ptr, 4 * num_plan, 4 * plan_rows, share, num_shares, TILE)
    _clear(plan_dst_ptr, num_plan, plan_rows, share, num_shares, TILE)
    _clear(wplan_ptr, 4 * num_wplan, 4 * wplan_rows, share, num_shares, TILE)


@triton.jit
def report_fault(slab, lengths, rollback_ptr, num_rows, error_address, ROW_TILE: tl.constexpr):
    """Write fault, row, value, limit and stamp of the lowest invalid row, if any."""
    ctx_ptr, q_ptr = lengths[:2]
    lowest = num_rows
    for first in range(0, num_rows, ROW_TILE):
        rows = first + tl.arange(0, ROW_TILE)
        q, kept, _ = load_rows(lengths, rollback_ptr, rows, num_rows)
        lowest = tl.minimum(lowest, tl.min(tl.where(q > kept, rows, num_rows)))
    if lowest < num_rows:
        rollback = tl.load(rollback_ptr + lowest)
        q = tl.load(q_ptr + lowest)
        left = tl.load(ctx_ptr + lowest) - rollback
        stamp = tl.load(slab)
        # host memory, written through the bus
        words = (error_address + stamp % _ERROR_SLOTS * (4 * _ERROR_WORDS)).to(
            tl.pointer_type(tl.int32)
        )
        is_negative = rollback < 0
        tl.store(words, tl.where(is_negative, 1, 2))
        tl.store(words + 1, lowest)
        tl.store(words + 2, tl.where(is_negative, rollback, left))
        tl.store(words + 3, tl.where(is_negative, 0, q))
        tl.store(words + 4, stamp)


@step_kernel(specialized=("section",), unaligned=("rollback_ptr",))
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
    section,
    WINDOW: tl.constexpr,
    DRAFTS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    CSA_RATIO: tl.constexpr,
    HCA_RATIO: tl.constexpr,
    TOPK: tl.constexpr,
    IS_PAGED: tl.constexpr,
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
    """Write all outputs of a step, with the names, shapes and values of `V4Arrays`.

    Grid: (rows + programs for padding, parts). `slabs_ptr` points to slabs with sections of
    `section` words, `error_address` to host memory of ERROR_SLOTS * ERROR_WORDS words.
    """
    # slabs and sections are aligned to 16 words, which this expression shows to the compiler
    slab = slabs_ptr + slab_offset // 16 * 16
    sections = slab + _HEADER
    lengths = (sections, sections + section, num_rollback)
    row = tl.program_id(0)
    part = tl.program_id(1)

    q = tl.load(sections + section + row, mask=row < num_rows, other=0)
    ctx = tl.load(sections + row, mask=row < num_rows, other=0)
    kept = q
    if rollback_ptr is not None:
        held = row < tl.minimum(num_rows, num_rollback)
        kept, ctx = effective(q, ctx, tl.load(rollback_ptr + row, mask=held, other=0))
    start = ctx - kept
    slot = tl.load(sections + 2 * section + row, mask=row < num_rows, other=0)
    first_changed = tl.load(sections + 3 * section + row, mask=row < num_rows, other=0)
    run_start = tl.load(sections + 4 * section + row, mask=row < num_rows, other=0)
    run_end = tl.load(sections + 4 * section + row + 1, mask=row < num_rows, other=0)
    end_changed = first_changed + run_end - run_start
    values = sections + 5 * section + run_start - first_changed
    table_ptr = block_table_ptr + row * row_stride
    table = (table_ptr, values, first_changed, end_changed)

    is_padding = row >= num_rows
    padding_program = tl.where(is_padding, row - num_rows, 0)
    num_programs = tl.where(is_padding, tl.num_programs(0) - num_rows, 1)
    limit = tl.minimum(row, num_rows)

    if part < TOKEN_PARTS:
        # scalars of each token, and the plans
        sums = sums_before(lengths, rollback_ptr, limit, CSA_RATIO, HCA_RATIO, TOPK, ROW_TILE)
        q = tl.where(is_padding, num_tokens - sums[0], q)
        share = padding_program * TOKEN_PARTS + part
        num_shares = num_programs * TOKEN_PARTS
        csa_plans = (plan_r1_ptr, plan_dst_r1_ptr, wplan_r1_ptr, csa_plan_rows, csa_wplan_rows)
        hca_plans = (plan_r2_ptr, plan_dst_r2_ptr, wplan_r2_ptr, hca_plan_rows, hca_wplan_rows)
        if is_padding:
            clear_plans(csa_plans, sums[3], sums[4], share, num_shares, TOKEN_TILE)
            clear_plans(hca_plans, sums[5], sums[6], share, num_shares, TOKEN_TILE)
            if share == 0:
                tl.store(cu_q_ptr, 0)
                tl.store(hca_indptr_ptr, 0)
                tl.store(csa_indptr_ptr, 0)
                tl.store(counts_ptr, tl.load(slab + 1))
                for index in tl.static_range(7):
                    tl.store(counts_ptr + 1 + index, sums[index])
                if rollback_ptr is not None:
                    report_fault(slab, lengths, rollback_ptr, num_rows, error_address, ROW_TILE)
        elif part == 0:
            tl.store(cu_q_ptr + row + 1, sums[0] + q)
            tl.store(ctx_ptr + row, ctx)
        is_prefill = kept > DRAFTS + 1
        max_new = tl.where(is_prefill, WINDOW, 0)
        # a ring stores only the last keys of a prefill row, so that no two keys share a row
        first_kept = tl.where(is_prefill, start + kept - WINDOW, 0)
        hca_start = sums[1] - sum_quotients(start, HCA_RATIO)
        csa_start = sums[2] - sum_capped(start, CSA_RATIO, TOPK)
        here = (row, start, kept)
        for first in range(share * TOKEN_TILE, q, num_shares * TOKEN_TILE):
            numbers = first + tl.arange(0, TOKEN_TILE)
            exists, live = numbers < q, numbers < kept
            tokens, positions = sums[0] + numbers, start + numbers
            tl.store(positions_ptr + tokens, tl.where(live, positions, 0), mask=exists)
            tl.store(req_of_token_ptr + tokens, tl.where(live, row, -1), mask=exists)
            new = tl.minimum(numbers + 1, max_new)
            old = tl.minimum(positions + 1, WINDOW) - new
            tl.store(win_len_ptr + tokens, tl.where(live, old, 0), mask=exists)
            tl.store(ext_len_ptr + tokens, tl.where(live, new, 0), mask=exists)
            cells = load_cells(table, positions // BLOCK_SIZE, live)
            if IS_PAGED:
                written = cells * BLOCK_SIZE + positions % BLOCK_SIZE
            else:
                ring: tl.constexpr = WINDOW + DRAFTS
                written = tl.where(positions >= first_kept, slot * ring + positions % ring, -1)
            tl.store(swa_write_ptr + tokens, tl.where(live, written, -1), mask=exists)
            hca = tl.where(live, hca_start + sum_quotients(positions + 1, HCA_RATIO), sums[1])
            tl.store(hca_indptr_ptr + tokens + 1, hca, mask=exists)
            visible = tl.where(live, (positions + 1) // CSA_RATIO, 0)
            tl.store(csa_visible_ptr + tokens, visible, mask=exists)
            csa = tl.where(live, csa_start + sum_capped(positions + 1, CSA_RATIO, TOPK), sums[2])
            tl.store(csa_indptr_ptr + tokens + 1, csa, mask=exists)
            work = (tokens, numbers, cells, comp_base)
            write_plans(csa_plans, sums[3:5], work, here, CSA_RATIO, 2 * CSA_RATIO, BLOCK_SIZE)
            write_plans(hca_plans, sums[5:], work, here, HCA_RATIO, HCA_RATIO, BLOCK_SIZE)
    elif part < TOKEN_PARTS + WINDOW_PARTS:
        # windows: rows of the window pool, oldest key at the front
        tokens = tl.zeros((ROW_TILE,), tl.int32)
        for first_row in range(0, limit, ROW_TILE):
            rows = first_row + tl.arange(0, ROW_TILE)
            tokens += tl.where(rows < limit, tl.load(lengths[1] + rows), 0)
        before = tl.sum(tokens)
        q = tl.where(is_padding, num_tokens - before, q)
        share = padding_program * WINDOW_PARTS + part - TOKEN_PARTS
        # a prefill row reads the keys of this step from a separate tensor
        max_new = tl.where(kept > DRAFTS + 1, WINDOW, 0)
        for first in range(share * WINDOW_ROWS, q, num_programs * WINDOW_PARTS * WINDOW_ROWS):
            numbers = first + tl.arange(0, WINDOW_ROWS)
            seen = tl.minimum(start + numbers + 1, WINDOW)
            length = tl.where(numbers < kept, seen - tl.minimum(numbers + 1, max_new), 0)
            oldest = start + numbers + 1 - seen
            index = tl.arange(0, WINDOW_TILE)[None, :]
            positions = oldest[:, None] + index
            valid = index < length[:, None]
            if IS_PAGED:
                cells = load_cells(table, positions // BLOCK_SIZE, valid)
                pool_rows = cells * BLOCK_SIZE + positions % BLOCK_SIZE
            else:
                ring: tl.constexpr = WINDOW + DRAFTS
                pool_rows = slot * ring + positions % ring
            targets = win_idx_ptr + (before + numbers)[:, None] * WINDOW + index
            exists = (numbers < q)[:, None]
            if WINDOW_TILE != WINDOW:
                exists = exists & (index < WINDOW)
            tl.store(targets, tl.where(valid, pool_rows, -1), mask=exists)
    elif hca_idx_ptr is not None:
        # HCA lists: tiles of entries, each loaded once for HCA_GROUP tokens; a row with an empty
        # list needs no offset
        listed = hca_before(lengths, rollback_ptr, tl.where(kept > 0, row, 0), HCA_RATIO, ROW_TILE)
        per_block: tl.constexpr = BLOCK_SIZE // HCA_RATIO
        longest = tl.where(kept > 0, (start + kept) // HCA_RATIO, 0)
        num_tiles = tl.cdiv(longest, HCA_TILE)
        first_item = part - TOKEN_PARTS - WINDOW_PARTS
        for item in range(first_item, num_tiles * tl.cdiv(kept, HCA_GROUP), HCA_PARTS):
            group = item // num_tiles
            entries = (item - group * num_tiles) * HCA_TILE + tl.arange(0, HCA_TILE)
            blocks = load_cells(table, entries // per_block, entries < longest)
            entry_rows = comp_base + blocks * per_block + entries % per_block
            last = tl.minimum(group * HCA_GROUP + HCA_GROUP, kept)
            for number in range(group * HCA_GROUP, last):
                position = start + number
                at = listed + sum_quotients(position, HCA_RATIO) - sum_quotients(start, HCA_RATIO)
                is_listed = entries < (position + 1) // HCA_RATIO
                tl.store(hca_idx_ptr + at + entries, entry_rows, mask=is_listed)

    # in this launch no program reads these cells of the table
    num_parts: tl.constexpr = TOKEN_PARTS + WINDOW_PARTS + HCA_PARTS
    for first in range(part * RUN_TILE, run_end - run_start, num_parts * RUN_TILE):
        columns = first_changed + first + tl.arange(0, RUN_TILE)
        new = tl.load(values + columns, mask=columns < end_changed, other=0)
        tl.store(table_ptr + columns, new, mask=columns < end_changed)


@step_kernel(unaligned=("local_topk_ptr",))
def csa_rows_kernel(
    local_topk_ptr,
    csa_rows_ptr,
    req_of_token_ptr,
    csa_visible_ptr,
    csa_indptr_ptr,
    block_table_ptr,
    num_given,
    row_stride,
    comp_base,
    TOPK: tl.constexpr,
    ENTRIES_PER_BLOCK: tl.constexpr,
    TILE: tl.constexpr,
):
    """Write the rows of the selected CSA entries, flat by `csa_indptr`, -1 if invalid.

    Grid: (tokens,). Tokens from `num_given` on have an empty selection.
    """
    token = tl.program_id(0)
    first = tl.load(csa_indptr_ptr + token)
    count = tl.load(csa_indptr_ptr + token + 1) - first
    visible = tl.load(csa_visible_ptr + token)
    table = block_table_ptr + tl.maximum(tl.load(req_of_token_ptr + token), 0) * row_stride
    num_chosen = tl.where(token < num_given, count, 0)
    for at in range(0, count, TILE):
        columns = at + tl.arange(0, TILE)
        chosen = local_topk_ptr + token * TOPK + columns
        entries = tl.load(chosen, mask=columns < num_chosen, other=-1)
        seen = (entries >= 0) & (entries < visible)
        blocks = tl.load(table + entries // ENTRIES_PER_BLOCK, mask=seen, other=0)
        rows = comp_base + blocks * ENTRIES_PER_BLOCK + entries % ENTRIES_PER_BLOCK
        tl.store(csa_rows_ptr + first + columns, tl.where(seen, rows, -1), mask=columns < count)
