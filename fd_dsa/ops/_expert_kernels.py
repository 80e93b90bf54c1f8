"""Routed experts on a device: choice, grouping, grouped GEMMs and weighted sum, five launches.

A (token, choice) pair is a row of the grouped GEMMs. One launch lists the pairs of each expert, in
order; a GEMM reads its rows through that list and writes them where the pair is, so nothing is
copied and nothing is read back. Grids depend on the number of tokens alone, so a step of them can
be captured, and every sum has a fixed order.
"""

from __future__ import annotations

from typing import Any

import paddle

from fd_dsa.ops._dense_kernels import empty_like_rows, sigmoid
from fd_dsa.ops._triton import step_kernel

import triton  # isort: skip
import triton.language as tl  # isort: skip

_BLOCK = 1024


@triton.jit
def _are_best(values, exists, k, SIZE: tl.constexpr):
    """Which of `values` [SIZE] are among the k largest that exist; ties go to the lower place."""
    place = tl.arange(0, SIZE)
    mine, other = values[:, None], values[None, :]
    ahead = (other > mine) | ((other == mine) & (place[None, :] < place[:, None]))
    rank = tl.sum((ahead & exists[None, :]).to(tl.int32), axis=1)
    return exists & (rank < k)


@step_kernel()
def choose_experts_kernel(
    logits_ptr,
    bias_ptr,
    ids_ptr,
    weights_ptr,
    scaling,
    NUM_EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    TOP_GROUPS: tl.constexpr,
    NORM: tl.constexpr,
    GROUPS: tl.constexpr,
    SIZE: tl.constexpr,
):
    """Token `program 0`; experts as GROUPS groups of SIZE places, both powers of two."""
    row = tl.program_id(0).to(tl.int64) * NUM_EXPERTS
    own: tl.constexpr = NUM_EXPERTS // NUM_GROUPS
    group, place = tl.arange(0, GROUPS), tl.arange(0, SIZE)
    expert = group[:, None] * own + place[None, :]
    exists = (group < NUM_GROUPS)[:, None] & (place < own)[None, :]
    logits = tl.load(logits_ptr + row + expert, mask=exists, other=0.0)
    scores = sigmoid(logits)
    choice = scores + tl.load(bias_ptr + expert, mask=exists, other=0.0)
    choice = tl.where(exists, choice, float("-inf"))
    if NUM_GROUPS > 1:
        best = tl.max(choice, axis=1)
        # the first of equal ones is the best, another one the second
        first = tl.min(tl.where(choice == best[:, None], place[None, :], SIZE), axis=1)
        others = tl.where(place[None, :] == first[:, None], float("-inf"), choice)
        pair = best
        if own > 1:
            pair = best + tl.max(others, axis=1)
        kept = _are_best(pair, group < NUM_GROUPS, TOP_GROUPS, GROUPS)
        choice = tl.where(kept[:, None], choice, float("-inf"))
    flat = tl.reshape(choice, [GROUPS * SIZE])
    real = tl.reshape(exists.to(tl.int32), [GROUPS * SIZE]) != 0
    chosen = _are_best(flat, real, TOP_K, GROUPS * SIZE)
    weights = tl.where(chosen, tl.reshape(scores, [GROUPS * SIZE]), 0.0)
    if NORM:
        weights = weights / (tl.sum(weights, axis=0) + 1e-20)
    place = tl.cumsum(chosen.to(tl.int32), axis=0) - 1
    # a NaN is among the best, however many there are
    chosen = chosen & (place < TOP_K)
    place += tl.program_id(0) * TOP_K
    tl.store(ids_ptr + place, tl.reshape(expert, [GROUPS * SIZE]), mask=chosen)
    tl.store(weights_ptr + place, weights * scaling, mask=chosen)


def choose_experts(
    logits: Any,
    bias: Any,
    *,
    top_k: int,
    n_group: int,
    topk_group: int,
    norm: bool,
    scaling: float,
) -> tuple[Any, Any]:
    """Experts of each token, int32 [num_tokens, top_k], ascending, and their weights, float32.

    Sigmoid scores; the correction bias chooses and does not weigh; with groups, one counts by its
    two best experts and only the best `topk_group` take part. Ties go to the lower expert.

    Args:
        logits: float32 [num_tokens, num_experts], contiguous.
        bias: float32 [num_experts].
        top_k: experts of a token.
        n_group, topk_group: groups, and those that take part; 1 and 1: no groups.
        norm: weights are shares of their sum.
        scaling: factor of the weights.

    Source: DeepSeek-V3 (arXiv 2412.19437) §2.1.2.
    """
    rows, experts = logits.shape
    ids = paddle.empty([rows, top_k], "int32", device=logits.place)
    weights = empty_like_rows(logits, rows, top_k)
    if rows:
        choose_experts_kernel[(rows,)](
            logits,
            bias,
            ids,
            weights,
            scaling,
            NUM_EXPERTS=experts,
            TOP_K=top_k,
            NUM_GROUPS=n_group,
            TOP_GROUPS=topk_group,
            NORM=norm,
            GROUPS=triton.next_power_of_2(n_group),
            SIZE=triton.next_power_of_2(experts // n_group),
            num_warps=8,
            # a score is computed once for each layout that needs it; with the division's product
            # fused into the sum in one of them, it would not be equal to itself
            enable_fp_fusion=False,
        )
    return ids, weights


@step_kernel()
def group_pairs_kernel(ids_ptr, pairs_ptr, counts_ptr, num_pairs, num_tokens, BLOCK: tl.constexpr):
    """The pairs of expert `program 0`; at most one a token."""
    expert = tl.program_id(0)
    count = 0
    for start in range(0, num_pairs, BLOCK):
        pair = start + tl.arange(0, BLOCK)
        mine = tl.load(ids_ptr + pair, mask=pair < num_pairs, other=-1) == expert
        place = expert.to(tl.int64) * num_tokens + count + tl.cumsum(mine.to(tl.int32), axis=0) - 1
        tl.store(pairs_ptr + place, pair, mask=mine)
        count += tl.sum(mine.to(tl.int32), axis=0)
    tl.store(counts_ptr + expert, count)


def group_pairs(ids: Any, num_experts: int) -> tuple[Any, Any]:
    """Pairs of each expert in order, int32 [num_experts, num_tokens], and how many, [num_experts].

    Pair i is choice i % top_k of token i // top_k.

    Args:
        ids: int32 [num_tokens, top_k], contiguous; no expert twice in a row.
    """
    rows, top_k = ids.shape
    pairs = paddle.empty([num_experts, rows], "int32", device=ids.place)
    counts = paddle.empty([num_experts], "int32", device=ids.place)
    block = min(_BLOCK, triton.next_power_of_2(max(rows * top_k, 1)))
    group_pairs_kernel[(num_experts,)](
        ids, pairs, counts, rows * top_k, rows, BLOCK=block, num_warps=4
    )
    return pairs, counts


@step_kernel()
def expert_gemm_kernel(
    x_ptr,
    weight_ptr,
    pairs_ptr,
    counts_ptr,
    out_ptr,
    num_tokens,
    ROW_PAIRS: tl.constexpr,
    NUM_EXPERTS: tl.constexpr,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    GATED: tl.constexpr,
    EXPERTS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    """Column block `program 0` of tile `program 1`; an expert has as many tiles as its pairs fill.

    GATED: silu of the first COLUMNS columns times the second ones. Row of `x`: pair // ROW_PAIRS.
    """
    expert_ids = tl.arange(0, EXPERTS)
    counts = tl.load(counts_ptr + expert_ids, mask=expert_ids < NUM_EXPERTS, other=0)
    tiles = (counts + BLOCK_ROWS - 1) // BLOCK_ROWS
    ends = tl.cumsum(tiles, axis=0)
    tile = tl.program_id(1)
    expert = tl.sum((ends <= tile).to(tl.int32), axis=0)
    if expert < NUM_EXPERTS:
        own = expert_ids == expert
        tile -= tl.sum(tl.where(own, ends - tiles, 0), axis=0)
        place = tile * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        live = place < tl.sum(tl.where(own, counts, 0), axis=0)
        wide = expert.to(tl.int64)
        pair = tl.load(pairs_ptr + wide * num_tokens + place, mask=live, other=0).to(tl.int64)
        column = tl.program_id(0) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
        inside = column < COLUMNS
        stride: tl.constexpr = 2 * COLUMNS if GATED else COLUMNS
        step = tl.arange(0, BLOCK_WIDTH)
        x = x_ptr + (pair // ROW_PAIRS)[:, None] * WIDTH + step[None, :]
        weight = weight_ptr + (wide * WIDTH + step[:, None]) * stride + column[None, :]
        total = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], tl.float32)
        up = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], tl.float32)
        for start in range(0, WIDTH, BLOCK_WIDTH):
            here = start + step < WIDTH
            left = tl.load(x + start, mask=live[:, None] & here[None, :], other=0.0)
            mask, at = here[:, None] & inside[None, :], weight + start * stride
            right = tl.load(at, mask=mask, other=0.0)
            total = tl.dot(left, right, acc=total, input_precision="ieee")
            if GATED:
                right = tl.load(at + COLUMNS, mask=mask, other=0.0)
                up = tl.dot(left, right, acc=up, input_precision="ieee")
        if GATED:
            total = total * sigmoid(total) * up
        to = out_ptr + pair[:, None] * COLUMNS + column[None, :]
        tl.store(to, total, mask=live[:, None] & inside[None, :])


def expert_gemm(
    x: Any, weight: Any, pairs: Any, counts: Any, *, top_k: int, gated: bool = False
) -> Any:
    """float32 [num_tokens * top_k, columns]: each pair's row of `x` times its expert's weight.

    Args:
        x: float32 [num_tokens, width], or a row for each pair, [num_tokens * top_k, width].
        weight: float32 [num_experts, width, columns], `gated` 2 * columns.
        pairs, counts: of `group_pairs`.
        gated: silu of the first half of the columns times the second half.
    """
    experts, width, columns = weight.shape
    columns //= 1 + gated
    num_tokens = pairs.shape[1]
    num_pairs = num_tokens * top_k
    out = empty_like_rows(x, num_pairs, columns)
    if num_pairs and columns:
        # tiles of a few rows while the weights' bytes are the cost
        rows = 16 if num_pairs <= 16 * experts else 32
        block, most_tiles = min(64, max(16, triton.next_power_of_2(columns))), num_pairs // rows
        grid = -(-columns // block), min(experts, num_pairs) + most_tiles
        expert_gemm_kernel[grid](
            x, weight, pairs, counts, out, num_tokens, ROW_PAIRS=num_pairs // x.shape[0],
            NUM_EXPERTS=experts, WIDTH=width, COLUMNS=columns, GATED=gated,
            EXPERTS=triton.next_power_of_2(experts), BLOCK_ROWS=rows, BLOCK_COLUMNS=block,
            BLOCK_WIDTH=min(32, max(16, triton.next_power_of_2(width))), num_warps=4,
        )  # fmt: skip
    return out


@step_kernel()
def sum_experts_kernel(
    parts_ptr, weights_ptr, out_ptr, TOP_K: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr
):
    """Block `program 1` of token `program 0`; experts are added in ascending order."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < WIDTH
    total = tl.zeros([BLOCK], tl.float32)
    for choice in range(TOP_K):
        pair = token * TOP_K + choice
        part = tl.load(parts_ptr + pair * WIDTH + column, mask=inside, other=0.0)
        total += part * tl.load(weights_ptr + pair)
    tl.store(out_ptr + token * WIDTH + column, total, mask=inside)


def sum_experts(parts: Any, weights: Any) -> Any:
    """float32 [num_tokens, width]: what the experts of a token give, weighted.

    Args:
        parts: float32 [num_tokens * top_k, width], contiguous.
        weights: float32 [num_tokens, top_k].
    """
    (rows, top_k), width = weights.shape, parts.shape[1]
    out = empty_like_rows(parts, rows, width)
    if rows and width:
        block = min(_BLOCK, triton.next_power_of_2(width))
        grid = rows, -(-width // block)
        sum_experts_kernel[grid](
            parts, weights, out, TOP_K=top_k, WIDTH=width, BLOCK=block, num_warps=4
        )
    return out
