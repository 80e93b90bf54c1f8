"""Device functions of the sampling kernels: ordered images, weights, random numbers."""

from __future__ import annotations

# before Triton, since it selects how kernels run
import fd_dsa.triton_runtime  # noqa: F401
from fd_dsa.ops.sampling import parameters as places
from fd_dsa.ops.sampling import token_buffer as results

import triton  # isort: skip
import triton.language as tl  # isort: skip

NOT_FINITE, NO_TOKEN = tl.constexpr(results.NOT_FINITE), tl.constexpr(results.NO_TOKEN)
SCALE, MARGIN, TOP_P = map(tl.constexpr, (places.SCALE, places.MARGIN, places.TOP_P))
SEED, TOP_K, FLAGS = map(tl.constexpr, (places.SEED, places.TOP_K, places.FLAGS))
RANDOM, PENALIZED = tl.constexpr(places.RANDOM), tl.constexpr(places.PENALIZED)
LISTED, RECORD = tl.constexpr(places.LISTED), tl.constexpr(places.RECORD)

INFINITY, NAN = tl.constexpr(0x7F800000), tl.constexpr(0x7FFFFFFF)
"""Images of +inf and NaN, the only larger one."""
MINUS_INFINITY = tl.constexpr(-0x7F800001)
LARGEST = tl.constexpr(3.4028234663852886e38)
_ONE = tl.constexpr(float(1 << 40))
_LN2 = tl.constexpr(0.6931471805599453)
# places in a row's state: thresholds of falling height, the last one the floor, then these
LEVELS = tl.constexpr(16)
MAXIMUM, IS_DRAWN, IS_RULED = (tl.constexpr(LEVELS.value + i) for i in range(3))
STATE = tl.constexpr(2 * LEVELS.value)
# tokens of a row whose values thresholds are made of
SAMPLE = tl.constexpr(256)


@triton.jit
def image_of(values):
    """int32 image: larger = larger value; -0.0 equals +0.0, and NaN is above everything."""
    bits = values.to(tl.int32, bitcast=True)
    bits = tl.where(bits == -0x80000000, 0, bits)
    image = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return tl.where((bits & 0x7FFFFFFF) > INFINITY, 0x7FFFFFFF, image)


@triton.jit
def value_of(image):
    """float32 with this image."""
    return tl.where(image < 0, image ^ 0x7FFFFFFF, image).to(tl.float32, bitcast=True)


@triton.jit
def weights_of(values, largest, scale):
    """int64 weights 2^((value - largest) * scale) as multiples of 2^-40.

    The rounding of the float32 multiplication is made good, since the exponent may be large.
    Launches must not fuse operations: a weight is the same number in each of them.
    """
    high = scale.to(tl.float32)
    low = (scale - high.to(tl.float64)).to(tl.float32)
    # what is lower rounds to 0
    below = tl.maximum(values - largest, -48.0 / high)
    exponent = below * high
    rest = tl.fma(below, high, -exponent) + below * low
    weights = tl.exp2(exponent) * (1.0 + rest * _LN2)
    return (weights * _ONE + 0.5).to(tl.int64)


@triton.jit
def joined(low, high):
    """int64 of its two int32 halves."""
    return low.to(tl.uint32, bitcast=True).to(tl.int64) | (high.to(tl.int64) << 32)


@triton.jit
def float64_at(pointer):
    """float64 at an address of int32 values."""
    return joined(tl.load(pointer), tl.load(pointer + 1)).to(tl.float64, bitcast=True)


@triton.jit
def uniform_of(record, position):
    """float64 in [0, 1) of a slot's seed and a position; see `fd_dsa.engine.draws.uniforms`."""
    seed = joined(tl.load(record + SEED), tl.load(record + SEED + 1)).to(tl.uint64, bitcast=True)
    step = (position.to(tl.int64) + 1).to(tl.uint64, bitcast=True)
    state = seed + step * 0x9E3779B97F4A7C15
    state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9
    state = (state ^ (state >> 27)) * 0x94D049BB133111EB
    state = (state ^ (state >> 31)) >> 11
    return state.to(tl.int64).to(tl.float64) * (2.0**-53)


@triton.jit
def rank_of(level):
    """Rank in the sample of a threshold: finer for few tokens."""
    return level * (level + 2) * SAMPLE // (LEVELS * LEVELS)


@triton.jit
def row_of(logits_ptr, adjusted_ptr, state, row, VOCAB: tl.constexpr):
    """Where the logits of a row are that its token is drawn from."""
    pointer = adjusted_ptr if tl.load(state + IS_RULED) != 0 else logits_ptr
    return pointer + row * VOCAB


@triton.jit
def finish_row(
    tokens_ptr, counts_ptr, row, slot, flags, token, VOCAB: tl.constexpr, COUNTS: tl.constexpr
):
    """Store a row's token, and count it where the slot has penalties and it COUNTS."""
    tl.store(tokens_ptr + row, token.to(tl.int64))
    if ((flags & PENALIZED) != 0) & (token >= 0) & COUNTS:
        cell = counts_ptr + slot * VOCAB + token
        tl.store(cell, tl.load(cell) + 1)
