"""Device functions of sparse MLA on tensor cores: tiles of keys, queries and softmax.

A tile is [keys, heads] if SWAPPED, else [heads, keys]. Instructions of Hopper's tensor cores have
64 rows. With few heads the rows are keys, so that no row is padding.
"""

from __future__ import annotations

from fd_dsa.cache_formats import (
    LATENT_RECORD_BYTES,
    LATENT_ROPE_AT,
    LATENT_SCALES_AT,
    LATENT_WIDTH,
    ROPE_WIDTH,
    TILE_WIDTH,
)
from fd_dsa.ops.device_functions import e4m3_values, stored
from fd_dsa.triton_runtime import INTERPRETING

import triton  # isort: skip
import triton.language as tl  # isort: skip

RANK, ROPE, RECORD = LATENT_WIDTH, ROPE_WIDTH, LATENT_RECORD_BYTES
_RANK, _ROPE, _RECORD = tl.constexpr(RANK), tl.constexpr(ROPE), tl.constexpr(RECORD)
_SCALES_AT, _ROPE_AT = tl.constexpr(LATENT_SCALES_AT), tl.constexpr(LATENT_ROPE_AT)
# latents that share a scale in a record, and the width of a tile of latents in all formats
_TILE = tl.constexpr(TILE_WIDTH)
_INTERPRETING = tl.constexpr(INTERPRETING)


@triton.jit
def of_keys(x, SWAPPED: tl.constexpr):
    """Broadcast a value of each key over heads."""
    return x[:, None] if SWAPPED else x[None, :]


@triton.jit
def of_heads(x, SWAPPED: tl.constexpr):
    """Broadcast a value of each head over keys."""
    return x[None, :] if SWAPPED else x[:, None]


@triton.jit
def latent_order(FP8: tl.constexpr):
    """Return the latent of a tile that each column has, int32 [128].

    A thread converts 16 neighbouring codes and writes them to shared memory as two vectors.
    Neighbouring vectors would be in the same banks as those of other threads. So the second vector
    is 64 columns after the first one. The order does not matter for a sum over latents.
    """
    column = tl.arange(0, _TILE)
    if FP8:
        column = column % 64 // 8 * 16 + column // 64 * 8 + column % 8
        # runs of 8, which the compiler does not find by itself
        column = tl.max_contiguous(tl.multiple_of(column, 8), 8)
    return column


@triton.jit
def load_query(row, is_head, column, first: tl.constexpr, SWAPPED: tl.constexpr):
    """Load the values `first + column` of the queries at `row` [heads] as a bfloat16 operand."""
    if SWAPPED:
        x = tl.load(row[None, :] + first + column[:, None], mask=is_head[None, :], other=0.0)
    else:
        x = tl.load(row[:, None] + first + column[None, :], mask=is_head[:, None], other=0.0)
    return x


@triton.jit
def largest(q, SWAPPED: tl.constexpr):
    """Return the largest magnitude of each query's values, float32 [heads]."""
    return tl.max(tl.abs(q.to(tl.float32)), 0 if SWAPPED else 1)


@triton.jit
def half_range(top):
    """Return a power of two that scales numbers up to `top` below 2^15, and its inverse.

    float16 then represents bfloat16 numbers down to 2^-29 of the largest exactly, and smaller ones
    within 2^-40 of the largest.
    """
    exponent = tl.maximum((top.to(tl.uint32, bitcast=True) >> 23).to(tl.int32), 64)
    up = ((268 - exponent) << 23).to(tl.float32, bitcast=True)
    return up, ((exponent - 14) << 23).to(tl.float32, bitcast=True)


@triton.jit
def slots_at(slots_ptr, entry, end, num_slots):
    """Load the slots of some entries of a row. Return them and a mask of valid slots."""
    slot = tl.load(slots_ptr + entry, mask=entry < end, other=-1)
    return slot, (slot >= 0) & (slot < num_slots)


@triton.jit
def last_entry(slots_ptr, begin, end, num_slots, BLOCK: tl.constexpr):
    """Return the end of the entries from `begin` on, without entries after the last slot."""
    last = begin
    for start in range(begin, end, BLOCK):
        entry = start + tl.arange(0, BLOCK)
        _, seen = slots_at(slots_ptr, entry, end, num_slots)
        last = tl.maximum(last, tl.max(tl.where(seen, entry + 1, 0), 0))
    return last


@triton.jit
def _words(record, seen, first: tl.constexpr, WORDS: tl.constexpr):
    """Load int32 words of each record from byte `first` on: [keys, WORDS].

    Words, because narrower numbers would take a register each.
    """
    pointer = (record + first).to(tl.pointer_type(tl.int32))
    return tl.load(pointer[:, None] + tl.arange(0, WORDS)[None, :], mask=seen[:, None], other=0)


@triton.jit
def _scale_bits(record, seen, i: tl.constexpr):
    """Load scale i of each record: float16 bits of 256 times the scale, in int64 [keys]."""
    scale = tl.load((record + _SCALES_AT).to(tl.pointer_type(tl.float32)) + i, mask=seen, other=0.0)
    return (scale * 256.0).to(tl.float16).to(tl.uint16, bitcast=True).to(tl.int64) << (16 * i)


@triton.jit
def load_keys(cache_ptr, slot, seen, FP8: tl.constexpr):
    """Load keys as words: four tiles of latents, rotated values, four scales in an int64."""
    if FP8:
        record = cache_ptr + slot.to(tl.int64) * _RECORD
        low = _scale_bits(record, seen, 0) | _scale_bits(record, seen, 1)
        scales = low | _scale_bits(record, seen, 2) | _scale_bits(record, seen, 3)
        x0, x1 = _words(record, seen, 0, 32), _words(record, seen, 128, 32)
        x2, x3 = _words(record, seen, 256, 32), _words(record, seen, 384, 32)
        x_rope = _words(record, seen, _ROPE_AT, 32)
    else:
        # the pointer counts 16-bit numbers
        record = cache_ptr + slot.to(tl.int64) * (_RANK + _ROPE)
        scales = slot.to(tl.int64)
        x0, x1 = _words(record, seen, 0, 64), _words(record, seen, 128, 64)
        x2, x3 = _words(record, seen, 256, 64), _words(record, seen, 384, 64)
        x_rope = _words(record, seen, _RANK, 32)
    return x0, x1, x2, x3, x_rope, scales


@triton.jit
def _scaled_code(words, scale):
    """Convert the lowest code in each word, times `scale` / 256, to float16 (interpreter)."""
    code = (words & 0xFF).to(tl.uint8)
    # the interpreter's casts lose NaN
    value = tl.where((code & 0x7F) == 0x7F, float("nan"), e4m3_values(code, tl.float32))
    return (value * 0.00390625).to(tl.float16) * scale


@triton.jit
def _scaled_codes(words, scale):
    """Convert the four codes in each word, times `scale` / 256, to float16. NaN stays NaN."""
    if _INTERPRETING:
        a, b = _scaled_code(words, scale), _scaled_code(words >> 8, scale)
        return a, b, _scaled_code(words >> 16, scale), _scaled_code(words >> 24, scale)
    # two codes by one conversion, two products by one instruction
    return tl.inline_asm_elementwise(
        """{
        .reg .b16 low, high;
        .reg .b32 a, b, s, t;
        mov.b32 {low, high}, $4;
        mov.b32 s, {$5, $5};
        mov.b32 t, 0x1C001C00;
        cvt.rn.f16x2.e4m3x2 a, low;
        cvt.rn.f16x2.e4m3x2 b, high;
        mul.rn.f16x2 a, a, t;
        mul.rn.f16x2 b, b, t;
        mul.rn.f16x2 a, a, s;
        mul.rn.f16x2 b, b, s;
        mov.b32 {$0, $1}, a;
        mov.b32 {$2, $3}, b;
        }""",
        "=h,=h,=h,=h,r,h",
        [words, scale],
        dtype=(tl.float16, tl.float16, tl.float16, tl.float16),
        is_pure=True,
        pack=1,
    )


@triton.jit
def latents(words, scales, i: tl.constexpr, FP8: tl.constexpr):
    """Return the latents of tile i, [keys, 128] in the order of `latent_order`.

    They are float16 if FP8, else bfloat16.
    """
    if FP8:
        # broadcast before the shift, so that all four tiles share one change of layout
        bits = tl.broadcast_to(scales[:, None], words.shape) >> (16 * i)
        scale = (bits & 0xFFFF).to(tl.uint16).to(tl.float16, bitcast=True)
        a, b, c, d = _scaled_codes(words, scale)
        both = tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), [words.shape[0], 8, 2, 8])
        x = tl.reshape(tl.permute(both, [0, 2, 1, 3]), [words.shape[0], _TILE])
    else:
        x = bfloat16_pairs(words)
    return x


@triton.jit
def bfloat16_pairs(words):
    """Return the two bfloat16 numbers of each word, lower half first."""
    if _INTERPRETING:
        a = (words & 0xFFFF).to(tl.uint16).to(tl.bfloat16, bitcast=True)
        b = ((words >> 16) & 0xFFFF).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        a, b = tl.inline_asm_elementwise(
            "mov.b32 {$0, $1}, $2;",
            "=h,=h,r",
            [words],
            dtype=(tl.bfloat16, tl.bfloat16),
            is_pure=True,
            pack=1,
        )
    columns: tl.constexpr = 2 * words.shape[1]
    return tl.reshape(tl.join(a, b), [words.shape[0], columns])


@triton.jit
def product(k, q, SWAPPED: tl.constexpr):
    """Multiply keys and queries over a tile of latents, in float32."""
    return tl.dot(k, q) if SWAPPED else tl.dot(q, tl.trans(k))


@triton.jit
def weighted(k, weight, out, shrink, SWAPPED: tl.constexpr):
    """Return `out` times `shrink`, plus the latents of a tile times their weights."""
    out = out * of_heads(shrink, SWAPPED)
    return tl.dot(tl.trans(k), weight, acc=out) if SWAPPED else tl.dot(weight, k, acc=out)


@triton.jit
def softmax_step(scores, seen, top, total, SWAPPED: tl.constexpr):
    """Apply one step of the online softmax, in powers of two, to a tile of scores.

    If SWAPPED, each row of the tile has a sum of its own. The sums are added once at the end.

    Returns:
        Weights of the tile, factor of older sums, new maximum, new sums.
    """
    scores = tl.where(of_keys(seen, SWAPPED), scores, float("-inf"))
    new_top = tl.maximum(top, tl.max(scores, 0 if SWAPPED else 1))
    # 0 if all scores so far are -inf, to avoid a difference of infinities
    base = tl.where(new_top == float("-inf"), 0.0, new_top)
    shrink = tl.exp2(top - base)
    weight = tl.exp2(scores - of_heads(base, SWAPPED))
    total = total * shrink[None, :] + weight if SWAPPED else total * shrink + tl.sum(weight, 1)
    return weight, shrink, new_top, total


@triton.jit
def zeros(ROWS: tl.constexpr, BLOCK_H: tl.constexpr, SWAPPED: tl.constexpr):
    """Return float32 zeros: [ROWS, heads] if SWAPPED, else [heads, ROWS]."""
    return (
        tl.zeros([ROWS, BLOCK_H], tl.float32) if SWAPPED else tl.zeros([BLOCK_H, ROWS], tl.float32)
    )


@triton.jit
def store_tile(row, is_head, column, first: tl.constexpr, out, factor, SWAPPED: tl.constexpr):
    """Store a tile of the result times `factor` [heads] at `row` [heads] + first + column."""
    out = out * of_heads(factor, SWAPPED)
    if SWAPPED:
        pointer, mask = row[None, :] + first + column[:, None], is_head[None, :]
    else:
        pointer, mask = row[:, None] + first + column[None, :], is_head[:, None]
    tl.store(pointer, stored(out, row), mask=mask)
