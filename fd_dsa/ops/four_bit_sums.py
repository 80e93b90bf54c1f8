"""Sums of a GEMM whose weight has four bits and whose activations are bfloat16.

Codes become bfloat16 in registers, exactly. Scales of one byte multiply the values there, because
bfloat16 holds an e2m1 number times an e4m3 number or a power of two. Scales of integers have more
bits, so they multiply the float32 sum of their group.

A thread turns two neighbouring words of a column into 8 pairs of values. The tensor cores read them
from its registers, so dequantised weights never pass through shared memory. Triton leaves them
there from 3.5 on, as they are made of loads alone, without constants.

Source: PTX ISA 8.5, `mul` for bf16, which keeps denormal numbers, and `prmt`.
"""

from __future__ import annotations

from fd_dsa.ops.device_functions import to_bfloat16, widened
from fd_dsa.ops.fp4 import PIECE
from fd_dsa.triton_runtime import INTERPRETING

import triton  # isort: skip
import triton.language as tl  # isort: skip

_INTERPRETING = tl.constexpr(INTERPRETING)
# 16 words of 8 codes
_PIECE = tl.constexpr(PIECE)


def _assembly(setup: str, *codes: str) -> str:
    """Return assembly that turns two words, low and high, into 8 pairs of bfloat16.

    Args:
        setup: what runs first.
        codes: for each code of a half, what writes that code of both halves to {to}.
    """
    lines = [".reg .b32 low, high, x, y<4>;", setup]
    lines += [code.format(to=f"${i}", word=("low", "high")[i // 4]) for i, code in enumerate(codes)]
    return "{" + " ".join(lines) + "}"


_WORDS = "mov.b32 low, $8; mov.b32 high, $9;"
# Codes 0 and 4 are in place, and three places lower. 0xE4: c ? a : b
_SPLIT_CODES = (
    "shr.b32 x, low, 7; shr.b32 y0, high, 6; lop3.b32 x, x, y0, 0x00D800D8, 0xE4;"
    " shl.b32 y0, high, 2; lop3.b32 x, x, y0, 0x01F801F8, 0xE4;"
)
_E2M1_CODES = (
    "shl.b32 y1, {word}, 6; and.b32 {to}, y1, 0x81C081C0;",
    "shl.b32 y1, {word}, 3; and.b32 {to}, y1, 0x81C081C0;",
    "and.b32 {to}, {word}, 0x81C081C0;",
)
_E2M1 = tl.constexpr(
    _assembly(
        _WORDS + _SPLIT_CODES,
        "and.b32 {to}, x, 0x81C081C0;",
        *_E2M1_CODES,
        "shl.b32 x, x, 3; and.b32 {to}, x, 0x81C081C0;",
        *_E2M1_CODES,
    )
)
# 0xEA: a & b | c. Compilers do not join these two operations if b and c are constants.
_INT4_CODES = tuple(
    f"shr.b32 x, {{word}}, {4 * i}; lop3.b32 {{to}}, x, 0x000F000F, 0x43004300, 0xEA;"
    for i in range(4)
)
_INT4 = tl.constexpr(_assembly(_WORDS, *_INT4_CODES, *_INT4_CODES))
_E4M3 = tl.constexpr(
    "{.reg .b32 x; shl.b32 x, $2, 4; lop3.b32 $0, x, 0x0FF00FF0, 0x70007000, 0xEA;"
    " shr.b32 x, $2, 4; lop3.b32 $1, x, 0x0FF00FF0, 0x70007000, 0xEA;}"
)


def _mxfp4_code(code: int) -> str:
    """Return what `_assembly` needs for a code of kind "e8m0".

    The signs of two codes are the highest bits of the bytes of a 16-bit half.
    """
    is_up, i = divmod(code, 4)
    shift = "shl.b32 x, {word}," if i < 2 else "shr.b32 x, {word},"
    size = f"{shift} {abs(6 - 4 * i)};"
    sign = f"y{2 * is_up + i // 2}"
    if i % 2 == 0:
        size, sign = f"{size} shl.b32 {{to}}, {sign}, 8;", "{to}"
    # 0xE4: c ? a : b, which also drops the sign of the other byte
    return f"{size} lop3.b32 {{to}}, x, {sign}, 0x01C001C0, 0xE4;"


_MXFP4_SIGNS = (
    # the same half of both words side by side
    "prmt.b32 low, $8, $9, 0x5410; prmt.b32 high, $8, $9, 0x7632;"
    " and.b32 y0, low, 0x80808080; and.b32 y1, high, 0x80808080;"
    " shl.b32 x, low, 4; and.b32 y2, x, 0x80808080;"
    " shl.b32 x, high, 4; and.b32 y3, x, 0x80808080;"
)
_MXFP4 = tl.constexpr(_assembly(_MXFP4_SIGNS, *map(_mxfp4_code, range(8))))


@triton.jit
def _product(x, y):
    """Multiply bfloat16 tiles with exact results. The interpreter multiplies only float32."""
    if _INTERPRETING:
        return to_bfloat16(widened(x) * widened(y))
    return x * y


@triton.jit
def _difference(x, y):
    """Subtract bfloat16 tiles with exact results."""
    if _INTERPRETING:
        return to_bfloat16(widened(x) - widened(y))
    return x - y


@triton.jit
def _bfloat16(bits):
    """Return the bfloat16 of the lower 16 bits."""
    return bits.to(tl.uint16).to(tl.bfloat16, bitcast=True)


@triton.jit
def _halves(words, KIND: tl.constexpr):
    """Return both halves of each word of a column, 16 bits each. See FourBitWeight."""
    if KIND == "e8m0":
        return words & 0xFFFF, words >> 16
    low, high = tl.split(tl.reshape(words, (words.shape[0], 8, 2)))
    low, high = tl.join(low & 0xFFFF, low >> 16), tl.join(high & 0xFFFF, high >> 16)
    return tl.reshape(low, words.shape), tl.reshape(high, words.shape)


@triton.jit
def _plane(low, high, NIBBLE: tl.constexpr, KIND: tl.constexpr):
    """Return one code of each word as in `_planes`."""
    half = high if NIBBLE // 4 else low
    code: tl.constexpr = NIBBLE % 4
    if KIND == "e8m0":
        word = low | high << 16
        sign = word >> (8 * code + 7 - 4 * (NIBBLE // 4)) & 1
        return _bfloat16((half >> (4 * code) & 7) << 6 | sign << 15)
    if KIND == "int4":
        # the last bits of a bfloat16 from 128 to 255 count ones
        return _bfloat16((half >> (4 * code)) & 15 | 0x4300)
    if code > 0:
        return _bfloat16((half << (9 - 3 * code)) & 0x81C0)
    split = (low >> 7) & 0x00D8 | (high >> 6) & 0x0120 | (high << 2) & 0x9000
    return _bfloat16((split << (3 * (NIBBLE // 4))) & 0x81C0)


@triton.jit
def _planes(words, KIND: tl.constexpr):
    """Return 8 tiles of bfloat16, one for each code of a word.

    A value is e2m1(code) x 2^-126, or for integers 128 + code.
    """
    if _INTERPRETING:
        low, high = _halves(words, KIND)
        return (
            _plane(low, high, 0, KIND), _plane(low, high, 1, KIND), _plane(low, high, 2, KIND),
            _plane(low, high, 3, KIND), _plane(low, high, 4, KIND), _plane(low, high, 5, KIND),
            _plane(low, high, 6, KIND), _plane(low, high, 7, KIND),
        )  # fmt: skip
    return tl.inline_asm_elementwise(
        _INT4 if KIND == "int4" else _MXFP4 if KIND == "e8m0" else _E2M1,
        "=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,r,r",
        [words],
        dtype=(tl.bfloat16,) * 8,
        is_pure=True,
        pack=2,
    )


@triton.jit
def _beside(left, right):
    """Join tiles [columns, K] to one of [columns, 2 * K]."""
    pairs = tl.permute(tl.join(left, right), (0, 2, 1))
    return tl.reshape(pairs, (left.shape[0], 2 * left.shape[1]))


@triton.jit
def _two(planes, FIRST: tl.constexpr):
    """Join two of 8 tiles."""
    return _beside(planes[FIRST], planes[FIRST + 1])


@triton.jit
def _four(planes, FIRST: tl.constexpr):
    """Join four of 8 tiles."""
    return _beside(_two(planes, FIRST), _two(planes, FIRST + 2))


@triton.jit
def _joined(planes, FIRST: tl.constexpr, COUNT: tl.constexpr):
    """Join COUNT of 8 tiles [columns, K] to one of [columns, COUNT * K]."""
    if COUNT == 1:
        return planes[FIRST]
    elif COUNT == 2:
        return _two(planes, FIRST)
    elif COUNT == 4:
        return _four(planes, FIRST)
    else:
        return _beside(_four(planes, 0), _four(planes, 4))


@triton.jit
def _four_scales(codes):
    """Return the bfloat16 scales of four e4m3 codes in a uint32, see `_e4m3_columns`."""
    if _INTERPRETING:
        even = (codes << 4) & 0x0FF00FF0 | 0x70007000
        odd = (codes >> 4) & 0x0FF00FF0 | 0x70007000
    else:
        even, odd = tl.inline_asm_elementwise(
            _E4M3, "=&r,=&r,r", [codes], dtype=(tl.uint32,) * 2, is_pure=True, pack=1
        )
    return _bfloat16(even), _bfloat16(odd), _bfloat16(even >> 16), _bfloat16(odd >> 16)


@triton.jit
def _e4m3_columns(words, scales):
    """Return the values of a piece [columns, 128] as bfloat16, times 2^-FACTOR_POWER.

    A scale's code counts the last bits of a bfloat16 from a power of 2 on. Scales are raised by
    2^107, see `fp4.FACTOR_POWER`.

    Args:
        scales: uint64 [columns, 1], the codes of a piece.
    """
    p = _planes(words, "e4m3")
    a, b, c, d = _four_scales(scales.to(tl.uint32))
    e, f, g, h = _four_scales((scales >> 32).to(tl.uint32))
    return _joined(
        (
            _product(p[0], a), _product(p[1], b), _product(p[2], c), _product(p[3], d),
            _product(p[4], e), _product(p[5], f), _product(p[6], g), _product(p[7], h),
        ),
        0, 8,
    )  # fmt: skip


@triton.jit
def _e8m0_columns(words, scales):
    """Return the values of a piece as `_e4m3_columns` does, in the order of `_in_order_of_words`.

    Args:
        scales: uint8 [columns, 4 or 8], the codes of a piece, once or twice.
    """
    p = _planes(words, "e8m0")
    count: tl.constexpr = scales.shape[1]
    each = tl.broadcast_to(scales[:, None, :], (scales.shape[0], 16 // count, count))
    s = _bfloat16((tl.reshape(each, (scales.shape[0], 16)).to(tl.uint32) + 100) << 7)
    return _joined(
        (
            _product(p[0], s), _product(p[1], s), _product(p[2], s), _product(p[3], s),
            _product(p[4], s), _product(p[5], s), _product(p[6], s), _product(p[7], s),
        ),
        0, 8,
    )  # fmt: skip


@triton.jit
def _in_order_of_words(rows):
    """Return a piece of rows [rows, 128] in the order of kind "e8m0": first code 0 of all words."""
    parts = tl.reshape(rows, (rows.shape[0], 4, 2, 4, 4))
    return tl.reshape(tl.permute(parts, (0, 2, 4, 3, 1)), (rows.shape[0], _PIECE))


@triton.jit
def _loaded_rows(x, live, at, K: tl.constexpr, WIDTH: tl.constexpr):
    """Load K values of each row from `at` on, zeros past the end."""
    place = at + tl.arange(0, K)[None, :]
    mask = live[:, None]
    if WIDTH // _PIECE * _PIECE != WIDTH:
        mask &= place < WIDTH
    return tl.load(x + place, mask=mask, other=0.0)


@triton.jit
def _e2m1_sums(x, live, words, scales, turn, total, WIDTH: tl.constexpr, COLUMNS: tl.constexpr,
               KIND: tl.constexpr):  # fmt: skip
    """Add the dots of a piece of e2m1 values to `total`."""
    scale = tl.load(scales + turn * (COLUMNS * 4 if KIND == "e8m0" else COLUMNS))
    rows = _loaded_rows(x, live, turn * _PIECE, _PIECE, WIDTH)
    codes = tl.load(words + turn * (COLUMNS * 16))
    if KIND == "e8m0":
        rows = _in_order_of_words(rows)
        columns = _e8m0_columns(codes, scale)
    else:
        columns = _e4m3_columns(codes, scale)
    return tl.dot(columns, tl.trans(rows), acc=total)


@triton.jit
def _int4_sums(x, live, words, scales, turn, total, WIDTH: tl.constexpr, COLUMNS: tl.constexpr,
               GROUP: tl.constexpr):  # fmt: skip
    """Add the scaled dots of a piece of integers to `total`."""
    groups: tl.constexpr = _PIECE // GROUP
    planes = _planes(tl.load(words + turn * (COLUMNS * 16)), "int4")
    for i in tl.static_range(groups):
        # values past the end of a row have the scale of the last group, and rows of zeros
        group = tl.minimum(turn * groups + i, WIDTH // GROUP - 1)
        scale = tl.load(scales + group * COLUMNS)
        columns = _joined(planes, i * (8 // groups), 8 // groups)
        columns = _difference(columns, _bfloat16(scale & 15 | 0x4300))
        rows = _loaded_rows(x, live, turn * _PIECE + i * GROUP, GROUP, WIDTH)
        scale = (scale & 0xFFFFFFF0).to(tl.float32, bitcast=True)
        total += tl.dot(columns, tl.trans(rows)) * scale
    return total


@triton.jit
def four_bit_sums(
    x,
    live,
    expert,
    column,
    codes_ptr,
    scales_ptr,
    factors_ptr,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    GATED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    GROUP: tl.constexpr,
    KIND: tl.constexpr,
):
    """Return the float32 sums [rows, columns] of both parts of a FourBitWeight, see `fp8_sums`.

    Args:
        x: pointers [rows, 1] to the first value of each row.
        live: mask [rows] of the rows to load.
        expert: expert of the tile, int64.
        column: columns of the tile in a part.
    """
    parts: tl.constexpr = 2 if GATED else 1
    pieces: tl.constexpr = (WIDTH + _PIECE - 1) // _PIECE
    # gate and up take turns in a tile of one GEMM
    part = tl.zeros_like(column)
    if GATED:
        part = tl.interleave(part, part + 1)
        column = tl.interleave(column, column)
    part += expert * parts
    rows: tl.constexpr = WIDTH // GROUP if KIND == "int4" else pieces
    places = (part * (pieces * COLUMNS) + column)[:, None]
    words = codes_ptr.to(tl.pointer_type(tl.uint32)) + 16 * places + tl.arange(0, 16)[None, :]
    first = (part * (rows * COLUMNS) + column)[:, None]
    if KIND == "e8m0":
        # Each thread copies four bytes ahead if there are two copies of a scale. Two blocks of 128
        # rows, which share a processor, have no memory for this.
        count: tl.constexpr = 4 if BLOCK_ROWS == 128 else 8
        scales = scales_ptr + 4 * first + tl.arange(0, count)[None, :] % 4
    else:
        # a word has the scales of a piece, or one scale and zero point of integers
        kind: tl.constexpr = tl.uint64 if KIND == "e4m3" else tl.uint32
        scales = scales_ptr.to(tl.pointer_type(kind)) + first
    total = tl.zeros([parts * BLOCK_COLUMNS, BLOCK_ROWS], tl.float32)
    for turn in tl.range(0, pieces, loop_unroll_factor=BLOCK_WIDTH // _PIECE):
        if KIND == "int4":
            total = _int4_sums(x, live, words, scales, turn, total, WIDTH, COLUMNS, GROUP)
        else:
            total = _e2m1_sums(x, live, words, scales, turn, total, WIDTH, COLUMNS, KIND)
    total = tl.trans(total)
    up_total = total
    if GATED:
        total, up_total = tl.split(tl.reshape(total, (BLOCK_ROWS, BLOCK_COLUMNS, 2)))
    if factors_ptr is not None:
        factor = factors_ptr + expert * parts
        total *= tl.load(factor)
        if GATED:
            up_total *= tl.load(factor + 1)
    return total, up_total
