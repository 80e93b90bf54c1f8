"""The last launch of sampling: the cut of top-k and top-p in each row, and one draw.

One program finds the cut among the listed tokens, two bits of the ordered image at a time. All
sums are of integers, so no order of threads can show.
"""

from __future__ import annotations

from fd_dsa.ops.sampling.bracket_kernels import bracket, cuts_of
from fd_dsa.ops.sampling.values import (
    FLAGS,
    IS_DRAWN,
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
    value_of,
    weights_of,
)
from fd_dsa.ops.step_kernel import step_kernel

import triton  # isort: skip
import triton.language as tl  # isort: skip

# tokens of each block that are looked at together
_LANES = tl.constexpr(64)
_MAX_IMAGE = tl.constexpr(0x7FFFFFFF)


@triton.jit
def _share(top_p, mass):
    """Least mass of a nucleus: at least 1, and never more than all."""
    exact = mass.to(tl.float64) * top_p
    need = exact.to(tl.int64)
    need += (need.to(tl.float64) < exact).to(tl.int64)
    return tl.minimum(tl.maximum(need, 1), mass)


@triton.jit
def _candidates(list_ptr, lengths, start, BLOCK: tl.constexpr, BLOCKS: tl.constexpr):
    """[BLOCKS, _LANES] values that each block lists from `start` on; -inf after its last one."""
    lane = start + tl.arange(0, _LANES)[None, :]
    place = tl.arange(0, BLOCKS)[:, None] * BLOCK + lane
    return tl.load(list_ptr + place, mask=lane < lengths[:, None], other=float("-inf"))


@triton.jit
def _bound(image):
    """Value of an int64 image; above all values where it is none."""
    return value_of(tl.minimum(image, _MAX_IMAGE).to(tl.int32))


@triton.jit
def _cut(list_ptr, lengths, low, high, largest, scale, need, BY_MASS: tl.constexpr,
         BLOCK: tl.constexpr, BLOCKS: tl.constexpr):  # fmt: skip
    """Largest value which candidates of so much mass or so many reach, and how much is above.

    `need` is at least 1 and at most what all candidates have.
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
    """Mass that a cut leaves of the candidates of each block, and how many ties: the first ones."""
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
    """The first token whose running sum of kept weights is above uniform times their sum."""
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
    slots_ptr,
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
    """Row `program 0`: the cut of top-k, then that of top-p among what it leaves, then the draw."""
    row = tl.program_id(0).to(tl.int64)
    state = state_ptr + row * STATE
    if tl.load(state + IS_DRAWN) != 0:
        slot = tl.load(slots_ptr + row).to(tl.int64)
        record = records_ptr + slot * RECORD
        scale, top_p = float64_at(record + SCALE), float64_at(record + TOP_P)
        largest = value_of(tl.load(state + MAXIMUM))
        source = row_of(logits_ptr, adjusted_ptr, state, row, VOCAB)
        block = tl.arange(0, BLOCKS)
        place = row * NUM_BLOCKS + block
        sums = sums_ptr + row * NUM_BLOCKS + place
        above = tl.load(sums, mask=block < NUM_BLOCKS, other=0)
        masses = above
        # without a cut all that reach the floor are above it, or ties
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
        finish_row(tokens_ptr, counts_ptr, row, slot, flags, token, VOCAB, COUNTS)
