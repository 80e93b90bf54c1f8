"""Kernels for sparse MLA on tensor cores: bfloat16 queries over FP8 records or bfloat16 latents.

A program attends for one token, a group of heads and a share of the token's entries, its split. It
applies an online softmax over tiles of keys. Each tile of latents is loaded to shared memory once,
for the scores and for the result. A second launch combines the partial results of the splits, in
their order.

Source: the online softmax over splits is that of Flash-Decoding (Dao et al. 2023).
"""

from __future__ import annotations

from fd_dsa.ops.device_functions import stored, to_bfloat16
from fd_dsa.ops.mla.tiles import (
    RANK,
    ROPE,
    bfloat16_pairs,
    half_range,
    largest,
    last_entry,
    latent_order,
    latents,
    load_keys,
    load_query,
    of_heads,
    product,
    slots_at,
    softmax_step,
    store_tile,
    weighted,
    zeros,
)
from fd_dsa.ops.step_kernel import step_kernel
from fd_dsa.triton_runtime import start_next, wait_for_inputs

import triton  # isort: skip
import triton.language as tl  # isort: skip

_RANK, _WIDTH = tl.constexpr(RANK), tl.constexpr(RANK + ROPE)
_LN_2 = tl.constexpr(0.6931471805599453)
# entries of a row that are checked at a time, in the search for the last slot
_LOOK = tl.constexpr(1024)


@triton.jit
def _place(groups, splits, num_heads, BLOCK_H: tl.constexpr):
    """Return token, heads, a mask of valid heads and split of a program, tokens in order."""
    program = tl.program_id(0)
    split = program % splits
    program = program // splits
    head = program % groups * BLOCK_H + tl.arange(0, BLOCK_H)
    return (program // groups).to(tl.int64), head, head < num_heads, split


@triton.jit
def _finish(
    out_ptr, lse_ptr, partial_ptr, partial_lse_ptr, row, is_head, split, splits, column,
    o0, o1, o2, o3, top, total, SWAPPED: tl.constexpr,
):  # fmt: skip
    """Store the result of rows [heads], or the partial result of this split."""
    if SWAPPED:
        total = tl.sum(total, 0)
    factor = 1.0 / tl.where(total == 0.0, 1.0, total)
    # -inf without a key
    lse = top + tl.log2(tl.where(total == 0.0, 1.0, total))
    if partial_ptr is not None:
        row = row * splits + split
        tl.store(partial_lse_ptr + row, lse, mask=is_head)
        to = partial_ptr + row * _RANK
    else:
        if lse_ptr is not None:
            tl.store(lse_ptr + row, lse * _LN_2, mask=is_head)
        to = out_ptr + row * _RANK
    store_tile(to, is_head, column, 0, o0, factor, SWAPPED)
    store_tile(to, is_head, column, 128, o1, factor, SWAPPED)
    store_tile(to, is_head, column, 256, o2, factor, SWAPPED)
    store_tile(to, is_head, column, 384, o3, factor, SWAPPED)


@triton.jit
def _scores(
    k0, k1, k2, k3, k_rope, q0, q1, q2, q3, q_rope, latent_factor, rope_factor,
    SWAPPED: tl.constexpr,
):  # fmt: skip
    """Return the scores of a tile.

    The GEMMs are added here, because Triton runs GEMMs that accumulate onto each other on fewer
    warps than there are.
    """
    scores = product(k0, q0, SWAPPED) * latent_factor
    scores += product(k1, q1, SWAPPED) * latent_factor
    scores += product(k2, q2, SWAPPED) * latent_factor
    scores += product(k3, q3, SWAPPED) * latent_factor
    return scores + product(k_rope, q_rope, SWAPPED) * rope_factor


@triton.jit
def _accumulate(
    k0, k1, k2, k3, scores, seen, top, total, o0, o1, o2, o3,
    FP8: tl.constexpr, SWAPPED: tl.constexpr,
):  # fmt: skip
    """Return the state of the softmax after a tile."""
    weight, shrink, top, total = softmax_step(scores, seen, top, total, SWAPPED)
    weight = weight.to(tl.float16) if FP8 else to_bfloat16(weight)
    o0 = weighted(k0, weight, o0, shrink, SWAPPED)
    o1 = weighted(k1, weight, o1, shrink, SWAPPED)
    o2 = weighted(k2, weight, o2, shrink, SWAPPED)
    o3 = weighted(k3, weight, o3, shrink, SWAPPED)
    return top, total, o0, o1, o2, o3


@triton.jit
def _start(BLOCK_H: tl.constexpr, BLOCK_N: tl.constexpr, SWAPPED: tl.constexpr):
    """Return the state of the softmax before the first tile."""
    top = tl.full([BLOCK_H], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_N, BLOCK_H], tl.float32) if SWAPPED else tl.zeros([BLOCK_H], tl.float32)
    o0, o1 = zeros(128, BLOCK_H, SWAPPED), zeros(128, BLOCK_H, SWAPPED)
    return top, total, o0, o1, zeros(128, BLOCK_H, SWAPPED), zeros(128, BLOCK_H, SWAPPED)


@triton.jit
def _load_queries(query, is_head, column, SWAPPED: tl.constexpr):
    """Load the query operands of the four tiles of latents and of the rotated values."""
    q0 = load_query(query, is_head, column, 0, SWAPPED)
    q1 = load_query(query, is_head, column, 128, SWAPPED)
    q2 = load_query(query, is_head, column, 256, SWAPPED)
    q3 = load_query(query, is_head, column, 384, SWAPPED)
    return q0, q1, q2, q3, load_query(query, is_head, tl.arange(0, 64), _RANK, SWAPPED)


@triton.jit
def _float16_queries(q0, q1, q2, q3, SWAPPED: tl.constexpr):
    """Scale queries to float16. Return them, and the factor [heads] that undoes the scaling."""
    top = tl.maximum(largest(q0, SWAPPED), largest(q1, SWAPPED))
    top = tl.maximum(top, tl.maximum(largest(q2, SWAPPED), largest(q3, SWAPPED)))
    up, back = half_range(top)
    up = of_heads(up, SWAPPED)
    q0, q1 = (q0 * up).to(tl.float16), (q1 * up).to(tl.float16)
    return q0, q1, (q2 * up).to(tl.float16), (q3 * up).to(tl.float16), back


@triton.jit
def _bfloat16_keys(key, seen, column, first: tl.constexpr):
    """Load keys at `key` [keys] from a bfloat16 or int16 cache: bfloat16 [keys, columns]."""
    x = tl.load(key[:, None] + first + column[None, :], mask=seen[:, None], other=0)
    if x.dtype == tl.int16:
        x = x.to(tl.bfloat16, bitcast=True)
    return x


@step_kernel(waits=True)
def attend_kernel(
    q_ptr,
    cache_ptr,
    slots_ptr,
    out_ptr,
    lse_ptr,
    partial_ptr,
    partial_lse_ptr,
    scale_log2,
    topk,
    num_heads,
    num_slots,
    groups,
    splits,
    entries,
    BLOCK_H: tl.constexpr,
    BLOCK_N: tl.constexpr,
    COPIED: tl.constexpr,
    FP8: tl.constexpr,
    SWAPPED: tl.constexpr,
):
    """Attend for one token, a group of heads and a split.

    Keys pass through registers, one tile ahead. With COPIED, for few heads, the hardware copies
    bfloat16 latents to shared memory some tiles ahead.

    With FP8 latents become float16, which represents codes times scales more exactly than bfloat16.
    A power of two for each head brings the queries into its range. The rotated part stays bfloat16.
    """
    wait_for_inputs()
    token, head, is_head, split = _place(groups, splits, num_heads, BLOCK_H)
    row = token * num_heads + head
    column = latent_order(FP8)
    if COPIED:
        rope_column = tl.arange(0, 64)
    query = q_ptr + row * _WIDTH
    q0, q1, q2, q3, q_rope = _load_queries(query, is_head, column, SWAPPED)
    slots_ptr += token * topk
    begin = split * entries
    end = last_entry(slots_ptr, begin, tl.minimum(begin + entries, topk), num_slots, _LOOK)
    if COPIED:
        top, total, o0, o1, o2, o3 = _start(BLOCK_H, BLOCK_N, SWAPPED)
        for start in range(begin, end, BLOCK_N):
            slot, seen = slots_at(slots_ptr, start + tl.arange(0, BLOCK_N), end, num_slots)
            key = cache_ptr + slot.to(tl.int64) * _WIDTH
            k0 = _bfloat16_keys(key, seen, column, 0)
            k1 = _bfloat16_keys(key, seen, column, 128)
            k2 = _bfloat16_keys(key, seen, column, 256)
            k3 = _bfloat16_keys(key, seen, column, 384)
            k_rope = _bfloat16_keys(key, seen, rope_column, _RANK)
            scores = _scores(
                k0, k1, k2, k3, k_rope, q0, q1, q2, q3, q_rope, scale_log2, scale_log2, SWAPPED
            )
            top, total, o0, o1, o2, o3 = _accumulate(
                k0, k1, k2, k3, scores, seen, top, total, o0, o1, o2, o3, FP8, SWAPPED
            )
    else:
        slot, seen = slots_at(slots_ptr, begin + tl.arange(0, BLOCK_N), end, num_slots)
        x0, x1, x2, x3, x_rope, scales = load_keys(cache_ptr, slot, seen, FP8)
        latent_factor = scale_log2
        if FP8:
            q0, q1, q2, q3, back = _float16_queries(q0, q1, q2, q3, SWAPPED)
            latent_factor = of_heads(back, SWAPPED) * scale_log2
        top, total, o0, o1, o2, o3 = _start(BLOCK_H, BLOCK_N, SWAPPED)
        # 1, in a form that the compiler does not see through. Triton keeps the left operand of a
        # GEMM in shared memory if the operand enters a loop, but not if it was just made. And it
        # distributes scores to all warps unless it sees that another GEMM needs them
        once = 1 + (tl.program_id(0) >> 31)
        for start in range(begin, end, BLOCK_N):
            k0, k1 = latents(x0, scales, 0, FP8), latents(x1, scales, 1, FP8)
            k2, k3 = latents(x2, scales, 2, FP8), latents(x3, scales, 3, FP8)
            scores = zeros(BLOCK_N, BLOCK_H, SWAPPED)
            for i in range(once):
                # made here, so that it is an operand in registers. Otherwise weights follow it in
                # shared memory, and ptxas of CUDA 12.8 loses the address of operands there
                k_rope = bfloat16_pairs(x_rope)
                scores += _scores(
                    k0, k1, k2, k3, k_rope, q0, q1, q2, q3, q_rope, latent_factor, scale_log2,
                    SWAPPED,
                )  # fmt: skip
                if SWAPPED:
                    here = start + i + tl.arange(0, BLOCK_N)
                    _, live = slots_at(slots_ptr, here, end, num_slots)
                    slot, seen = slots_at(slots_ptr, here + BLOCK_N, end, num_slots)
                    x0, x1, x2, x3, x_rope, scales = load_keys(cache_ptr, slot, seen, FP8)
                    top, total, o0, o1, o2, o3 = _accumulate(
                        k0, k1, k2, k3, scores, live, top, total, o0, o1, o2, o3, FP8, SWAPPED
                    )
                    k0, k1 = tl.zeros_like(k0), tl.zeros_like(k1)
                    k2, k3 = tl.zeros_like(k2), tl.zeros_like(k3)
            if not SWAPPED:
                here = start + tl.arange(0, BLOCK_N)
                _, live = slots_at(slots_ptr, here, end, num_slots)
                slot, seen = slots_at(slots_ptr, here + BLOCK_N, end, num_slots)
                x0, x1, x2, x3, x_rope, scales = load_keys(cache_ptr, slot, seen, FP8)
                top, total, o0, o1, o2, o3 = _accumulate(
                    k0, k1, k2, k3, scores, live, top, total, o0, o1, o2, o3, FP8, SWAPPED
                )
    start_next()
    _finish(
        out_ptr, lse_ptr, partial_ptr, partial_lse_ptr, row, is_head, split, splits, column,
        o0, o1, o2, o3, top, total, SWAPPED,
    )  # fmt: skip


@step_kernel(waits=True)
def combine_kernel(
    partial_ptr,
    partial_lse_ptr,
    out_ptr,
    lse_ptr,
    splits,
    MAX_SPLITS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Combine some columns of one token and head from the partial results of the splits."""
    wait_for_inputs()
    start_next()
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    split = tl.arange(0, MAX_SPLITS)
    is_split = split < splits
    part = partial_ptr + (row * splits + split)[:, None] * _RANK + column[None, :]
    values = tl.load(part, mask=is_split[:, None], other=0.0)
    lse = tl.load(partial_lse_ptr + row * splits + split, mask=is_split, other=float("-inf"))
    top = tl.max(lse, 0)
    base = tl.where(top == float("-inf"), 0.0, top)
    share = tl.exp2(lse - base)
    total = tl.sum(share, 0)
    factor = 1.0 / tl.where(total == 0.0, 1.0, total)
    out = tl.sum(values * share[:, None], 0) * factor
    tl.store(out_ptr + row * _RANK + column, stored(out, out_ptr))
    if lse_ptr is not None:
        lse = top + tl.log2(tl.where(total == 0.0, 1.0, total))
        tl.store(lse_ptr + row, lse * _LN_2, mask=tl.program_id(1) == 0)
