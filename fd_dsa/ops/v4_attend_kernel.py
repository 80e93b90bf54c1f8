"""Triton kernels of DeepSeek-V4's attention: a window of keys, compressed entries, and sinks.

A key is also the value, with its rotated channels. A head has a sink, the logit of a key without a
value. Queries are multiplied as they are, apart from their rotated channels. Their RMSNorm is a
factor of the scores. The kernel reverts the rotation of the results.
"""

from __future__ import annotations

from fd_dsa.ops.dense_kernels import GROUP, quantized
from fd_dsa.ops.device_functions import stored, to_bfloat16, widened
from fd_dsa.ops.step_kernel import step_kernel
from fd_dsa.ops.v4_records import load_records
from fd_dsa.ops.v4_rotation import load_angles, rotate_rows
from fd_dsa.triton_runtime import start_next, wait_for_inputs

import triton  # isort: skip
import triton.language as tl  # isort: skip

_GROUP = tl.constexpr(GROUP)


@triton.jit
def _narrowed(x, WIDE: tl.constexpr):
    """Round float32 to the type of GEMM operands."""
    return x if tl.float32 == WIDE else to_bfloat16(x)


@triton.jit
def _load_rotated(pointers, mask, WIDTH: tl.constexpr, ROPE: tl.constexpr):
    """Load the rotated channels of keys or queries, and zeros up to the 16 values that a dot has.

    Args:
        pointers: first values, or records, [ROWS].
        mask: rows to load, [ROWS].
    """
    padded: tl.constexpr = max(16, ROPE)
    channel = tl.arange(0, padded)[None, :]
    first = pointers + (WIDTH - ROPE)
    if pointers.dtype.element_ty == tl.uint8:
        # records have them as bfloat16
        first = first.to(tl.pointer_type(tl.bfloat16))
    inside = mask[:, None]
    if padded > ROPE:
        inside &= channel < ROPE
    return tl.load(first[:, None] + channel, mask=inside, other=0.0)


@triton.jit
def _load_keys(
    pointers, seen, WIDTH: tl.constexpr, ROPE: tl.constexpr, PADDED: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """Load keys at `pointers` [KEYS] and their rotated channels, 0 for keys that are not `seen`."""
    # a second load, because a tensor has no slices
    rotated = _load_rotated(pointers, seen, WIDTH, ROPE)
    if pointers.dtype.element_ty == tl.uint8:
        keys = load_records(pointers, seen, WIDTH, ROPE)
    else:
        channel, inside = tl.arange(0, PADDED)[None, :], seen[:, None]
        if PADDED > WIDTH:
            inside &= channel < WIDTH
        keys = tl.load(pointers[:, None] + channel, mask=inside, other=0.0)
    if tl.float32 == WIDE:
        keys, rotated = widened(keys), widened(rotated)
    return keys, rotated


@triton.jit
def _attend(
    queries, state, pointers, seen, WIDTH: tl.constexpr, ROPE: tl.constexpr, PADDED: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """Add a tile of keys at `pointers` [KEYS] to the softmax of the heads."""
    q, rotated_q, factor = queries
    top, total, out = state
    keys, rotated = _load_keys(pointers, seen, WIDTH, ROPE, PADDED, WIDE)
    scores = tl.dot(q, tl.trans(keys), input_precision="ieee")
    scores = tl.dot(rotated_q, tl.trans(rotated), acc=scores, input_precision="ieee")
    scores = tl.where(seen[None, :], scores * factor[:, None], float("-inf"))
    new_top = tl.maximum(top, tl.max(scores, axis=1))
    # 0 if all scores so far are -inf, to avoid a difference of infinities
    base = tl.where(new_top == float("-inf"), 0.0, new_top)
    shrink = tl.exp(top - base)
    weight = tl.exp(scores - base[:, None])
    total = total * shrink + tl.sum(weight, axis=1)
    out = tl.dot(_narrowed(weight, WIDE), keys, acc=out * shrink[:, None], input_precision="ieee")
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
    is_head, of_heads = head < num_heads, q_ptr + token * Q_STRIDE + head * WIDTH
    mask = is_head[:, None] & (channel < WIDTH)[None, :]
    # From memory to the tensor cores without a computed value: Triton keeps those in registers.
    plain = mask & (channel < WIDTH - ROPE)[None, :]
    q = tl.load(of_heads[:, None] + channel[None, :], mask=plain, other=0.0)
    rotated_q = widened(_load_rotated(of_heads, is_head, WIDTH, ROPE))
    wide = widened(q)
    # RMSNorm without a weight, times the factor WIDTH ** -0.5 of the scores
    squares = tl.sum(wide * wide, axis=1) + tl.sum(rotated_q * rotated_q, axis=1)
    factor = 1.0 / tl.sqrt_rn(squares + WIDTH * epsilon)
    cos, sin = load_angles(cos_sin_ptr, position, ROPE, ROPE, rotated_q.shape[1])
    queries = (q, _narrowed(rotate_rows(rotated_q, cos, sin), WIDE), factor)
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
        state = _attend(queries, state, pointers, seen, WIDTH, ROPE, PADDED, WIDE)
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
            state = _attend(queries, state, pointers, seen, WIDTH, ROPE, PADDED, WIDE)
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
        cos, sin = load_angles(cos_sin_ptr, position, WIDTH, ROPE, PADDED)
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
