"""Which experts a token takes, and the weighted sum of what they give: a launch each, no wait."""

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
    weights_ptr,
    chosen_ptr,
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
    column = tl.reshape(expert, [GROUPS * SIZE])
    tl.store(weights_ptr + row + column, weights * scaling, mask=real)
    tl.store(chosen_ptr + row + column, chosen.to(tl.uint8), mask=real)


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
    """float32 and uint8 [num_tokens, num_experts]: weight of each expert, and whether it is chosen.

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
    weights = empty_like_rows(logits, rows, experts)
    chosen = paddle.empty([rows, experts], "uint8", device=logits.place)
    if rows:
        choose_experts_kernel[(rows,)](
            logits,
            bias,
            weights,
            chosen,
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
    return weights, chosen


@step_kernel()
def sum_experts_kernel(
    parts_ptr,
    weights_ptr,
    chosen_ptr,
    out_ptr,
    num_tokens,
    NUM_EXPERTS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Block `program 1` of token `program 0`; experts are added in ascending order."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < WIDTH
    total = tl.zeros([BLOCK], tl.float32)
    for expert in range(NUM_EXPERTS):
        # selected, not multiplied by 0: an expert may overflow on tokens that are not its own
        if tl.load(chosen_ptr + token * NUM_EXPERTS + expert) != 0:
            weight = tl.load(weights_ptr + token * NUM_EXPERTS + expert)
            part = parts_ptr + (expert * num_tokens + token) * WIDTH + column
            total += tl.load(part, mask=inside, other=0.0) * weight
    tl.store(out_ptr + token * WIDTH + column, total, mask=inside)


def sum_experts(parts: Any, weights: Any, chosen: Any) -> Any:
    """float32 [num_tokens, width]: what the chosen experts of a token give, weighted.

    Args:
        parts: float32 [num_experts, num_tokens, width], contiguous.
        weights, chosen: as of `choose_experts`.
    """
    experts, rows, width = parts.shape
    out = empty_like_rows(parts, rows, width)
    if rows and width:
        block = min(_BLOCK, triton.next_power_of_2(width))
        sum_experts_kernel[(rows, -(-width // block))](
            parts, weights, chosen, out, rows, NUM_EXPERTS=experts, WIDTH=width, BLOCK=block,
            num_warps=4,
        )  # fmt: skip
    return out
