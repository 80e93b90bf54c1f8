"""Keys and entries of DeepSeek-V4 on a device as FP8 records.

`fd_dsa.cache_formats` has the bytes. The groups of a key have as many values as it has rotated
channels, which are the last group. A scale is max(largest magnitude, 1e-4) / 448, rounded up to a
power of two. Scales of a record are exponents of one byte. The last one belongs to no code.

Source: the rounding of keys in DeepSeek's published inference code; fields and bytes of FlashMLA's
records for DeepSeek-V4, whose order inside a block differs.
"""

from __future__ import annotations

from fd_dsa.ops.device_functions import (
    absolute_maximum,
    e4m3_values,
    inverse_power,
    magnitude,
    over_448,
    power_above,
    power_of,
    stored,
    to_bfloat16,
    to_e4m3,
)
from fd_dsa.triton_runtime import INTERPRETING

import triton  # isort: skip
import triton.language as tl  # isort: skip


_INTERPRETING = tl.constexpr(INTERPRETING)
# Four e4m3 codes to bfloat16. The bits of a code, moved, are those of its value times 2^-120, for
# denormal numbers too. Times 2^120 (0x7B80) they are exact. The added -0.0 keeps signs of zeros.
_BFLOAT16 = tl.constexpr("""{
.reg .b32 even, odd, x, factor, zero;
mov.b32 factor, 0x7B807B80; mov.b32 zero, 0x80008000;
prmt.b32 even, $2, 0, 0x1404;
prmt.b32 odd, $2, 0, 0x3424;
shr.u32 x, even, 4; and.b32 x, x, 0x07F007F0; lop3.b32 even, even, 0x80008000, x, 0xEA;
shr.u32 x, odd, 4; and.b32 x, x, 0x07F007F0; lop3.b32 odd, odd, 0x80008000, x, 0xEA;
fma.rn.bf16x2 $0, even, factor, zero;
fma.rn.bf16x2 $1, odd, factor, zero;
}""")


@triton.jit
def quantized_rows(x):
    """Return e4m3 codes of rows `x` float32 [ROWS, N], and their scales' exponents, uint32 [ROWS].

    The exponents are biased.
    """
    largest = absolute_maximum(magnitude(x), 1)
    exponents = power_above(over_448(tl.maximum(largest, 1e-4)))
    return to_e4m3(x * inverse_power(exponents)[:, None]), exponents


@triton.jit
def store_record(x, out_ptr, WIDTH: tl.constexpr, ROPE: tl.constexpr):
    """Store a key `x` float32 [WIDTH] as the record at `out_ptr`."""
    groups: tl.constexpr = WIDTH // ROPE
    x = tl.reshape(x, [groups, ROPE])
    group = tl.arange(0, groups)
    channel = group[:, None] * ROPE + tl.arange(0, ROPE)[None, :]
    codes, exponents = quantized_rows(x)
    is_rotated = channel >= WIDTH - ROPE
    tl.store(out_ptr + channel, codes, mask=is_rotated == 0)
    # bytes WIDTH - ROPE on are the rotated channels
    rope_ptr = (out_ptr + (WIDTH - ROPE)).to(tl.pointer_type(tl.bfloat16)) - (WIDTH - ROPE)
    tl.store(rope_ptr + channel, stored(x, rope_ptr), mask=is_rotated)
    tl.store(out_ptr + WIDTH + ROPE + group, exponents.to(tl.uint8))


@triton.jit
def _scaled_codes(codes, exponents):
    """Return bfloat16 e4m3(codes) x scale for codes [KEYS, GROUPS, N] and their exponents."""
    if _INTERPRETING:
        scales = power_of(exponents.to(tl.uint32))
        return to_bfloat16(e4m3_values(codes, tl.float32) * scales[:, :, None])
    values = tl.inline_asm_elementwise(
        _BFLOAT16, "=r,=r,r", [codes], dtype=tl.bfloat16, is_pure=True, pack=4
    )
    scales = (exponents.to(tl.uint16) << 7).to(tl.bfloat16, bitcast=True)
    return values * scales[:, :, None]


@triton.jit
def load_records(pointers, seen, WIDTH: tl.constexpr, ROPE: tl.constexpr):
    """Return the keys of the records at `pointers` [KEYS], exactly, bfloat16 [KEYS, WIDTH].

    Keys that are not `seen` are 0.
    """
    groups: tl.constexpr = WIDTH // ROPE
    keys: tl.constexpr = pointers.shape[0]
    channel, group, pair = tl.arange(0, WIDTH), tl.arange(0, groups), tl.arange(0, ROPE)
    is_code = seen[:, None] & (channel < WIDTH - ROPE)[None, :]
    codes = tl.load(pointers[:, None] + channel[None, :], mask=is_code, other=0)
    places = pointers[:, None] + (WIDTH + ROPE) + group[None, :]
    exponents = tl.load(places, mask=seen[:, None], other=0)
    rope = (pointers + (WIDTH - ROPE)).to(tl.pointer_type(tl.bfloat16))
    rotated = tl.load(rope[:, None] + pair[None, :], mask=seen[:, None], other=0.0)
    values = _scaled_codes(tl.reshape(codes, [keys, groups, ROPE]), exponents)
    is_rotated = (group == groups - 1)[None, :, None]
    return tl.reshape(tl.where(is_rotated, rotated[:, None, :], values), [keys, WIDTH])


@triton.jit
def store_index_record(x, pool_ptr, row, WIDTH: tl.constexpr, PER_BLOCK: tl.constexpr):
    """Store an entry `x` float32 [PADDED] as row `row` of the indexer's pool."""
    padded: tl.constexpr = x.shape[0]
    codes, exponent = quantized_rows(x[None, :])
    block, entry = row // PER_BLOCK, row % PER_BLOCK
    block_ptr = pool_ptr + block * (PER_BLOCK * (WIDTH + 4))
    channel = tl.arange(0, padded)
    codes_ptr = block_ptr + entry * WIDTH + channel
    tl.store(codes_ptr, tl.reshape(codes, [padded]), mask=channel < WIDTH)
    scales_ptr = (block_ptr + PER_BLOCK * WIDTH).to(tl.pointer_type(tl.float32))
    tl.store(scales_ptr + entry + tl.arange(0, 1), power_of(exponent))
