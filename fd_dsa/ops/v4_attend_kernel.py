"""Attention of DeepSeek-V4 on a device: a window of keys, compressed entries, and sinks.

A key is also the value, with its rotated channels. A head has a sink, the logit of a key without a
value. The kernel norms and rotates the queries and reverts the rotation of the results.

In a step with few tokens the keys of a token are split among programs until they fill the device. A
second launch combines the partial results of the splits, in their order.
"""

from __future__ import annotations

from typing import NamedTuple

from fd_dsa.device.allocation import Allocate
from fd_dsa.ops.arrays import dtype_name
from fd_dsa.ops.dense_kernels import (
    GROUP,
    empty_beside,
    empty_fp8_rows,
    kernel_arguments,
    quantized,
)
from fd_dsa.ops.device_functions import stored, to_bfloat16, widened
from fd_dsa.ops.mla.tensor_core import COMBINE_CONFIGS, MAX_SPLITS, Partials
from fd_dsa.ops.split_sums import rows_of_tiles
from fd_dsa.ops.step_kernel import step_kernel
from fd_dsa.ops.v4_records import load_records
from fd_dsa.ops.v4_rotation import load_angles, rotate_rows
from fd_dsa.tensor import Fp8Rows, Tensor
from fd_dsa.triton_runtime import next_power_of_2, start_next, wait_for_inputs

import triton  # isort: skip
import triton.language as tl  # isort: skip

# query heads and keys that are multiplied at a time
_HEADS = 16
# heads of a program where tokens alone fill a GPU, and their least number: a key is read less often
_MANY_HEADS, _MANY_TOKENS = 64, 256
_KEYS = {"float32": 16, "bfloat16": 32}
_GROUP = tl.constexpr(GROUP)
# programs that an H100 or H200 runs at once: two of a multiprocessor
_PROGRAMS = 256


class TokenPlaces(NamedTuple):
    """Places of a step's tokens, int32, see `fd_dsa.v4_prepare.V4Arrays`.

    Attributes:
        positions, rows: [num_tokens or more], position and row, -1 = padding.
        starts: [num_rows + 1], first token of each row.
        block_table: [num_rows, columns].
    """

    positions: Tensor
    rows: Tensor
    starts: Tensor
    block_table: Tensor


class Windows(NamedTuple):
    """Window keys of a layer, or their FP8 records (uint8, see `v4_records.py`).

    Attributes:
        keys: [num_tokens, width], keys of the step's tokens.
        ring: [num_rows * ring_rows, width], older keys by position modulo `ring_rows`.
        ring_rows, size: keys of a row's ring, and keys that a token sees with its own.
    """

    keys: Tensor
    ring: Tensor
    ring_rows: int
    size: int


class Entries(NamedTuple):
    """Compressed entries of a layer.

    Attributes:
        pool: [num_blocks, entries of a block, width], or their FP8 records.
        ratio: tokens of an entry.
        slots: int32 [num_tokens, topk], selected entries as slots of the pool; None = all entries.
    """

    pool: Tensor
    ratio: int
    slots: Tensor | None = None


def new_partials(width: int, allocate: Allocate) -> Partials:
    """Allocate memory for splits, which suffices for every step."""
    rows = _PROGRAMS * _HEADS
    return Partials(allocate((rows * width,), "float32"), allocate((rows,), "float32"))


def partial_bytes(width: int) -> int:
    """Return the bytes that `new_partials` allocates."""
    return 4 * _PROGRAMS * _HEADS * (width + 1)


def num_splits(num_tokens: int, num_heads: int, max_tiles: int) -> int:
    """Return the number of programs that share the keys of a token.

    All numbers of tokens between two powers of two have the same. So a captured step with padding
    has the bits of the step without.

    Args:
        num_tokens, num_heads: shape of the queries.
        max_tiles: maximum number of tiles of a token's keys.
    """
    programs = -(-num_heads // _HEADS) * next_power_of_2(rows_of_tiles(num_tokens))
    return max(1, min(MAX_SPLITS, max_tiles, _PROGRAMS // programs))


@triton.jit
def _narrowed(x, WIDE: tl.constexpr):
    """Round float32 to the type of GEMM operands."""
    return x if tl.float32 == WIDE else to_bfloat16(x)


@triton.jit
def _attend(
    q, state, pointers, seen, WIDTH: tl.constexpr, ROPE: tl.constexpr, PADDED: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """Add a tile of keys [KEYS, PADDED] at `pointers` [KEYS] to the softmax of the heads."""
    top, total, out = state
    if pointers.dtype.element_ty == tl.uint8:
        key = load_records(pointers, seen, WIDTH, ROPE)
        key = widened(key) if tl.float32 == WIDE else key
    else:
        channel = tl.arange(0, PADDED)
        mask = seen[:, None] & (channel < WIDTH)[None, :]
        key = tl.load(pointers[:, None] + channel[None, :], mask=mask, other=0.0)
    scores = tl.dot(q, tl.trans(key), input_precision="ieee")
    scores = tl.where(seen[None, :], scores, float("-inf"))
    new_top = tl.maximum(top, tl.max(scores, axis=1))
    # 0 if all scores so far are -inf, to avoid a difference of infinities
    base = tl.where(new_top == float("-inf"), 0.0, new_top)
    shrink = tl.exp(top - base)
    weight = tl.where(seen[None, :], tl.exp(scores - base[:, None]), 0.0)
    total = total * shrink + tl.sum(weight, axis=1)
    out = tl.dot(_narrowed(weight, WIDE), key, acc=out * shrink[:, None], input_precision="ieee")
    return new_top, total, out


@triton.jit
def _store_heads(
    x, token, head, heads, mask, out_ptr, codes_ptr, scales_ptr, scale_stride, WIDTH: tl.constexpr,
    ROUND_SCALES: tl.constexpr, first=0,
):  # fmt: skip
    """Store channels from `first` on of a token's heads, float32 [HEADS, CHANNELS], or quantise."""
    channels: tl.constexpr = x.shape[1]
    place = (token * heads + head)[:, None] * WIDTH + first + tl.arange(0, channels)[None, :]
    if out_ptr is not None:
        tl.store(out_ptr + place, stored(x, out_ptr), mask=mask)
    else:
        # the values that a result without FP8 has
        rounded = widened(to_bfloat16(x))
        num_heads: tl.constexpr = x.shape[0]
        groups: tl.constexpr = channels // _GROUP
        of_groups = tl.reshape(rounded, [num_heads * groups, _GROUP])
        codes, scales = quantized(of_groups, ROUND_SCALES)
        tl.store(codes_ptr + place, tl.reshape(codes, [num_heads, channels]), mask=mask)
        group = first // _GROUP + tl.arange(0, groups)
        number = head[:, None] * (WIDTH // _GROUP) + group[None, :]
        to = scales_ptr + number * scale_stride + token
        inside = (head < heads)[:, None] & (group < WIDTH // _GROUP)[None, :]
        tl.store(to, tl.reshape(scales, [num_heads, groups]), mask=inside)


@step_kernel(strided=("q_ptr",), waits=True)
def attend_v4_kernel(
    q_ptr,
    keys_ptr,
    ring_ptr,
    pool_ptr,
    slots_ptr,
    sinks_ptr,
    cos_sin_ptr,
    positions_ptr,
    rows_ptr,
    starts_ptr,
    block_table_ptr,
    out_ptr,
    codes_ptr,
    scales_ptr,
    scale_stride,
    values_ptr,
    lse_ptr,
    num_heads,
    table_width,
    topk,
    epsilon,
    Q_STRIDE: tl.constexpr,
    WIDTH: tl.constexpr,
    ROPE: tl.constexpr,
    ROW: tl.constexpr,
    WINDOW: tl.constexpr,
    RING: tl.constexpr,
    RATIO: tl.constexpr,
    PER_BLOCK: tl.constexpr,
    HEADS: tl.constexpr,
    KEYS: tl.constexpr,
    PADDED: tl.constexpr,
    WIDE: tl.constexpr,
    ROUND_SCALES: tl.constexpr,
):
    """Attend for token `program 0` and the heads of group `program 1`, to split `program 2`.

    A split is a run of tiles, of which those of the window come first.
    """
    wait_for_inputs()
    start_next()
    token = tl.program_id(0).to(tl.int64)
    row = tl.load(rows_ptr + token)
    live = row >= 0
    row = tl.maximum(row, 0)
    position = tl.load(positions_ptr + token)
    # position of the row's first token in this step
    begin = position - (token - tl.load(starts_ptr + row)).to(tl.int32)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    channel = tl.arange(0, PADDED)
    mask = (head < num_heads)[:, None] & (channel < WIDTH)[None, :]
    cos, sin = load_angles(cos_sin_ptr, position, WIDTH, ROPE, PADDED)
    q_ptr += token * Q_STRIDE
    q = widened(tl.load(q_ptr + head[:, None] * WIDTH + channel[None, :], mask=mask, other=0.0))
    # RMSNorm without a weight, times the factor WIDTH ** -0.5 of the scores
    q = q * (1.0 / tl.sqrt_rn(tl.sum(q * q, axis=1) + WIDTH * epsilon))[:, None]
    q = _narrowed(rotate_rows(q, cos, sin), WIDE)
    top = tl.full([HEADS], float("-inf"), tl.float32)
    state = (top, tl.zeros([HEADS], tl.float32), tl.zeros([HEADS, PADDED], tl.float32))
    seen_by = tl.where(live, position + 1, 0)
    oldest = tl.maximum(seen_by - WINDOW, 0)
    tiles_of_window = tl.cdiv(seen_by - oldest, KEYS)
    tiles, visible = tiles_of_window, 0
    if pool_ptr is not None:
        visible = seen_by // RATIO
        if slots_ptr is not None:
            visible = tl.minimum(visible, topk)
        tiles += tl.cdiv(visible, KEYS)
    # The compiler vectorises loads at offsets with a known divisor, not at selected pointers. So
    # all tensors are at offsets from one pointer, in units that divide every address. Triton 3.6
    # takes the divisor of the first of neighbouring offsets in one tensor for all.
    size: tl.constexpr = keys_ptr.dtype.element_ty.primitive_bitwidth // 8
    unit: tl.constexpr = min(16, ROW * size & -(ROW * size))
    row_units: tl.constexpr = ROW * size // unit
    ring_units = (ring_ptr.to(tl.int64) - keys_ptr.to(tl.int64)) // unit
    splits = tl.num_programs(2)
    tiles_of_split = tl.cdiv(tiles, splits)
    tile = tl.program_id(2) * tiles_of_split
    start = oldest + tile * KEYS
    for first in range(start, tl.minimum(start + tiles_of_split * KEYS, seen_by), KEYS):
        at = first + tl.arange(0, KEYS)
        seen, is_own = at < seen_by, at >= begin
        own = (token - (position - at)) * row_units
        kept = ring_units + (row.to(tl.int64) * RING + at % RING) * row_units
        pointers = keys_ptr + tl.where(is_own, own, kept) * (unit // size)
        state = _attend(q, state, pointers, seen, WIDTH, ROPE, PADDED, WIDE)
    if pool_ptr is not None:
        pool_units = (pool_ptr.to(tl.int64) - keys_ptr.to(tl.int64)) // unit
        tile -= tiles_of_window
        end = tl.minimum((tile + tiles_of_split) * KEYS, visible)
        for first in range(tl.maximum(tile, 0) * KEYS, end, KEYS):
            entry = first + tl.arange(0, KEYS)
            seen = entry < visible
            if slots_ptr is not None:
                slot = tl.load(slots_ptr + token * topk + entry, mask=seen, other=-1)
            else:
                cell = block_table_ptr + row.to(tl.int64) * table_width + entry // PER_BLOCK
                slot = tl.load(cell, mask=seen, other=-1) * PER_BLOCK + entry % PER_BLOCK
            seen = seen & (slot >= 0)
            place = pool_units + slot.to(tl.int64) * row_units
            pointers = keys_ptr + tl.where(seen, place, 0) * (unit // size)
            state = _attend(q, state, pointers, seen, WIDTH, ROPE, PADDED, WIDE)
    top, total, out = state
    if lse_ptr is not None:
        part = (token * num_heads + head) * splits + tl.program_id(2)
        mask = mask & (total != 0.0)[:, None]
        total = tl.where(total == 0.0, 1.0, total)
        tl.store(lse_ptr + part, top + tl.log(total), mask=head < num_heads)
        to = values_ptr + part[:, None] * WIDTH + channel[None, :]
        tl.store(to, out * (1.0 / total)[:, None], mask=mask)
    else:
        sink = tl.load(sinks_ptr + head, mask=head < num_heads, other=0.0)
        highest = tl.maximum(top, sink)
        shrink = tl.exp(top - highest)
        out = out * (shrink / (total * shrink + tl.exp(sink - highest)))[:, None]
        out = rotate_rows(out, cos, -sin)
        _store_heads(
            out, token, head, num_heads, mask, out_ptr, codes_ptr, scales_ptr, scale_stride, WIDTH,
            ROUND_SCALES,
        )  # fmt: skip


@step_kernel(waits=True)
def combine_v4_kernel(
    values_ptr,
    lse_ptr,
    sinks_ptr,
    cos_sin_ptr,
    positions_ptr,
    out_ptr,
    codes_ptr,
    scales_ptr,
    scale_stride,
    num_heads,
    splits,
    WIDTH: tl.constexpr,
    ROPE: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROUND_SCALES: tl.constexpr,
):
    """Combine columns `program 1` of token and head `program 0` from the splits and the sink."""
    wait_for_inputs()
    start_next()
    row = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * COLUMNS
    channel, split = first + tl.arange(0, COLUMNS), tl.arange(0, MAX_SPLITS)
    part = row * splits + split
    lse = tl.load(lse_ptr + part, mask=split < splits, other=float("-inf"))
    mask = (lse != float("-inf"))[:, None] & (channel < WIDTH)[None, :]
    place = values_ptr + part[:, None] * WIDTH + channel[None, :]
    values = tl.load(place, mask=mask, other=0.0)
    sink = tl.load(sinks_ptr + row % num_heads)
    highest = tl.maximum(tl.max(lse, axis=0), sink)
    share = tl.exp(lse - highest)
    total = tl.sum(share, axis=0) + tl.exp(sink - highest)
    out = tl.sum(values * share[:, None], axis=0) / total
    position = tl.load(positions_ptr + row // num_heads)
    cos, sin = load_angles(cos_sin_ptr, position, WIDTH, ROPE, COLUMNS, first)
    head = (row % num_heads).to(tl.int32) + tl.arange(0, 1)
    _store_heads(
        rotate_rows(out[None, :], cos, -sin), row // num_heads, head, num_heads,
        (channel < WIDTH)[None, :], out_ptr, codes_ptr, scales_ptr, scale_stride, WIDTH,
        ROUND_SCALES, first,
    )  # fmt: skip


def attend_v4(
    q: Tensor,
    windows: Windows,
    entries: Entries | None,
    sinks: Tensor,
    cos_sin: Tensor,
    places: TokenPlaces,
    epsilon: float,
    partials: Partials | None = None,
    round_scales: bool | None = None,
) -> Tensor | Fp8Rows:
    """Attend to the window and the entries of each token, [num_tokens, num_heads * width].

    Args:
        q: float32 or bfloat16 [num_tokens, num_heads * width], neither normed nor rotated; there
            may be gaps between rows.
        entries: None in a layer with windows only.
        sinks: float32 [num_heads].
        cos_sin: float32 [num_positions, rotated channels], the last ones of a head; cos, then sin.
        epsilon: term added to the mean square of a query.
        partials: memory for splits; None = no splits.
        round_scales: None returns the type of `q`. Otherwise the result is Fp8Rows with such
            scales; the width is then a multiple of 128.

    Cost: one or two launches. GEMM operands have the type of `q`, sums are in float32.
    """
    (tokens, columns), heads, kind = q.shape, sinks.shape[0], dtype_name(q.dtype)
    width = columns // heads
    out = (empty_beside if round_scales is None else empty_fp8_rows)(q, tokens, columns)
    form = {"ROPE": cos_sin.shape[1], "WIDTH": width, "ROUND_SCALES": bool(round_scales)}
    if not tokens:
        return out
    pool, ratio, slots = entries or (None, 1, None)
    keys, padded = _KEYS[kind], max(16, next_power_of_2(width))
    per_block, in_table = 1 if pool is None else pool.shape[1], places.block_table.shape[1]
    # of rows of any length
    num_entries = 0 if pool is None else in_table * per_block
    max_tiles = -(-windows.size // keys) + -(-num_entries // keys)
    splits = num_splits(tokens, heads, max_tiles) if partials else 1
    (values, lse), together = partials if partials and splits > 1 else (None, None), _HEADS
    if partials and kind == "bfloat16" and rows_of_tiles(tokens) >= _MANY_TOKENS:
        together = max(_HEADS, min(_MANY_HEADS, next_power_of_2(heads)))
    # only loads of 16 bytes are faster ahead of the dots
    stages = 3 if together > _HEADS and windows.keys.dtype == q.dtype else 1
    wide = tl.float32 if kind == "float32" else tl.bfloat16
    launch = {"num_warps": 4 if together <= _HEADS else 8, "num_stages": stages}
    attend_v4_kernel[tokens, -(-heads // together), splits](
        q, windows.keys, windows.ring, pool, slots, sinks, cos_sin, *places,
        *kernel_arguments(out), values, lse, heads, in_table,
        0 if slots is None else slots.shape[1], epsilon, Q_STRIDE=q.strides[0],
        ROW=windows.keys.shape[1], WINDOW=windows.size, RING=windows.ring_rows, RATIO=ratio,
        PER_BLOCK=per_block, HEADS=together, KEYS=keys, PADDED=padded, WIDE=wide, **launch, **form,
    )  # fmt: skip
    if splits > 1:
        max_splits, channels, warps = next(x for x in COMBINE_CONFIGS if x[0] >= splits)
        channels = min(channels, padded)
        combine_v4_kernel[tokens * heads, padded // channels](
            values, lse, sinks, cos_sin, places.positions, *kernel_arguments(out), heads, splits,
            MAX_SPLITS=max_splits, COLUMNS=channels, num_warps=warps, **form,
        )  # fmt: skip
    return out
