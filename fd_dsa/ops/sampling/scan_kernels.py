"""The first two launches of sampling: rules and maxima of blocks, then what they decide.

Greedy rows and unusable ones end here. A row that is drawn gets thresholds by which the next
launches divide it: the floor of min-p, and values at some ranks of a sample of it.
"""

from __future__ import annotations

from fd_dsa.ops.sampling import parameters as places
from fd_dsa.ops.sampling.values import (
    FLAGS,
    INFINITY,
    IS_DRAWN,
    IS_RULED,
    LARGEST,
    LEVELS,
    LISTED,
    MARGIN,
    MAXIMUM,
    MINUS_INFINITY,
    NAN,
    NO_TOKEN,
    NOT_FINITE,
    PENALIZED,
    RANDOM,
    RECORD,
    SAMPLE,
    STATE,
    finish_row,
    float64_at,
    image_of,
    joined,
    rank_of,
    value_of,
)
from fd_dsa.ops.step_kernel import step_kernel

import triton  # isort: skip
import triton.language as tl  # isort: skip

_REPETITION, _FREQUENCY, _PRESENCE, _NUM_ENTRIES = map(
    tl.constexpr, (places.REPETITION, places.FREQUENCY, places.PRESENCE, places.NUM_ENTRIES)
)
_HEADER, _ENTRY = tl.constexpr(places.HEADER), tl.constexpr(places.ENTRY)
_IN_PROMPT = tl.constexpr(places.IN_PROMPT)
_ENTRIES = tl.constexpr(256)


@triton.jit
def _narrowed(values):
    """float32 of float64 values; what is too large is float32's largest number, not +inf."""
    inside = tl.minimum(tl.maximum(values, -LARGEST), LARGEST).to(tl.float32)
    return tl.where(values < -LARGEST, float("-inf"), inside)


@triton.jit
def _penalized(values, cells, record):
    """float32 values after repetition, frequency and presence penalty, in float64 as on a CPU."""
    repetition = float64_at(record + _REPETITION)
    count = (cells & (_IN_PROMPT - 1)).to(tl.float64)
    wide = values.to(tl.float64)
    wide = tl.where(wide > 0, wide / repetition, wide * repetition)
    once = tl.where(count > 0, float64_at(record + _PRESENCE), 0.0)
    wide -= float64_at(record + _FREQUENCY) * count + once
    return tl.where(cells != 0, _narrowed(wide), values)


@triton.jit
def _apply_entries(row_ptr, record, position, begin, end):
    """Add biases to the logits of tokens begin to end - 1 in memory, and ban those that are."""
    num_entries = tl.load(record + _NUM_ENTRIES)
    for start in range(0, num_entries, _ENTRIES):
        place = start + tl.arange(0, _ENTRIES)
        entry = record + _HEADER + place * _ENTRY
        token = tl.load(entry, mask=place < num_entries, other=-1)
        mine = (token >= begin) & (token < end)
        until = tl.load(entry + 1, mask=mine, other=0)
        low = tl.load(entry + 2, mask=mine, other=0)
        bias = joined(low, tl.load(entry + 3, mask=mine, other=0)).to(tl.float64, bitcast=True)
        value = tl.load(row_ptr + token, mask=mine, other=0.0).to(tl.float64) + bias
        value = tl.where(position < until, float("-inf"), _narrowed(value))
        tl.store(row_ptr + token, value, mask=mine)


@step_kernel()
def scan_kernel(
    logits_ptr,
    adjusted_ptr,
    slots_ptr,
    positions_ptr,
    masks_ptr,
    mask_rows_ptr,
    records_ptr,
    counts_ptr,
    ids_ptr,
    sampled_ptr,
    best_ptr,
    VOCAB: tl.constexpr,
    BLOCK: tl.constexpr,
    PART: tl.constexpr,
    MOST: tl.constexpr,
):
    """Block `program 1` of row `program 0`: image of its maximum, with rules too, and its token.

    The order of rules: penalties, mask, bias, bans; a mask's -inf stays what it is. Rows of a slot
    in front of this one are up to MOST; the draft after each of them counts as a token.
    """
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + row).to(tl.int64)
    if slot >= 0:
        begin = tl.program_id(1) * BLOCK
        token = begin + tl.arange(0, BLOCK)
        raw = logits_ptr + row * VOCAB + token
        logits = tl.load(raw, mask=token < VOCAB, other=float("-inf"))
        largest = tl.max(logits, axis=0)
        has_nan = tl.max((logits != logits).to(tl.int32), axis=0) != 0
        best = best_ptr + (row * tl.num_programs(1) + tl.program_id(1)) * 3
        tl.store(best, tl.where(has_nan, NAN, image_of(largest)))
        record = records_ptr + slot * RECORD
        flags = tl.load(record + FLAGS)
        mask_row = tl.load(mask_rows_ptr + row).to(tl.int64)
        if ((flags & (PENALIZED | LISTED)) != 0) | (mask_row >= 0):
            own = adjusted_ptr + row * VOCAB
            # a part at a time, whose float64 values take few registers from rows without rules
            for start in range(begin, begin + BLOCK, PART):
                part = start + tl.arange(0, PART)
                inside = part < VOCAB
                values = tl.load(logits_ptr + row * VOCAB + part, mask=inside, other=0.0)
                if (flags & PENALIZED) != 0:
                    cells = tl.load(counts_ptr + slot * VOCAB + part, mask=inside, other=0)
                    for back in tl.static_range(1, MOST + 1):
                        before = tl.maximum(row - back, 0)
                        is_own = (row >= back) & (tl.load(slots_ptr + before) == slot)
                        place = ids_ptr + tl.load(sampled_ptr + before) + 1
                        draft = tl.load(place, mask=is_own, other=-1)
                        cells += (part == draft).to(tl.int32)
                    values = _penalized(values, cells, record)
                if mask_row >= 0:
                    words = masks_ptr + mask_row * ((VOCAB + 31) // 32)
                    word = tl.load(words + part // 32, mask=inside, other=0)
                    values = tl.where(((word >> (part % 32)) & 1) != 0, values, float("-inf"))
                tl.store(own + part, values, mask=inside)
            # the program's threads read what others of them have stored
            tl.debug_barrier()
            if (flags & LISTED) != 0:
                position = tl.load(positions_ptr + row)
                _apply_entries(own, record, position, begin, tl.minimum(begin + BLOCK, VOCAB))
                tl.debug_barrier()
            logits = tl.load(own + token, mask=token < VOCAB, other=float("-inf"))
            largest = tl.max(logits, axis=0)
        tl.store(best + 1, image_of(largest))
        tl.store(best + 2, tl.min(tl.where(logits == largest, token, VOCAB), axis=0))


@triton.jit
def _thresholds(row_ptr, largest, margin, VOCAB: tl.constexpr):
    """int32 [LEVELS], falling: images at ranks of a sample; last the floor."""
    # as min-p on a CPU: the lowest float32 that is not below the bound
    bound = tl.maximum(value_of(largest).to(tl.float64) + margin, -LARGEST)
    nearest = bound.to(tl.float32)
    floor = image_of(nearest) + (nearest.to(tl.float64) < bound).to(tl.int32)
    place = tl.arange(0, SAMPLE).to(tl.int64) * VOCAB // SAMPLE
    image = image_of(tl.load(row_ptr + place))
    count = tl.sum((image[:, None] >= image[None, :]).to(tl.int32), axis=0)
    level = tl.arange(0, LEVELS)
    reaches = count[:, None] > rank_of(level)[None, :]
    pivots = tl.max(tl.where(reaches, image[:, None], MINUS_INFINITY), axis=0)
    return tl.where(level == LEVELS - 1, floor, tl.maximum(pivots, floor))


@step_kernel()
def settle_kernel(
    logits_ptr,
    adjusted_ptr,
    slots_ptr,
    mask_rows_ptr,
    records_ptr,
    counts_ptr,
    best_ptr,
    state_ptr,
    tokens_ptr,
    VOCAB: tl.constexpr,
    COUNTS: tl.constexpr,
    NUM_BLOCKS: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """Row `program 0`: its token where nothing is drawn, and its state for the next launches."""
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + row).to(tl.int64)
    state = state_ptr + row * STATE
    is_drawn = slot >= 0
    if slot >= 0:
        record = records_ptr + slot * RECORD
        flags = tl.load(record + FLAGS)
        block = tl.arange(0, BLOCKS)
        live = block < NUM_BLOCKS
        best = best_ptr + (row * NUM_BLOCKS + block) * 3
        raw = tl.max(tl.load(best, mask=live, other=MINUS_INFINITY), axis=0)
        images = tl.load(best + 1, mask=live, other=MINUS_INFINITY)
        firsts = tl.load(best + 2, mask=live, other=VOCAB)
        largest = tl.max(images, axis=0)
        token = tl.min(tl.where(images == largest, firsts, VOCAB), axis=0)
        token = tl.where(largest == MINUS_INFINITY, NO_TOKEN, token)
        token = tl.where((raw == MINUS_INFINITY) | (raw >= INFINITY), NOT_FINITE, token)
        is_drawn = (token >= 0) & ((flags & RANDOM) != 0)
        if is_drawn:
            ruled = ((flags & (PENALIZED | LISTED)) != 0) | (tl.load(mask_rows_ptr + row) >= 0)
            pointer = adjusted_ptr if ruled else logits_ptr
            margin = float64_at(record + MARGIN)
            thresholds = _thresholds(pointer + row * VOCAB, largest, margin, VOCAB)
            tl.store(state + tl.arange(0, LEVELS), thresholds)
            tl.store(state + MAXIMUM, largest)
            tl.store(state + IS_RULED, ruled.to(tl.int32))
        else:
            finish_row(tokens_ptr, counts_ptr, row, slot, flags, token, VOCAB, COUNTS)
    tl.store(state + IS_DRAWN, is_drawn.to(tl.int32))
