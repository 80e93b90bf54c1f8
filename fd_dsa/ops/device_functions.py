"""Device functions that several kernels call: conversions, RoPE, Hadamard, FP8, keys of a step.

The float32 functions round to the same bits as the CPU's. So a kernel that calls them must be
launched with `enable_fp_fusion=False`: no product may be fused with a sum. Divisions and roots are
correctly rounded. Narrow types are rounded to nearest even. The interpreter's casts to bfloat16
and e4m3 truncate, so in the interpreter these functions round the bits.
"""

from __future__ import annotations

from fd_dsa.triton_runtime import INTERPRETING

import triton  # isort: skip
import triton.language as tl  # isort: skip

_INTERPRETING = tl.constexpr(INTERPRETING)


@triton.jit
def widened(x):
    """Convert float32 or bfloat16 to float32, exactly for denormal numbers too."""
    if x.dtype == tl.bfloat16:
        # one instruction, as a cast; the interpreter's cast is wrong for denormal numbers
        x = (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    return x


@triton.jit
def image_of(values):
    """Return int32 images, which have the order of the values.

    -0.0 equals +0.0, and NaN is above all values.
    """
    bits = values.to(tl.int32, bitcast=True)
    bits = tl.where(bits == -0x80000000, 0, bits)
    image = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return tl.where((bits & 0x7FFFFFFF) > 0x7F800000, 0x7FFFFFFF, image)


@triton.jit
def value_of(image):
    """Return the float32 value of an image."""
    return tl.where(image < 0, image ^ 0x7FFFFFFF, image).to(tl.float32, bitcast=True)


@triton.jit
def to_bfloat16(x):
    """Round float32 to bfloat16, nearest even. NaN stays NaN."""
    if _INTERPRETING:
        bits = x.to(tl.uint32, bitcast=True)
        bits = tl.where(x == x, bits + 0x7FFF + ((bits >> 16) & 1), 0x7FC00000)
        return (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return x.to(tl.bfloat16)


@triton.jit
def to_e4m3(x):
    """Round float32 to e4m3 codes (uint8), nearest even. Past 448 is 448, NaN is 0x7F."""
    if _INTERPRETING:
        bits = x.to(tl.uint32, bitcast=True)
        sign = (bits >> 24) & 0x80
        bits = tl.minimum(bits & 0x7FFFFFFF, 0x43E00000)
        normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - 960
        # adding 2^14 leaves the step of the subnormal numbers as the last bit
        raised = bits.to(tl.float32, bitcast=True) + 16384.0
        subnormal = raised.to(tl.uint32, bitcast=True) - 0x46800000
        code = tl.where(bits < 0x3C800000, subnormal, normal) | sign
        return tl.where(x == x, code, 0x7F).to(tl.uint8)
    return x.to(tl.float8e4nv).to(tl.uint8, bitcast=True)


@triton.jit
def _e4m3_pair(first, second):
    """Round pairs to e4m3 by one instruction: uint16, the code of `first` in the low byte.

    Two casts and a shift give wrong codes. ptxas 12.8 then merges the codes of neighbouring pairs
    with the low half of an unrelated register.
    """
    if _INTERPRETING:
        return to_e4m3(first).to(tl.uint16) | (to_e4m3(second).to(tl.uint16) << 8)
    return tl.inline_asm_elementwise(
        "cvt.rn.satfinite.e4m3x2.f32 $0, $2, $1;",
        "=h,f,f",
        [first, second],
        dtype=tl.uint16,
        is_pure=True,
        pack=1,
    )


@triton.jit
def magnitude(x):
    """Return |x|, in the interpreter with 0 for NaN, because a device's maximum ignores NaN."""
    x = tl.abs(x)
    if _INTERPRETING:
        x = tl.where(x == x, x, 0.0)
    return x


@triton.jit
def absolute_maximum(magnitudes, AXIS: tl.constexpr):
    """Return the maximum of `magnitude` values along an axis without NaN, 0 if all are NaN."""
    largest = tl.max(magnitudes, AXIS)
    return tl.where(largest == largest, largest, 0.0)


@triton.jit
def quotient(x, scale):
    """Divide a tile by its scale [..., 1], correctly rounded. The scale is not denormal.

    The tile is multiplied by the scale's reciprocal, then corrected by the exact remainder. This
    takes a third of the instructions of a division. It was compared with the division for every
    mantissa of a scale, on both sides of every midpoint of two e4m3 numbers.

    Source: Markstein, IA-64 and Elementary Functions, theorem 8.4.
    """
    if _INTERPRETING:
        return tl.div_rn(x, scale)
    # the remainders of tiny numbers would be denormal and lose bits
    raise_by = tl.where(scale < 2.0**-60, 2.0**64, 1.0)
    inverse = tl.div_rn(-1.0, scale * raise_by)
    # infinity times the quotient 0 would be NaN
    scale = tl.where(scale == float("inf"), 0.0, scale * raise_by)
    # these signs keep a quotient of -0
    x = x * (raise_by * -1.0)
    q = x * inverse
    return tl.fma(tl.fma(q, scale, x), inverse, q)


@triton.jit
def over_448(x):
    """Divide float32 x >= 0 by 448, correctly rounded if the result is a normal number."""
    if _INTERPRETING:
        return tl.div_rn(x, 448.0)
    q = x * (1.0 / 448.0)
    corrected = tl.fma(tl.fma(q, -448.0, x), 1.0 / 448.0, q)
    return tl.where(x == float("inf"), x, corrected)


@triton.jit
def mean_of(total, WIDTH: tl.constexpr):
    """Divide a float64 total by WIDTH and round to float32."""
    if (WIDTH & (WIDTH - 1)) == 0:
        return (total * (1.0 / WIDTH)).to(tl.float32)
    return (total / WIDTH).to(tl.float32)


@triton.jit
def load_pairs(pointer, mask, HALF: tl.constexpr, INTERLEAVED: tl.constexpr):
    """Load HALF pairs at each `pointer` [ROWS, 1]: both values, float32 [ROWS, HALF] each.

    Pairs are (2j, 2j + 1) if INTERLEAVED, else (j, j + HALF). `mask` [ROWS, 1] may be None. An
    interleaved pair is loaded as one integer, so that both values reach the same thread. It must be
    aligned like that integer.
    """
    column = tl.arange(0, HALF)[None, :]
    if not INTERLEAVED:
        first = widened(tl.load(pointer + column, mask=mask))
        second = widened(tl.load(pointer + HALF + column, mask=mask))
    elif pointer.dtype.element_ty == tl.bfloat16:
        both = tl.load(pointer.to(tl.pointer_type(tl.uint32)) + column, mask=mask)
        first = (both << 16).to(tl.float32, bitcast=True)
        second = (both & 0xFFFF0000).to(tl.float32, bitcast=True)
    else:
        both = tl.load(pointer.to(tl.pointer_type(tl.uint64)) + column, mask=mask)
        first = both.to(tl.uint32).to(tl.float32, bitcast=True)
        second = (both >> 32).to(tl.uint32).to(tl.float32, bitcast=True)
    return first, second


@triton.jit
def store_pairs(pointer, first, second, mask, HALF: tl.constexpr, INTERLEAVED: tl.constexpr):
    """Store pairs in the order of `load_pairs`. The values have the dtype of the memory."""
    column = tl.arange(0, HALF)[None, :]
    if not INTERLEAVED:
        tl.store(pointer + column, first, mask=mask)
        tl.store(pointer + HALF + column, second, mask=mask)
    elif pointer.dtype.element_ty == tl.float32:
        high = second.to(tl.uint32, bitcast=True).to(tl.uint64) << 32
        both = first.to(tl.uint32, bitcast=True).to(tl.uint64) | high
        tl.store(pointer.to(tl.pointer_type(tl.uint64)) + column, both, mask=mask)
    else:
        high = second.to(tl.uint16, bitcast=True).to(tl.uint32) << 16
        both = first.to(tl.uint16, bitcast=True).to(tl.uint32) | high
        tl.store(pointer.to(tl.pointer_type(tl.uint32)) + column, both, mask=mask)


@triton.jit
def store_codes(pointer, first, second, mask, HALF: tl.constexpr, INTERLEAVED: tl.constexpr):
    """Store float32 pairs as e4m3 codes in uint8 memory, in the order of `load_pairs`."""
    column = tl.arange(0, HALF)[None, :]
    if INTERLEAVED:
        both = _e4m3_pair(first, second)
        tl.store(pointer.to(tl.pointer_type(tl.uint16)) + column, both, mask=mask)
    else:
        tl.store(pointer + column, to_e4m3(first), mask=mask)
        tl.store(pointer + HALF + column, to_e4m3(second), mask=mask)


@triton.jit
def rotated(first, second, cos, sin):
    """Rotate pairs by their angles. Each product is rounded before the sum."""
    return first * cos - second * sin, second * cos + first * sin


@triton.jit
def load_row(pointer, mask, HALF: tl.constexpr, INTERLEAVED: tl.constexpr, HADAMARD: tl.constexpr):
    """Load rows of 4 * HALF values at `pointer` [ROWS, 1] as four float32 [ROWS, HALF].

    The first two are the pairs of the rotated half, see `load_pairs`. The other half is loaded with
    the widest instructions, unless `hadamard` needs it in the order of the first half.
    """
    a, b = load_pairs(pointer, mask, HALF, INTERLEAVED)
    c, d = load_pairs(pointer + 2 * HALF, mask, HALF, INTERLEAVED or not HADAMARD)
    return a, b, c, d


@triton.jit
def store_row(
    pointer, a, b, c, d, mask, HALF: tl.constexpr, INTERLEAVED: tl.constexpr, HADAMARD: tl.constexpr
):
    """Store rows in the order of `load_row`, as float32, bfloat16 or int16 (bfloat16 bits)."""
    a, b, c, d = stored(a, pointer), stored(b, pointer), stored(c, pointer), stored(d, pointer)
    store_pairs(pointer, a, b, mask, HALF, INTERLEAVED)
    store_pairs(pointer + 2 * HALF, c, d, mask, HALF, INTERLEAVED or not HADAMARD)


@triton.jit
def power_above(x):
    """Return the biased exponent of the least power of two that is not below x > 0, uint32."""
    bits = x.to(tl.uint32, bitcast=True)
    return (bits >> 23) + ((bits & 0x7FFFFF) != 0).to(tl.uint32)


@triton.jit
def power_of(exponent):
    """Return the power of two with a biased exponent (uint32), float32."""
    return (exponent << 23).to(tl.float32, bitcast=True)


@triton.jit
def inverse_power(exponent):
    """Return the exact reciprocal of the power of two with a biased exponent, float32."""
    # 1 / infinity is 0, and every other scale is below 2^127
    return power_of(tl.where(exponent < 254, 254 - exponent, 0))


@triton.jit
def scale_of_row(a, b, c, d, UE8M0: tl.constexpr):
    """Return the scales of index keys or queries from `load_row`, float32 [ROWS].

    A scale is max(largest magnitude, 1e-4) / 448, rounded up to a power of two if UE8M0.
    """
    high = tl.maximum(magnitude(a), magnitude(b))
    low = tl.maximum(magnitude(c), magnitude(d))
    scale = over_448(tl.maximum(absolute_maximum(tl.maximum(high, low), 1), 1e-4))
    if UE8M0:
        scale = power_of(power_above(scale))
    return scale


@triton.jit
def store_row_codes(
    pointer,
    a,
    b,
    c,
    d,
    scale,
    mask,
    HALF: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    HADAMARD: tl.constexpr,
    UE8M0: tl.constexpr,
):
    """Store rows divided by their scales [ROWS] as e4m3 codes, in the order of `store_row`."""
    if UE8M0:
        by = inverse_power(scale.to(tl.uint32, bitcast=True) >> 23)[:, None]
        a, b, c, d = a * by, b * by, c * by, d * by
    else:
        by = scale[:, None]
        a, b, c, d = quotient(a, by), quotient(b, by), quotient(c, by), quotient(d, by)
    store_codes(pointer, a, b, mask, HALF, INTERLEAVED)
    store_codes(pointer + 2 * HALF, c, d, mask, HALF, INTERLEAVED or not HADAMARD)


@triton.jit
def stored(x, pointer):
    """Convert float32 to the float32, bfloat16 or int16 (bfloat16 bits) of a pointer."""
    element = pointer.dtype.element_ty
    if element != tl.float32:
        x = to_bfloat16(x).to(element, bitcast=True)
    return x


@triton.jit
def added_dot(rows, columns, total):
    """Add the dots of tiles [rows, K] and [columns, K] to `total`, transposed if rows are few."""
    if rows.shape[0] < 128:
        return tl.dot(columns, tl.trans(rows), acc=total, input_precision="ieee")
    else:
        return tl.dot(rows, tl.trans(columns), acc=total, input_precision="ieee")


@triton.jit
def _butterfly(u, v):
    """Return the sum and the difference of two values."""
    return u + v, u - v


@triton.jit
def _lane_stages(x, HALF: tl.constexpr):
    """Apply butterflies to the columns of `x` [ROWS, HALF], at distances 1, 2 .. HALF / 2."""
    column = tl.arange(0, HALF)[None, :]
    for stage in tl.static_range(8):
        if (1 << stage) < HALF:
            other = tl.broadcast_to(column ^ (1 << stage), x.shape)
            partner = tl.gather(x, other, 1)
            x = tl.where((column & (1 << stage)) == 0, x + partner, partner - x)
    return x


@triton.jit
def hadamard(a, b, c, d, HALF: tl.constexpr, INTERLEAVED: tl.constexpr):
    """Multiply rows of `load_row` by the orthogonal Hadamard matrix in Sylvester's order.

    The result has the order of `load_row`. Stages run from distance 1 up, as on the CPU.
    """
    if INTERLEAVED:
        a, b = _butterfly(a, b)
        c, d = _butterfly(c, d)
    a = _lane_stages(a, HALF)
    b = _lane_stages(b, HALF)
    c = _lane_stages(c, HALF)
    d = _lane_stages(d, HALF)
    if not INTERLEAVED:
        a, b = _butterfly(a, b)
        c, d = _butterfly(c, d)
    a, c = _butterfly(a, c)
    b, d = _butterfly(b, d)
    norm: tl.constexpr = (4 * HALF) ** -0.5
    return a * norm, b * norm, c * norm, d * norm


@triton.jit
def stored_values(x, WIDE: tl.constexpr):
    """Convert float32, bfloat16 or int16 (bfloat16 bits) to the type WIDE."""
    if x.dtype == tl.int16:
        x = x.to(tl.bfloat16, bitcast=True)
    return x.to(WIDE)


@triton.jit
def e4m3_values(x, WIDE: tl.constexpr):
    """Convert e4m3 codes (uint8) to the type WIDE, exactly in float16 and wider types."""
    return x.to(tl.float8e4nv, bitcast=True).to(tl.float16).to(WIDE)


@triton.jit
def blocks_of(
    block_tables_ptr, batch_id, positions, mask, table_width, num_blocks, BLOCK_SIZE: tl.constexpr
):
    """Return the physical block of each position of a row, int32.

    It is -1 for a masked position, a position past the table and a block outside the cache.
    """
    column = positions // BLOCK_SIZE
    inside = mask & (column < table_width)
    entry = block_tables_ptr + batch_id.to(tl.int64) * table_width + column
    block = tl.load(entry, mask=inside, other=-1)
    return tl.where((block >= 0) & (block < num_blocks), block, -1)


@triton.jit
def key_bounds(
    token, batch_id, live, position_ids_ptr, offsets_ptr, key_starts_ptr, seq_lens_encoder_ptr
):
    """Return the first key of each token and the end of its keys, int32. (0, 0) if not live.

    See `key_bounds.py`. Pointers from `offsets_ptr` on are None in a step without prompt tokens.
    """
    row = tl.zeros_like(token) + batch_id
    live = live & (row >= 0)
    end = tl.load(position_ids_ptr + token, mask=live, other=-1).to(tl.int32) + 1
    first = tl.zeros_like(end)
    if offsets_ptr is not None:
        is_prompt = tl.load(seq_lens_encoder_ptr + row, mask=live, other=0) > 0
        start = tl.load(key_starts_ptr + row, mask=live, other=0)
        count = tl.load(key_starts_ptr + row + 1, mask=live, other=0) - start
        entry = offsets_ptr + 2 * token
        begin = tl.load(entry, mask=live, other=0) - start
        stop = tl.load(entry + 1, mask=live, other=0) - start
        begin = tl.minimum(tl.maximum(begin, 0), count)
        stop = tl.maximum(tl.minimum(stop, count), begin)
        first = tl.where(is_prompt, begin, 0)
        end = tl.where(is_prompt, stop, end)
    return first, end
