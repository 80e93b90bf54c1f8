"""Values of a row, and the first two launches of sampling: rules and maxima, then their results.

Greedy rows end here, and so do rows without a finite logit or an allowed token. A row that is
sampled gets thresholds by which the next launches divide it: the floor of min-p, and values at some
ranks of a sample of the row.
"""

from __future__ import annotations

from fd_dsa.ops.device_functions import image_of, value_of
from fd_dsa.ops.sampling import parameters as places
from fd_dsa.ops.sampling import token_buffer as results
from fd_dsa.ops.step_kernel import step_kernel

import triton  # isort: skip
import triton.language as tl  # isort: skip

NOT_FINITE, NO_TOKEN = tl.constexpr(results.NOT_FINITE), tl.constexpr(results.NO_TOKEN)
SCALE, MARGIN, TOP_P = map(tl.constexpr, (places.SCALE, places.MARGIN, places.TOP_P))
SEED, TOP_K, FLAGS = map(tl.constexpr, (places.SEED, places.TOP_K, places.FLAGS))
RANDOM, PENALIZED = tl.constexpr(places.RANDOM), tl.constexpr(places.PENALIZED)
LISTED, RECORD = tl.constexpr(places.LISTED), tl.constexpr(places.RECORD)

INFINITY, NAN = tl.constexpr(0x7F800000), tl.constexpr(0x7FFFFFFF)
"""Images of +inf and of NaN, which is the only larger image."""
MINUS_INFINITY = tl.constexpr(-0x7F800001)
LARGEST = tl.constexpr(3.4028234663852886e38)
_ONE = tl.constexpr(float(1 << 40))
_LN2 = tl.constexpr(0.6931471805599453)
# layout of a row's state: falling thresholds, of which the last is the floor, then these places
LEVELS = tl.constexpr(16)
MAXIMUM, IS_RANDOM, IS_RULED = (tl.constexpr(LEVELS.value + i) for i in range(3))
STATE = tl.constexpr(2 * LEVELS.value)
# tokens of a row whose values become thresholds
SAMPLE = tl.constexpr(256)
_REPETITION, _FREQUENCY, _PRESENCE, _NUM_ENTRIES = map(
    tl.constexpr, (places.REPETITION, places.FREQUENCY, places.PRESENCE, places.NUM_ENTRIES)
)
_HEADER, _ENTRY = tl.constexpr(places.HEADER), tl.constexpr(places.ENTRY)
_IN_PROMPT = tl.constexpr(places.IN_PROMPT)
_ENTRIES = tl.constexpr(256)


@triton.jit
def weights_of(values, largest, scale):
    """Return int64 weights 2^((value - largest) * scale), in units of 2^-40.

    The exponent may be large, so the rounding of its float32 multiplication is corrected. Launches
    must not fuse operations, so that a weight is the same number in each of them.
    """
    high = scale.to(tl.float32)
    low = (scale - high.to(tl.float64)).to(tl.float32)
    # lower values have weight 0
    below = tl.maximum(values - largest, -48.0 / high)
    exponent = below * high
    rest = tl.fma(below, high, -exponent) + below * low
    weights = tl.exp2(exponent) * (1.0 + rest * _LN2)
    return (weights * _ONE + 0.5).to(tl.int64)


@triton.jit
def joined(low, high):
    """Return the int64 of two int32 halves."""
    return low.to(tl.uint32, bitcast=True).to(tl.int64) | (high.to(tl.int64) << 32)


@triton.jit
def float64_at(pointer):
    """Load a float64 at an address of int32 values."""
    return joined(tl.load(pointer), tl.load(pointer + 1)).to(tl.float64, bitcast=True)


@triton.jit
def uniform_of(record, position):
    """Return the float64 in [0, 1) of a batch row's seed and a position.

    It is the number of `fd_dsa.engine.draws.uniforms`.
    """
    seed = joined(tl.load(record + SEED), tl.load(record + SEED + 1)).to(tl.uint64, bitcast=True)
    step = (position.to(tl.int64) + 1).to(tl.uint64, bitcast=True)
    state = seed + step * 0x9E3779B97F4A7C15
    state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9
    state = (state ^ (state >> 27)) * 0x94D049BB133111EB
    state = (state ^ (state >> 31)) >> 11
    return state.to(tl.int64).to(tl.float64) * (2.0**-53)


@triton.jit
def rank_of(level):
    """Return the rank of a level's threshold in the sample. Low ranks are closer together."""
    return level * (level + 2) * SAMPLE // (LEVELS * LEVELS)


@triton.jit
def row_of(logits_ptr, adjusted_ptr, state, row, VOCAB: tl.constexpr):
    """Return the address of the logits of a row, with its rules applied."""
    pointer = adjusted_ptr if tl.load(state + IS_RULED) != 0 else logits_ptr
    return pointer + row * VOCAB


@triton.jit
def finish_row(
    tokens_ptr, counts_ptr, row, batch_row, flags, token, VOCAB: tl.constexpr, COUNTS: tl.constexpr
):
    """Store a row's token. With COUNTS, count it if the batch row has penalties."""
    tl.store(tokens_ptr + row, token.to(tl.int64))
    if ((flags & PENALIZED) != 0) & (token >= 0) & COUNTS:
        cell = counts_ptr + batch_row * VOCAB + token
        tl.store(cell, tl.load(cell) + 1)


@triton.jit
def _narrowed(values):
    """Return float32 of float64 values. A large value becomes the largest number, not +inf."""
    inside = tl.minimum(tl.maximum(values, -LARGEST), LARGEST).to(tl.float32)
    return tl.where(values < -LARGEST, float("-inf"), inside)


@triton.jit
def _penalized(values, cells, record):
    """Apply repetition, frequency and presence penalty in float64, as on a CPU."""
    repetition = float64_at(record + _REPETITION)
    count = (cells & (_IN_PROMPT - 1)).to(tl.float64)
    wide = values.to(tl.float64)
    wide = tl.where(wide > 0, wide / repetition, wide * repetition)
    once = tl.where(count > 0, float64_at(record + _PRESENCE), 0.0)
    wide -= float64_at(record + _FREQUENCY) * count + once
    return tl.where(cells != 0, _narrowed(wide), values)


@triton.jit
def _apply_entries(row_ptr, record, position, begin, end):
    """Add biases to the logits of tokens begin to end - 1 in memory, and apply bans."""
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
    batch_rows_ptr,
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
    MAX_DRAFTS: tl.constexpr,
):
    """Find the maxima of block `program 1` of row `program 0`, without and with rules.

    The order of the rules is penalties, mask, bias, bans. Tokens that the mask excludes keep -inf.
    A batch row has up to MAX_DRAFTS rows before this row. The draft after each of them counts as a
    token of the output.
    """
    row = tl.program_id(0).to(tl.int64)
    batch_row = tl.load(batch_rows_ptr + row).to(tl.int64)
    if batch_row >= 0:
        begin = tl.program_id(1) * BLOCK
        token = begin + tl.arange(0, BLOCK)
        raw = logits_ptr + row * VOCAB + token
        logits = tl.load(raw, mask=token < VOCAB, other=float("-inf"))
        largest = tl.max(logits, axis=0)
        has_nan = tl.max((logits != logits).to(tl.int32), axis=0) != 0
        best = best_ptr + (row * tl.num_programs(1) + tl.program_id(1)) * 3
        tl.store(best, tl.where(has_nan, NAN, image_of(largest)))
        record = records_ptr + batch_row * RECORD
        flags = tl.load(record + FLAGS)
        mask_row = tl.load(mask_rows_ptr + row).to(tl.int64)
        if ((flags & (PENALIZED | LISTED)) != 0) | (mask_row >= 0):
            own = adjusted_ptr + row * VOCAB
            # one part at a time, because float64 values of a whole block need many registers
            for start in range(begin, begin + BLOCK, PART):
                part = start + tl.arange(0, PART)
                inside = part < VOCAB
                values = tl.load(logits_ptr + row * VOCAB + part, mask=inside, other=0.0)
                if (flags & PENALIZED) != 0:
                    cells = tl.load(counts_ptr + batch_row * VOCAB + part, mask=inside, other=0)
                    for back in tl.static_range(1, MAX_DRAFTS + 1):
                        before = tl.maximum(row - back, 0)
                        is_own = (row >= back) & (tl.load(batch_rows_ptr + before) == batch_row)
                        place = ids_ptr + tl.load(sampled_ptr + before) + 1
                        draft = tl.load(place, mask=is_own, other=-1)
                        cells += (part == draft).to(tl.int32)
                    values = _penalized(values, cells, record)
                if mask_row >= 0:
                    words = masks_ptr + mask_row * ((VOCAB + 31) // 32)
                    word = tl.load(words + part // 32, mask=inside, other=0)
                    values = tl.where(((word >> (part % 32)) & 1) != 0, values, float("-inf"))
                tl.store(own + part, values, mask=inside)
            # threads of the program read values that other threads have stored
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
    """Return falling images at ranks of a sample, then the floor: int32 [LEVELS]."""
    # min-p as on a CPU: the floor is the lowest float32 from the bound on
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
    batch_rows_ptr,
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
    """Store the token of row `program 0` if it is greedy or an error, else its state."""
    row = tl.program_id(0).to(tl.int64)
    batch_row = tl.load(batch_rows_ptr + row).to(tl.int64)
    state = state_ptr + row * STATE
    is_random = batch_row >= 0
    if batch_row >= 0:
        record = records_ptr + batch_row * RECORD
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
        is_random = (token >= 0) & ((flags & RANDOM) != 0)
        if is_random:
            ruled = ((flags & (PENALIZED | LISTED)) != 0) | (tl.load(mask_rows_ptr + row) >= 0)
            pointer = adjusted_ptr if ruled else logits_ptr
            margin = float64_at(record + MARGIN)
            thresholds = _thresholds(pointer + row * VOCAB, largest, margin, VOCAB)
            tl.store(state + tl.arange(0, LEVELS), thresholds)
            tl.store(state + MAXIMUM, largest)
            tl.store(state + IS_RULED, ruled.to(tl.int32))
        else:
            finish_row(tokens_ptr, counts_ptr, row, batch_row, flags, token, VOCAB, COUNTS)
    tl.store(state + IS_RANDOM, is_random.to(tl.int32))
