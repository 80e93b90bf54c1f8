"""Between which thresholds the cut of top-k and top-p is, and the list of the tokens there.

Masses and counts above a few thresholds show it; where many tokens are between two of them,
thresholds among those are tried. The tokens that are left are listed in the order of ids. All sums
are of integers, so no order of threads can show.
"""

from __future__ import annotations

from fd_dsa.ops._triton import step_kernel
from fd_dsa.ops.sampling.values import (
    FINER,
    IS_DRAWN,
    LEVELS,
    MAXIMUM,
    RECORD,
    SAMPLE,
    SCALE,
    STATE,
    TOP_K,
    TOP_P,
    float64_at,
    image_of,
    rank_of,
    row_of,
    value_of,
    weights_of,
)

import triton  # isort: skip
import triton.language as tl  # isort: skip


@triton.jit
def needs_cut(record, VOCAB: tl.constexpr):
    """Whether top-k or top-p of a slot may leave tokens out."""
    top_k = tl.load(record + TOP_K)
    return ((top_k > 0) & (top_k < VOCAB)) | (float64_at(record + TOP_P) < 1)


@triton.jit
def share(top_p, mass):
    """Least mass of a nucleus: at least 1, and never more than all."""
    exact = mass.to(tl.float64) * top_p
    need = exact.to(tl.int64)
    need += (need.to(tl.float64) < exact).to(tl.int64)
    return tl.minimum(tl.maximum(need, 1), mass)


@triton.jit
def _at(numbers, level):
    """One of the numbers of all levels; 0 above the first."""
    return tl.sum(tl.where(tl.arange(0, LEVELS) == level, numbers, 0), axis=0)


@triton.jit
def _totals(partial_ptr, table, NUM_BLOCKS: tl.constexpr, BLOCKS: tl.constexpr):
    """Sums over the blocks of a table, one for each level."""
    level, block = tl.arange(0, LEVELS)[:, None], tl.arange(0, BLOCKS)[None, :]
    place = partial_ptr + (table * LEVELS + level) * NUM_BLOCKS + block
    inside = (block < NUM_BLOCKS) & (level >= 0)
    return tl.sum(tl.load(place, mask=inside, other=0), axis=1)


@triton.jit
def of_blocks(partial_ptr, table, level, NUM_BLOCKS: tl.constexpr, BLOCKS: tl.constexpr):
    """[BLOCKS] numbers of a level; 0 above the first."""
    block = tl.arange(0, BLOCKS)
    place = partial_ptr + (table * LEVELS + level) * NUM_BLOCKS + block
    return tl.load(place, mask=block < tl.where(level >= 0, NUM_BLOCKS, 0), other=0)


@triton.jit
def of_row(partial_ptr, table, level, NUM_BLOCKS: tl.constexpr, BLOCKS: tl.constexpr):
    """Sum of the numbers of a level."""
    return tl.sum(of_blocks(partial_ptr, table, level, NUM_BLOCKS, BLOCKS), axis=0)


@triton.jit
def _bracket(masses, sizes, record, total, num):
    """Levels of the cuts: what is looked at reaches level `last`, but not level `first - 1`.

    What top-p keeps of the top-k depends on their mass, which is only known between two levels.
    """
    top_k, top_p = tl.load(record + TOP_K), float64_at(record + TOP_P)
    has_k = (top_k > 0) & (top_k < num)
    last = tl.sum((sizes < top_k).to(tl.int32), axis=0)
    known = tl.where(has_k, _at(masses, last - 1), total)
    reached = tl.sum((masses < tl.maximum(share(top_p, known), 1)).to(tl.int32), axis=0)
    first = tl.where(top_p < 1, reached, last)
    last = tl.where(has_k, last, first)
    return has_k, first, last


@triton.jit
def _is_wide(masses_ptr, sizes_ptr, record, row, NUM_BLOCKS: tl.constexpr, BLOCKS: tl.constexpr,
             WIDE: tl.constexpr):  # fmt: skip
    """Whether more than WIDE tokens are in the bracket of the first thresholds, and its levels."""
    masses = _totals(masses_ptr, 2 * row, NUM_BLOCKS, BLOCKS)
    sizes = _totals(sizes_ptr, 2 * row, NUM_BLOCKS, BLOCKS)
    total, num = _at(masses, LEVELS - 1), _at(sizes, LEVELS - 1)
    has_k, first, last = _bracket(masses, sizes, record, total, num)
    is_wide = _at(sizes, last) - _at(sizes, first - 1) > WIDE
    return has_k, first, last, is_wide, total, num


@triton.jit
def _between(state, first, last):
    """Images of the tokens of a bracket of the first thresholds: from `low`, below `high`."""
    low = tl.load(state + last)
    high = tl.load(state + tl.maximum(first - 1, 0))
    return low, tl.where(first > 0, high, tl.load(state + MAXIMUM) + 1)


@triton.jit
def narrow_bracket(masses_ptr, sizes_ptr, state, record, row, NUM_BLOCKS: tl.constexpr,
                   BLOCKS: tl.constexpr, WIDE: tl.constexpr):  # fmt: skip
    """Bracket of the finest thresholds that were tried.

    Returns:
        Whether there is a cut of top-k; the table of masses and sizes; the levels, as of
        `_bracket`; the images, as of `_between`.
    """
    has_k, first, last, is_wide, total, num = _is_wide(
        masses_ptr, sizes_ptr, record, row, NUM_BLOCKS, BLOCKS, WIDE
    )
    table = 2 * row
    low, high = _between(state, first, last)
    if is_wide:
        table += 1
        masses = _totals(masses_ptr, table, NUM_BLOCKS, BLOCKS)
        sizes = _totals(sizes_ptr, table, NUM_BLOCKS, BLOCKS)
        has_k, first, last = _bracket(masses, sizes, record, total, num)
        # nothing that is looked at reaches level 0, of which less may be known here: the first
        # thresholds can be nearer to the cut of top-k than these
        first = tl.maximum(first, 1)
        low, high = tl.load(state + FINER + last), tl.load(state + FINER + first - 1)
    return has_k, table, first, last, low, high


@triton.jit
def _finer(state, sample, first, last):
    """int32 [LEVELS], falling: thresholds from one end of a bracket to the other."""
    low, high = _between(state, first, last)
    begin = tl.where(first > 0, rank_of(first - 1), 0)
    level = tl.arange(0, LEVELS)
    rank = begin + (rank_of(last) - begin) * level // (LEVELS - 1)
    inner = tl.load(sample + tl.minimum(rank, SAMPLE - 1))
    inner = tl.minimum(tl.maximum(inner, low), high)
    return tl.where(level == 0, high, tl.where(level == LEVELS - 1, low, inner))


@step_kernel()
def masses_kernel(
    logits_ptr,
    adjusted_ptr,
    slots_ptr,
    records_ptr,
    state_ptr,
    sample_ptr,
    masses_ptr,
    sizes_ptr,
    VOCAB: tl.constexpr,
    BLOCK: tl.constexpr,
    NUM_BLOCKS: tl.constexpr,
    BLOCKS: tl.constexpr,
    WIDE: tl.constexpr,
    FINE: tl.constexpr,
):
    """Mass and number of tokens that reach each threshold in block `program 1` of a row.

    Of rows without a cut only those that reach the floor, the last one. FINE: thresholds inside
    the bracket of the first ones, where it is wide.
    """
    row = tl.program_id(0).to(tl.int64)
    state = state_ptr + row * STATE
    is_needed = tl.load(state + IS_DRAWN) != 0
    if is_needed:
        record = records_ptr + tl.load(slots_ptr + row).to(tl.int64) * RECORD
        may_cut = needs_cut(record, VOCAB)
        thresholds, table = state, 2 * row
        if FINE:
            is_needed = may_cut
            if may_cut:
                has_k, first, last, is_wide, _, _ = _is_wide(
                    masses_ptr, sizes_ptr, record, row, NUM_BLOCKS, BLOCKS, WIDE
                )
                is_needed = is_wide & (has_k | (float64_at(record + TOP_P) < 1))
                if is_needed:
                    thresholds, table = state + FINER, table + 1
                    finer = _finer(state, sample_ptr + row * SAMPLE, first, last)
                    # every program of the row stores the same, for itself and for later launches
                    tl.store(thresholds + tl.arange(0, LEVELS), finer)
                    tl.debug_barrier()
        if is_needed:
            source = row_of(logits_ptr, adjusted_ptr, state, row, VOCAB)
            token = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
            values = tl.load(source + token, mask=token < VOCAB, other=float("-inf"))
            largest = value_of(tl.load(state + MAXIMUM))
            weights = weights_of(values, largest, float64_at(record + SCALE))
            image = image_of(values)
            place = table * LEVELS * NUM_BLOCKS + tl.program_id(1)
            lowest = tl.where(may_cut, 0, LEVELS - 1)
            for level in tl.static_range(LEVELS):
                if level >= lowest:
                    hit = image >= tl.load(thresholds + level)
                    mass = tl.sum(tl.where(hit, weights, 0), axis=0)
                    tl.store(masses_ptr + place + level * NUM_BLOCKS, mass)
                    size = tl.sum(hit.to(tl.int32), axis=0)
                    tl.store(sizes_ptr + place + level * NUM_BLOCKS, size)


@step_kernel()
def gather_kernel(
    logits_ptr,
    adjusted_ptr,
    slots_ptr,
    records_ptr,
    state_ptr,
    masses_ptr,
    sizes_ptr,
    images_ptr,
    ids_ptr,
    VOCAB: tl.constexpr,
    BLOCK: tl.constexpr,
    NUM_BLOCKS: tl.constexpr,
    BLOCKS: tl.constexpr,
    WIDE: tl.constexpr,
    CAPACITY: tl.constexpr,
):
    """List the tokens of the bracket in block `program 1` of a row, where they all fit."""
    row = tl.program_id(0).to(tl.int64)
    state = state_ptr + row * STATE
    if tl.load(state + IS_DRAWN) != 0:
        record = records_ptr + tl.load(slots_ptr + row).to(tl.int64) * RECORD
        if needs_cut(record, VOCAB):
            has_k, table, first, last, low, high = narrow_bracket(
                masses_ptr, sizes_ptr, state, record, row, NUM_BLOCKS, BLOCKS, WIDE
            )
            if has_k | (float64_at(record + TOP_P) < 1):
                listed = of_blocks(sizes_ptr, table, last, NUM_BLOCKS, BLOCKS)
                listed -= of_blocks(sizes_ptr, table, first - 1, NUM_BLOCKS, BLOCKS)
                block, own = tl.arange(0, BLOCKS), tl.program_id(1)
                num_own = tl.sum(tl.where(block == own, listed, 0), axis=0)
                if (num_own > 0) & (tl.sum(listed, axis=0) <= CAPACITY):
                    offset = tl.sum(tl.where(block < own, listed, 0), axis=0)
                    source = row_of(logits_ptr, adjusted_ptr, state, row, VOCAB)
                    token = own * BLOCK + tl.arange(0, BLOCK)
                    image = image_of(
                        tl.load(source + token, mask=token < VOCAB, other=float("-inf"))
                    )
                    mine = (image >= low) & (image < high)
                    place = row * CAPACITY + offset + tl.cumsum(mine.to(tl.int32), axis=0) - 1
                    tl.store(images_ptr + place, image, mask=mine)
                    tl.store(ids_ptr + place, token, mask=mine)
