"""Between which thresholds the cut of top-k and top-p is, and the list of the tokens there.

Masses and counts above a few thresholds show it. These masses are only near the exact ones, so the
bracket is a little wider than they say; what is drawn by are sums of integers, so no order of
threads can show.
"""

from __future__ import annotations

from fd_dsa.ops.sampling.values import (
    IS_DRAWN,
    LEVELS,
    MAXIMUM,
    RECORD,
    SCALE,
    STATE,
    TOP_K,
    TOP_P,
    float64_at,
    row_of,
    value_of,
    weights_of,
)
from fd_dsa.ops.step_kernel import step_kernel

import triton  # isort: skip
import triton.language as tl  # isort: skip

# more than the error of a sum of float32 exponentials
_ERROR = tl.constexpr(2.0**-12)


@triton.jit
def cuts_of(record, VOCAB: tl.constexpr):
    """Whether top-k and top-p of a slot may leave tokens out."""
    top_k = tl.load(record + TOP_K)
    return (top_k > 0) & (top_k < VOCAB), float64_at(record + TOP_P) < 1


@triton.jit
def _at(numbers, level):
    """One of the numbers of all levels; 0 above the first."""
    return tl.sum(tl.where(tl.arange(0, LEVELS) == level, numbers, 0), axis=0)


@triton.jit
def _totals(partial_ptr, row, NUM_BLOCKS: tl.constexpr, BLOCKS: tl.constexpr):
    """Sums over the blocks of a row, one for each level."""
    level, block = tl.arange(0, LEVELS)[:, None], tl.arange(0, BLOCKS)[None, :]
    place = partial_ptr + (row * LEVELS + level) * NUM_BLOCKS + block
    return tl.sum(tl.load(place, mask=(block < NUM_BLOCKS) & (level >= 0), other=0), axis=1)


@triton.jit
def bracket(masses_ptr, sizes_ptr, state, record, row, VOCAB: tl.constexpr,
            NUM_BLOCKS: tl.constexpr, BLOCKS: tl.constexpr):  # fmt: skip
    """Where the cuts of a row are that may have some.

    What top-p keeps of the top-k depends on their mass, which is only known between two levels.

    Returns:
        Whether there is a cut of top-k; images of the tokens to look at, from `low`, below `high`,
        both the floor where nothing is cut; how many tokens of the top-k are above these.
    """
    may_have_k, has_p = cuts_of(record, VOCAB)
    top_k, top_p = tl.load(record + TOP_K), float64_at(record + TOP_P)
    # without the cut that they are for, these are 0
    masses = _totals(masses_ptr, row, NUM_BLOCKS, BLOCKS)
    sizes = _totals(sizes_ptr, row, NUM_BLOCKS, BLOCKS)
    has_k = may_have_k & (top_k < _at(sizes, LEVELS - 1))
    last = tl.sum((sizes < top_k).to(tl.int32), axis=0)
    known = _at(masses, tl.where(has_k, last - 1, LEVELS - 1))
    reached = tl.sum((masses < top_p * known * (1 - _ERROR)).to(tl.int32), axis=0)
    first = tl.where(has_p, reached, last)
    reached = tl.sum((masses < top_p * known * (1 + _ERROR)).to(tl.int32), axis=0)
    last = tl.where(has_k, last, tl.minimum(reached, LEVELS - 1))
    thresholds = tl.load(state + tl.arange(0, LEVELS))
    low, floor = _at(thresholds, last), _at(thresholds, LEVELS - 1)
    high = tl.where(first > 0, _at(thresholds, first - 1), tl.load(state + MAXIMUM) + 1)
    is_cut = has_k | has_p
    low, high = tl.where(is_cut, low, floor), tl.where(is_cut, high, floor)
    return has_k, low, high, _at(sizes, first - 1)


@step_kernel()
def masses_kernel(
    logits_ptr,
    adjusted_ptr,
    slots_ptr,
    records_ptr,
    state_ptr,
    masses_ptr,
    sizes_ptr,
    VOCAB: tl.constexpr,
    BLOCK: tl.constexpr,
    NUM_BLOCKS: tl.constexpr,
    PART: tl.constexpr,
):
    """About the mass, and the number, of tokens that reach each threshold in block `program 1`."""
    row = tl.program_id(0).to(tl.int64)
    state = state_ptr + row * STATE
    if tl.load(state + IS_DRAWN) != 0:
        record = records_ptr + tl.load(slots_ptr + row).to(tl.int64) * RECORD
        has_k, has_p = cuts_of(record, VOCAB)
        if has_k | has_p:
            source = row_of(logits_ptr, adjusted_ptr, state, row, VOCAB)
            largest = value_of(tl.load(state + MAXIMUM))
            scale = float64_at(record + SCALE).to(tl.float32)
            level = tl.arange(0, LEVELS)
            masses, sizes = tl.zeros([LEVELS], tl.float32), tl.zeros([LEVELS], tl.float32)
            begin = tl.program_id(1) * BLOCK
            for start in range(begin, begin + BLOCK, PART):
                token = start + tl.arange(0, PART)
                values = tl.load(source + token, mask=token < VOCAB, other=float("-inf"))
                weights = tl.exp2((values - largest) * scale)
                for i in tl.static_range(LEVELS):
                    hit = tl.where(values >= value_of(tl.load(state + i)), 1.0, 0.0)
                    if has_p:
                        masses += tl.where(level == i, tl.sum(hit * weights, axis=0), 0.0)
                    if has_k:
                        sizes += tl.where(level == i, tl.sum(hit, axis=0), 0.0)
            place = (row * LEVELS + level) * NUM_BLOCKS + tl.program_id(1)
            tl.store(masses_ptr + place, masses)
            tl.store(sizes_ptr + place, sizes.to(tl.int32))


@step_kernel()
def gather_kernel(
    logits_ptr,
    adjusted_ptr,
    slots_ptr,
    records_ptr,
    state_ptr,
    masses_ptr,
    sizes_ptr,
    sums_ptr,
    lengths_ptr,
    list_ptr,
    VOCAB: tl.constexpr,
    BLOCK: tl.constexpr,
    NUM_BLOCKS: tl.constexpr,
    BLOCKS: tl.constexpr,
    PART: tl.constexpr,
):
    """Masses of block `program 1` of a row, and the list of its tokens in the bracket.

    The masses are those above the bracket and of all tokens that reach the floor, which are one
    without a cut.
    """
    row = tl.program_id(0).to(tl.int64)
    state = state_ptr + row * STATE
    if tl.load(state + IS_DRAWN) != 0:
        record = records_ptr + tl.load(slots_ptr + row).to(tl.int64) * RECORD
        source = row_of(logits_ptr, adjusted_ptr, state, row, VOCAB)
        block = tl.program_id(1)
        place = row * NUM_BLOCKS + block
        floor = tl.load(state + LEVELS - 1)
        low, high = floor, floor
        has_k, has_p = cuts_of(record, VOCAB)
        if has_k | has_p:
            _, low, high, _ = bracket(
                masses_ptr, sizes_ptr, state, record, row, VOCAB, NUM_BLOCKS, BLOCKS
            )
        low, high, floor = value_of(low), value_of(high), value_of(floor)
        largest, scale = value_of(tl.load(state + MAXIMUM)), float64_at(record + SCALE)
        above, total = tl.zeros([PART], tl.int64), tl.zeros([PART], tl.int64)
        length = tl.full([], 0, tl.int32)
        list = list_ptr + place * BLOCK - 1
        begin = block * BLOCK
        for start in range(begin, begin + BLOCK, PART):
            token = start + tl.arange(0, PART)
            values = tl.load(source + token, mask=token < VOCAB, other=float("-inf"))
            values = tl.where(values >= floor, values, float("-inf"))
            weights = weights_of(values, largest, scale)
            total += weights
            is_above = values >= high
            above += tl.where(is_above, weights, 0)
            if has_k | has_p:
                mine = (values >= low) & (is_above == 0)
                end = length + tl.cumsum(mine.to(tl.int32), axis=0)
                length = tl.max(end, axis=0)
                tl.store(list + end, values, mask=mine)
        sums = sums_ptr + (place + row * NUM_BLOCKS)
        tl.store(sums, tl.sum(above, axis=0))
        tl.store(sums + NUM_BLOCKS, tl.sum(total, axis=0))
        tl.store(lengths_ptr + place, length)
