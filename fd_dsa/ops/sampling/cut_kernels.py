"""The last three launches of sampling: the cuts of top-k and top-p in each row, and the sample.

Masses and counts above a few thresholds bracket the cuts, and tokens in the bracket are listed.
These masses are approximate, so the bracket is a little wider than they say. One program then finds
the cuts among the listed tokens, two bits of the ordered image at a time. Sums that decide a sample
are sums of integers, so no order of threads can show.
"""

from __future__ import annotations

from fd_dsa.ops.device_functions import value_of
from fd_dsa.ops.sampling.scan_kernels import (
    FLAGS,
    IS_RANDOM,
    LEVELS,
    MAXIMUM,
    RECORD,
    SCALE,
    STATE,
    TOP_K,
    TOP_P,
    finish_row,
    float64_at,
    row_of,
    uniform_of,
    weights_of,
)
from fd_dsa.ops.step_kernel import step_kernel

import triton  # isort: skip
import triton.language as tl  # isort: skip

# bound of the error of a sum of float32 exponentials
_ERROR = tl.constexpr(2.0**-12)
# tokens of each block that the program loads together
_LANES = tl.constexpr(64)
_MAX_IMAGE = tl.constexpr(0x7FFFFFFF)


@triton.jit
def cuts_of(record, VOCAB: tl.constexpr):
    """Return two flags: top-k of a batch row may cut tokens, and top-p may."""
    top_k = tl.load(record + TOP_K)
    return (top_k > 0) & (top_k < VOCAB), float64_at(record + TOP_P) < 1


@triton.jit
def _at(numbers, level):
    """Return the number of one level, 0 for the level -1."""
    return tl.sum(tl.where(tl.arange(0, LEVELS) == level, numbers, 0), axis=0)


@triton.jit
def _totals(partial_ptr, row, NUM_BLOCKS: tl.constexpr, BLOCKS: tl.constexpr):
    """Return the sum over the blocks of a row for each level."""
    level, block = tl.arange(0, LEVELS)[:, None], tl.arange(0, BLOCKS)[None, :]
    place = partial_ptr + (row * LEVELS + level) * NUM_BLOCKS + block
    return tl.sum(tl.load(place, mask=(block < NUM_BLOCKS) & (level >= 0), other=0), axis=1)


@triton.jit
def bracket(masses_ptr, sizes_ptr, state, record, row, VOCAB: tl.constexpr,
            NUM_BLOCKS: tl.constexpr, BLOCKS: tl.constexpr):  # fmt: skip
    """Return the bracket of the cuts of a row that may have cuts.

    The cut of top-p depends on the mass of the top-k tokens, which is known only between two
    levels.

    Returns:
        has_k: True if there is a cut of top-k.
        low, high: tokens in the bracket have images from `low` on and below `high`; both are the
            floor without a cut.
        num_above: number of the top-k tokens above the bracket.
    """
    may_have_k, has_p = cuts_of(record, VOCAB)
    top_k, top_p = tl.load(record + TOP_K), float64_at(record + TOP_P)
    # masses are 0 without top-p, and sizes without top-k
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
    batch_rows_ptr,
    records_ptr,
    state_ptr,
    masses_ptr,
    sizes_ptr,
    VOCAB: tl.constexpr,
    BLOCK: tl.constexpr,
    NUM_BLOCKS: tl.constexpr,
    PART: tl.constexpr,
):
    """Sum approximate mass and number of the tokens above each threshold in block `program 1`."""
    row = tl.program_id(0).to(tl.int64)
    state = state_ptr + row * STATE
    if tl.load(state + IS_RANDOM) != 0:
        record = records_ptr + tl.load(batch_rows_ptr + row).to(tl.int64) * RECORD
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
    batch_rows_ptr,
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
    """Sum masses in block `program 1` of a row, and list its tokens in the bracket.

    The first mass is that of the tokens above the bracket, the second that of all tokens above the
    floor. Without a cut they are equal.
    """
    row = tl.program_id(0).to(tl.int64)
    state = state_ptr + row * STATE
    if tl.load(state + IS_RANDOM) != 0:
        record = records_ptr + tl.load(batch_rows_ptr + row).to(tl.int64) * RECORD
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


@triton.jit
def _share(top_p, mass):
    """Return the minimum mass of a nucleus, from 1 to `mass`."""
    exact = mass.to(tl.float64) * top_p
    need = exact.to(tl.int64)
    need += (need.to(tl.float64) < exact).to(tl.int64)
    return tl.minimum(tl.maximum(need, 1), mass)


@triton.jit
def _candidates(list_ptr, lengths, start, BLOCK: tl.constexpr, BLOCKS: tl.constexpr):
    """Load listed values of each block from `start` on: [BLOCKS, _LANES], -inf past its list."""
    lane = start + tl.arange(0, _LANES)[None, :]
    place = tl.arange(0, BLOCKS)[:, None] * BLOCK + lane
    return tl.load(list_ptr + place, mask=lane < lengths[:, None], other=float("-inf"))


@triton.jit
def _bound(image):
    """Return the value of an int64 image, NaN if the image is beyond all values."""
    return value_of(tl.minimum(image, _MAX_IMAGE).to(tl.int32))


@triton.jit
def _cut(list_ptr, lengths, low, high, largest, scale, need, BY_MASS: tl.constexpr,
         BLOCK: tl.constexpr, BLOCKS: tl.constexpr):  # fmt: skip
    """Find the largest threshold that candidates with at least `need` mass or count reach.

    Args:
        need: mass if BY_MASS, else number; from 1 to that of all candidates.

    Returns:
        Value of the threshold, and the mass or number of the candidates above it.
    """
    base = low.to(tl.int64)
    span = high - base
    above = tl.full([], 0, tl.int64)
    for i in range(16):
        step = tl.full([], 1, tl.int64) << (30 - 2 * i)
        if step < span:
            first = tl.zeros([BLOCKS, _LANES], tl.int64)
            second, third = first, first
            for start in range(0, tl.max(lengths, axis=0), _LANES):
                values = _candidates(list_ptr, lengths, start, BLOCK, BLOCKS)
                weights = tl.full([BLOCKS, _LANES], 1, tl.int64)
                if BY_MASS:
                    weights = weights_of(values, largest, scale)
                first += tl.where(values >= _bound(base + step), weights, 0)
                second += tl.where(values >= _bound(base + 2 * step), weights, 0)
                third += tl.where(values >= _bound(base + 3 * step), weights, 0)
            one, two, three = tl.sum(first), tl.sum(second), tl.sum(third)
            above = tl.where(three < need, three, above)
            above = tl.where(two < need, two, above)
            above = tl.where(one < need, one, above)
            base += tl.where(one >= need, step, 0)
            base += tl.where(two >= need, step, 0)
            base += tl.where(three >= need, step, 0)
    return _bound(base), above


@triton.jit
def _kept(list_ptr, lengths, largest, scale, cut, num_ties, BLOCK: tl.constexpr,
          BLOCKS: tl.constexpr):  # fmt: skip
    """Return mass and number of ties that a cut keeps in each block. The first ties are kept."""
    masses = tl.zeros([BLOCKS, _LANES], tl.int64)
    ties = tl.zeros([BLOCKS, _LANES], tl.int32)
    for start in range(0, tl.max(lengths, axis=0), _LANES):
        values = _candidates(list_ptr, lengths, start, BLOCK, BLOCKS)
        masses += tl.where(values > cut, weights_of(values, largest, scale), 0)
        ties += (values == cut).to(tl.int32)
    found = tl.sum(ties, axis=1)
    before = tl.cumsum(found, axis=0) - found
    kept = tl.minimum(tl.maximum(num_ties - before, 0), found)
    return tl.sum(masses, axis=1) + kept * weights_of(cut, largest, scale), kept


@triton.jit
def _find(
    row_ptr, masses, uniform, cut, num_ties, largest, scale, VOCAB: tl.constexpr,
    BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Return the first token whose running sum of kept weights exceeds uniform times their sum."""
    total = tl.sum(masses, axis=0)
    target = tl.minimum((uniform * total.to(tl.float64)).to(tl.int64), total - 1)
    passed = tl.cumsum(masses, axis=0) <= target
    block = tl.sum(passed.to(tl.int32), axis=0)
    target -= tl.sum(tl.where(passed, masses, 0), axis=0)
    num_ties = tl.sum(tl.where(tl.arange(0, BLOCKS) == block, num_ties, 0), axis=0)
    token = block * BLOCK + tl.arange(0, BLOCK)
    values = tl.load(row_ptr + token, mask=token < VOCAB, other=float("-inf"))
    tie = values == cut
    kept = (values > cut) | (tie & (tl.cumsum(tie.to(tl.int32), axis=0) <= num_ties))
    weights = tl.where(kept, weights_of(values, largest, scale), 0)
    return block * BLOCK + tl.sum((tl.cumsum(weights, axis=0) <= target).to(tl.int32), axis=0)


@step_kernel()
def draw_kernel(
    logits_ptr,
    adjusted_ptr,
    batch_rows_ptr,
    positions_ptr,
    records_ptr,
    counts_ptr,
    state_ptr,
    masses_ptr,
    sizes_ptr,
    sums_ptr,
    lengths_ptr,
    list_ptr,
    tokens_ptr,
    VOCAB: tl.constexpr,
    BLOCK: tl.constexpr,
    NUM_BLOCKS: tl.constexpr,
    BLOCKS: tl.constexpr,
    COUNTS: tl.constexpr,
):
    """Cut row `program 0` by top-k, then its kept tokens by top-p, and sample a token."""
    row = tl.program_id(0).to(tl.int64)
    state = state_ptr + row * STATE
    if tl.load(state + IS_RANDOM) != 0:
        batch_row = tl.load(batch_rows_ptr + row).to(tl.int64)
        record = records_ptr + batch_row * RECORD
        scale, top_p = float64_at(record + SCALE), float64_at(record + TOP_P)
        largest = value_of(tl.load(state + MAXIMUM))
        source = row_of(logits_ptr, adjusted_ptr, state, row, VOCAB)
        block = tl.arange(0, BLOCKS)
        place = row * NUM_BLOCKS + block
        sums = sums_ptr + row * NUM_BLOCKS + place
        above = tl.load(sums, mask=block < NUM_BLOCKS, other=0)
        masses = above
        # without a cut all tokens that reach the floor are kept, as above the cut or as ties
        cut, num_ties = value_of(tl.load(state + LEVELS - 1)), tl.full([BLOCKS], BLOCK, tl.int32)
        may_have_k, has_p = cuts_of(record, VOCAB)
        if may_have_k | has_p:
            has_k, low, high, num_above = bracket(
                masses_ptr, sizes_ptr, state, record, row, VOCAB, NUM_BLOCKS, BLOCKS
            )
            total = tl.sum(tl.load(sums + NUM_BLOCKS, mask=block < NUM_BLOCKS, other=0), axis=0)
            lengths = tl.load(lengths_ptr + place, mask=block < NUM_BLOCKS, other=0)
            listed = list_ptr + row * NUM_BLOCKS * BLOCK
            if has_k:
                need = (tl.load(record + TOP_K) - num_above).to(tl.int64)
                cut, more = _cut(
                    listed, lengths, low, high, largest, scale, need, False, BLOCK, BLOCKS
                )  # fmt: skip
                num = (need - more).to(tl.int32)
                masses, num_ties = _kept(listed, lengths, largest, scale, cut, num, BLOCK, BLOCKS)
                masses += above
                total = tl.sum(masses, axis=0)
            if has_p:
                need = _share(top_p, total) - tl.sum(above, axis=0)
                cut, more = _cut(
                    listed, lengths, low, high, largest, scale, need, True, BLOCK, BLOCKS
                )  # fmt: skip
                weight = weights_of(cut, largest, scale)
                num = ((need - more + weight - 1) // weight).to(tl.int32)
                masses, num_ties = _kept(listed, lengths, largest, scale, cut, num, BLOCK, BLOCKS)
                masses += above
        uniform = uniform_of(record, tl.load(positions_ptr + row))
        token = _find(
            source, masses, uniform, cut, num_ties, largest, scale, VOCAB, BLOCK, BLOCKS
        )  # fmt: skip
        flags = tl.load(record + FLAGS)
        finish_row(tokens_ptr, counts_ptr, row, batch_row, flags, token, VOCAB, COUNTS)
