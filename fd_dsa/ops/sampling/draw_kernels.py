"""The last launch of sampling: the cut of top-k and top-p in each row, and one draw.

One program finds the cut among the listed tokens, four bits of the ordered image at a time. All
sums are of integers, so no order of threads can show.
"""

from __future__ import annotations

from fd_dsa.ops._triton import step_kernel
from fd_dsa.ops.sampling.bracket_kernels import (
    narrow_bracket,
    needs_cut,
    of_blocks,
    of_row,
    share,
)
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
    image_of,
    row_of,
    uniform_of,
    value_of,
    weights_of,
)

import triton  # isort: skip
import triton.language as tl  # isort: skip

_CHUNK = tl.constexpr(1024)
# where each candidate is compared with every block
_SMALL_CHUNK = tl.constexpr(256)
_DIGITS = tl.constexpr(16)
_MAX_IMAGE = tl.constexpr(0x7FFFFFFF)


@triton.jit
def _chunk(images_ptr, row_ptr, start, num, low, high, is_listed, CHUNK: tl.constexpr):
    """Images of the next candidates; of what is none, a number below all images."""
    place = start + tl.arange(0, CHUNK)
    # ends of the list and of the row: a mask of a scalar and a block is none to some interpreters
    list_end, row_end = tl.where(is_listed, num, 0), tl.where(is_listed, 0, num)
    listed = tl.load(images_ptr + place, mask=place < list_end, other=0)
    values = tl.load(row_ptr + place, mask=place < row_end, other=0.0)
    image = tl.where(is_listed, listed, image_of(values))
    return tl.where((place < num) & (image >= low) & (image < high), image, -0x80000000)


@triton.jit
def _cut(
    images_ptr, row_ptr, num, low, high, is_listed, largest, scale, need, BY_MASS: tl.constexpr
):
    """Largest image which tokens of so much mass or so many tokens reach, and how much is above.

    `need` is at least 1 and at most what all candidates have.
    """
    digit = tl.arange(0, _DIGITS)
    base = low.to(tl.int64)
    span = high.to(tl.int64) - base
    above = tl.full([], 0, tl.int64)
    for i in range(8):
        shift = 28 - 4 * i
        if (span >> shift) > 0:
            steps = base + (digit.to(tl.int64) << shift)
            bounds = tl.minimum(steps, _MAX_IMAGE).to(tl.int32)
            reached = tl.zeros([_DIGITS], tl.int64)
            for start in range(0, num, _CHUNK):
                image = _chunk(images_ptr, row_ptr, start, num, low, high, is_listed, _CHUNK)
                weights = tl.full([_CHUNK], 1, tl.int64)
                if BY_MASS:
                    weights = weights_of(value_of(tl.maximum(image, low)), largest, scale)
                hit = image[:, None] >= bounds[None, :]
                reached += tl.sum(tl.where(hit, weights[:, None], 0), axis=0)
            kept = tl.sum((reached >= need).to(tl.int32), axis=0) - 1
            following = tl.sum(tl.where(digit == kept + 1, reached, 0), axis=0)
            above = tl.where(kept < _DIGITS - 1, following, above)
            base += kept.to(tl.int64) << shift
    return base.to(tl.int32), above


@triton.jit
def _mass_above(images_ptr, row_ptr, num, low, high, is_listed, largest, scale, cut):
    """Mass of the candidates above a cut."""
    mass = tl.full([], 0, tl.int64)
    for start in range(0, num, _CHUNK):
        image = _chunk(images_ptr, row_ptr, start, num, low, high, is_listed, _CHUNK)
        weights = weights_of(value_of(tl.maximum(image, low)), largest, scale)
        mass += tl.sum(tl.where(image > cut, weights, 0), axis=0)
    return mass


@triton.jit
def _kept_of_blocks(
    images_ptr,
    ids_ptr,
    row_ptr,
    num,
    low,
    high,
    is_listed,
    largest,
    scale,
    cut,
    num_ties,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """Mass that a cut leaves of the candidates in each block, and the last kept tie's token."""
    block = tl.arange(0, BLOCKS)
    masses = tl.zeros([BLOCKS], tl.int64)
    ties_before = tl.full([], 0, tl.int64)
    last_tie = tl.full([], -1, tl.int32)
    for start in range(0, num, _SMALL_CHUNK):
        image = _chunk(images_ptr, row_ptr, start, num, low, high, is_listed, _SMALL_CHUNK)
        place = start + tl.arange(0, _SMALL_CHUNK)
        token = tl.load(ids_ptr + place, mask=place < tl.where(is_listed, num, 0), other=0)
        token = tl.where(is_listed, token, place)
        tie = (image == cut).to(tl.int32)
        is_kept_tie = (tie != 0) & (ties_before + tl.cumsum(tie, axis=0) <= num_ties)
        last_tie = tl.maximum(last_tie, tl.max(tl.where(is_kept_tie, token, -1), axis=0))
        ties_before += tl.sum(tie, axis=0)
        weights = weights_of(value_of(tl.maximum(image, low)), largest, scale)
        kept = tl.where((image > cut) | is_kept_tie, weights, 0)
        own = (token // BLOCK)[:, None] == block[None, :]
        masses += tl.sum(tl.where(own, kept[:, None], 0), axis=0)
    return masses, last_tie


@triton.jit
def _find(
    row_ptr, masses, uniform, cut, last_tie, largest, scale, VOCAB: tl.constexpr,
    BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """The first token whose running sum of kept weights is above uniform times their sum."""
    total = tl.sum(masses, axis=0)
    target = tl.minimum((uniform * total.to(tl.float64)).to(tl.int64), total - 1)
    passed = tl.cumsum(masses, axis=0) <= target
    begin = tl.sum(passed.to(tl.int32), axis=0) * BLOCK
    target -= tl.sum(tl.where(passed, masses, 0), axis=0)
    token = begin + tl.arange(0, BLOCK)
    values = tl.load(row_ptr + token, mask=token < VOCAB, other=float("-inf"))
    image = image_of(values)
    kept = (image > cut) | ((image == cut) & (token <= last_tie))
    weights = tl.where(kept, weights_of(values, largest, scale), 0)
    return begin + tl.sum((tl.cumsum(weights, axis=0) <= target).to(tl.int32), axis=0)


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
    images_ptr,
    ids_ptr,
    tokens_ptr,
    VOCAB: tl.constexpr,
    BLOCK: tl.constexpr,
    NUM_BLOCKS: tl.constexpr,
    BLOCKS: tl.constexpr,
    COUNTS: tl.constexpr,
    WIDE: tl.constexpr,
    CAPACITY: tl.constexpr,
):
    """Row `program 0`: the cut of top-k, then that of top-p among what it leaves, then the draw."""
    row = tl.program_id(0).to(tl.int64)
    state = state_ptr + row * STATE
    if tl.load(state + IS_DRAWN) != 0:
        slot = tl.load(slots_ptr + row).to(tl.int64)
        record = records_ptr + slot * RECORD
        scale, top_p = float64_at(record + SCALE), float64_at(record + TOP_P)
        top_k = tl.load(record + TOP_K)
        largest = value_of(tl.load(state + MAXIMUM))
        source = row_of(logits_ptr, adjusted_ptr, state, row, VOCAB)
        kept = of_blocks(masses_ptr, 2 * row, LEVELS - 1, NUM_BLOCKS, BLOCKS)
        total = tl.sum(kept, axis=0)
        cut = tl.load(state + LEVELS - 1) - 1
        last_tie = tl.full([], -1, tl.int32)
        if needs_cut(record, VOCAB):
            has_k, table, first, last, low, high = narrow_bracket(
                masses_ptr, sizes_ptr, state, record, row, NUM_BLOCKS, BLOCKS, WIDE
            )
            if has_k | (top_p < 1):
                mass_above = of_row(masses_ptr, table, first - 1, NUM_BLOCKS, BLOCKS)
                size_above = of_row(sizes_ptr, table, first - 1, NUM_BLOCKS, BLOCKS)
                num = of_row(sizes_ptr, table, last, NUM_BLOCKS, BLOCKS) - size_above
                is_listed = num <= CAPACITY
                num = tl.where(is_listed, num, VOCAB)
                images, ids = images_ptr + row * CAPACITY, ids_ptr + row * CAPACITY
                num_ties = tl.full([], 0, tl.int64)
                if has_k:
                    need = (top_k - size_above).to(tl.int64)
                    cut, above = _cut(
                        images, source, num, low, high, is_listed, largest, scale, need, False
                    )
                    num_ties = need - above
                    total = mass_above + num_ties * weights_of(value_of(cut), largest, scale)
                    total += _mass_above(
                        images, source, num, low, high, is_listed, largest, scale, cut
                    )
                if top_p < 1:
                    need = share(top_p, total) - mass_above
                    cut, above = _cut(
                        images, source, num, low, high, is_listed, largest, scale, need, True
                    )
                    weight = weights_of(value_of(cut), largest, scale)
                    num_ties = (need - above + weight - 1) // weight
                kept, last_tie = _kept_of_blocks(
                    images, ids, source, num, low, high, is_listed, largest, scale, cut, num_ties,
                    BLOCK, BLOCKS,
                )  # fmt: skip
                kept += of_blocks(masses_ptr, table, first - 1, NUM_BLOCKS, BLOCKS)
        uniform = uniform_of(record, tl.load(positions_ptr + row))
        token = _find(
            source, kept, uniform, cut, last_tie, largest, scale, VOCAB, BLOCK, BLOCKS
        )  # fmt: skip
        flags = tl.load(record + FLAGS)
        finish_row(tokens_ptr, counts_ptr, row, slot, flags, token, VOCAB, COUNTS)
