"""Attention of DeepSeek-V4 on a device: a window of keys, compressed entries, and sinks.

A key is also the value, with its rotated channels. A head has a sink, the logit of a key without a
value. The kernel norms and rotates the queries and reverts the rotation of the results.
"""

from __future__ import annotations

from typing import NamedTuple

from fd_dsa.ops.arrays import dtype_name
from fd_dsa.ops.dense_kernels import empty_beside
from fd_dsa.ops.device_functions import stored, to_bfloat16, widened
from fd_dsa.ops.step_kernel import step_kernel
from fd_dsa.ops.v4_write_kernels import load_angles, rotate_rows
from fd_dsa.tensor import Tensor
from fd_dsa.triton_runtime import next_power_of_2, start_next, wait_for_inputs

import triton  # isort: skip
import triton.language as tl  # isort: skip

# query heads and keys that are multiplied at a time
_HEADS = 16
_KEYS = {"float32": 16, "bfloat16": 32}


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
    """Window keys of a layer.

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
        pool: [num_blocks, entries of a block, width].
        ratio: tokens of an entry.
        slots: int32 [num_tokens, topk], selected entries as slots of the pool; None = all entries.
    """

    pool: Tensor
    ratio: int
    slots: Tensor | None = None


@triton.jit
def _narrowed(x, WIDE: tl.constexpr):
    """Round float32 to the type of GEMM operands."""
    return x if tl.float32 == WIDE else to_bfloat16(x)


@triton.jit
def _attend(
    q, state, pointers, seen, WIDTH: tl.constexpr, PADDED: tl.constexpr, WIDE: tl.constexpr
):
    """Add a tile of keys [KEYS, PADDED] at `pointers` [KEYS] to the softmax of the heads."""
    top, total, out = state
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


@step_kernel(waits=True)
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
    num_heads,
    table_width,
    topk,
    epsilon,
    WIDTH: tl.constexpr,
    ROPE: tl.constexpr,
    WINDOW: tl.constexpr,
    RING: tl.constexpr,
    RATIO: tl.constexpr,
    PER_BLOCK: tl.constexpr,
    HEADS: tl.constexpr,
    KEYS: tl.constexpr,
    PADDED: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Attend for token `program 0` and the heads of group `program 1`."""
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
    place = (token * num_heads + head)[:, None] * WIDTH + channel[None, :]
    cos, sin = load_angles(cos_sin_ptr, position, WIDTH, ROPE, PADDED)
    q = widened(tl.load(q_ptr + place, mask=mask, other=0.0))
    # RMSNorm without a weight, times the factor WIDTH ** -0.5 of the scores
    q = q * (1.0 / tl.sqrt_rn(tl.sum(q * q, axis=1) + WIDTH * epsilon))[:, None]
    q = _narrowed(rotate_rows(q, cos, sin), WIDE)
    top = tl.full([HEADS], float("-inf"), tl.float32)
    state = (top, tl.zeros([HEADS], tl.float32), tl.zeros([HEADS, PADDED], tl.float32))
    seen_by = tl.where(live, position + 1, 0)
    oldest = tl.maximum(seen_by - WINDOW, 0)
    for first in range(oldest, seen_by, KEYS):
        at = first + tl.arange(0, KEYS)
        seen, is_own = at < seen_by, at >= begin
        own = tl.where(is_own, token - (position - at), 0)
        kept = tl.where(is_own, 0, row.to(tl.int64) * RING + at % RING)
        pointers = tl.where(is_own, keys_ptr + own * WIDTH, ring_ptr + kept * WIDTH)
        state = _attend(q, state, pointers, seen, WIDTH, PADDED, WIDE)
    if pool_ptr is not None:
        visible = seen_by // RATIO
        if slots_ptr is not None:
            visible = tl.minimum(visible, topk)
        for first in range(0, visible, KEYS):
            entry = first + tl.arange(0, KEYS)
            seen = entry < visible
            if slots_ptr is not None:
                slot = tl.load(slots_ptr + token * topk + entry, mask=seen, other=-1)
            else:
                cell = block_table_ptr + row.to(tl.int64) * table_width + entry // PER_BLOCK
                slot = tl.load(cell, mask=seen, other=-1) * PER_BLOCK + entry % PER_BLOCK
            seen = seen & (slot >= 0)
            pointers = pool_ptr + tl.maximum(slot, 0).to(tl.int64) * WIDTH
            state = _attend(q, state, pointers, seen, WIDTH, PADDED, WIDE)
    top, total, out = state
    sink = tl.load(sinks_ptr + head, mask=head < num_heads, other=0.0)
    highest = tl.maximum(top, sink)
    shrink = tl.exp(top - highest)
    out = out * (shrink / (total * shrink + tl.exp(sink - highest)))[:, None]
    out = rotate_rows(out, cos, -sin)
    tl.store(out_ptr + place, stored(out, out_ptr), mask=mask)


def attend_v4(
    q: Tensor,
    windows: Windows,
    entries: Entries | None,
    sinks: Tensor,
    cos_sin: Tensor,
    places: TokenPlaces,
    epsilon: float,
) -> Tensor:
    """Attend to the window and the entries of each token, [num_tokens, num_heads, width].

    Args:
        q: float32 or bfloat16 [num_tokens, num_heads, width], contiguous; neither normed nor
            rotated.
        entries: None in a layer with windows only.
        sinks: float32 [num_heads].
        cos_sin: float32 [num_positions, rotated channels], the last ones of a head; cos, then sin.
        epsilon: term added to the mean square of a query.

    Cost: one launch. GEMM operands have the type of `q`, sums are in float32.
    """
    tokens, heads, width = q.shape
    out, kind = empty_beside(q, tokens, heads, width), dtype_name(q.dtype)
    pool, ratio, slots = entries or (None, 1, None)
    if tokens:
        attend_v4_kernel[tokens, -(-heads // _HEADS)](
            q, windows.keys, windows.ring, pool, slots, sinks, cos_sin, *places, out, heads,
            places.block_table.shape[1], 0 if slots is None else slots.shape[1], epsilon,
            WIDTH=width, ROPE=cos_sin.shape[1], WINDOW=windows.size, RING=windows.ring_rows,
            RATIO=ratio, PER_BLOCK=1 if pool is None else pool.shape[1], HEADS=_HEADS,
            KEYS=_KEYS[kind], PADDED=max(16, next_power_of_2(width)),
            WIDE=tl.float32 if kind == "float32" else tl.bfloat16, num_warps=4,
        )  # fmt: skip
    return out
