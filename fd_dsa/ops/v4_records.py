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
    to_e4m3,
    widened,
)

import triton  # isort: skip
import triton.language as tl  # isort: skip


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
def load_records(pointers, seen, WIDTH: tl.constexpr, ROPE: tl.constexpr):
    """Return the keys of the records at `pointers` [KEYS], float32 [KEYS, WIDTH].

    Keys that are not `seen` are 0.
    """
    groups: tl.constexpr = WIDTH // ROPE
    keys: tl.constexpr = pointers.shape[0]
    channel, group, pair = tl.arange(0, WIDTH), tl.arange(0, groups), tl.arange(0, ROPE)
    is_code = seen[:, None] & (channel < WIDTH - ROPE)[None, :]
    codes = tl.load(pointers[:, None] + channel[None, :], mask=is_code, other=0)
    places = pointers[:, None] + (WIDTH + ROPE) + group[None, :]
    exponents = tl.load(places, mask=seen[:, None], other=0).to(tl.uint32)
    rope = (pointers + (WIDTH - ROPE)).to(tl.pointer_type(tl.bfloat16))
    rotated = tl.load(rope[:, None] + pair[None, :], mask=seen[:, None], other=0.0)
    values = tl.reshape(e4m3_values(codes, tl.float32), [keys, groups, ROPE])
    values = values * power_of(exponents)[:, :, None]
    is_rotated = (group == groups - 1)[None, :, None]
    values = tl.where(is_rotated, widened(rotated)[:, None, :], values)
    return tl.reshape(values, [keys, WIDTH])


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
