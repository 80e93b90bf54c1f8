"""Routed experts on a device: their choice, by scores or by token id, and their weighted sum.

The launch of a choice also lists the pairs of each expert if there are few tokens (`expert_pairs`).
Grids depend only on the number of tokens, so the launches can be captured. Every sum has a fixed
order. Tokens of padding have expert ids of -1.
"""

from __future__ import annotations

from fd_dsa.ops.dense_kernels import empty_beside, sigmoid
from fd_dsa.ops.device_functions import image_of, stored, widened
from fd_dsa.ops.expert_pairs import Choice, launch_choice, list_pairs
from fd_dsa.ops.step_kernel import step_kernel
from fd_dsa.tensor import Tensor
from fd_dsa.triton_runtime import next_power_of_2, start_next, wait_for_inputs

import triton  # isort: skip
import triton.language as tl  # isort: skip

_BLOCK = 1024
# below the key of any value
_LOWEST = tl.constexpr(-(1 << 63))


@triton.jit
def _are_best(values, exists, k, SIZE: tl.constexpr):
    """Return a mask of the k largest existing `values` [SIZE]. Of equal values the first counts."""
    place = tl.arange(0, SIZE)
    mine, other = values[:, None], values[None, :]
    ahead = (other > mine) | ((other == mine) & (place[None, :] < place[:, None]))
    rank = tl.sum((ahead & exists[None, :]).to(tl.int32), axis=1)
    return exists & (rank < k)


@triton.jit
def _ordered(values, exists, SIZE: tl.constexpr):
    """Return int64 keys in the order of `values` [SIZE], of equal values the first one highest.

    No two keys are equal. NaN is above all numbers, and what does not exist below.
    """
    key = image_of(values).to(tl.int64) * (1 << 32) + (SIZE - 1 - tl.arange(0, SIZE))
    return tl.where(exists, key, _LOWEST)


@triton.jit
def _scores(logits, SCORE: tl.constexpr):
    """Return the score of each logit by the function that SCORE names."""
    if SCORE == "sigmoid":
        return sigmoid(logits)
    # sqrt(log(1 + exp(x))); the quotient keeps the bits of small numbers that 1 + small loses
    small = tl.exp(-tl.abs(logits))
    more = 1.0 + small
    is_one = more == 1.0
    log = tl.where(is_one, small, tl.log(more) * (small / tl.where(is_one, 1.0, more - 1.0)))
    return tl.sqrt_rn(log + tl.maximum(logits, 0.0))


@step_kernel(waits=True)
def choose_experts_kernel(
    logits_ptr,
    bias_ptr,
    slot_mapping_ptr,
    scaling,
    ids_ptr,
    weights_ptr,
    pairs_ptr,
    counts_ptr,
    scratch_ptr,
    NUM_EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    EXPERTS: tl.constexpr,
    MAX_PAIRS: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    TOP_GROUPS: tl.constexpr,
    NORM: tl.constexpr,
    SCORE: tl.constexpr,
    GROUPS: tl.constexpr,
    SIZE: tl.constexpr,
):
    """Select the experts of token `program 0`, from GROUPS groups of SIZE places.

    GROUPS and SIZE are powers of two. See `list_pairs` for the lists.
    """
    row = tl.program_id(0).to(tl.int64) * NUM_EXPERTS
    own: tl.constexpr = NUM_EXPERTS // NUM_GROUPS
    group, place = tl.arange(0, GROUPS), tl.arange(0, SIZE)
    expert = group[:, None] * own + place[None, :]
    exists = (group < NUM_GROUPS)[:, None] & (place < own)[None, :]
    bias = tl.load(bias_ptr + expert, mask=exists, other=0.0)
    wait_for_inputs()
    start_next()
    padding = tl.load(slot_mapping_ptr + tl.program_id(0)) < 0
    logits = tl.load(logits_ptr + row + expert, mask=exists, other=0.0)
    scores = _scores(logits, SCORE)
    choice = tl.where(exists, scores + bias, float("-inf"))
    if NUM_GROUPS > 1:
        best = tl.max(choice, axis=1)
        # of equal values the first is the best, and another one the second best
        first = tl.min(tl.where(choice == best[:, None], place[None, :], SIZE), axis=1)
        others = tl.where(place[None, :] == first[:, None], float("-inf"), choice)
        pair = best
        if own > 1:
            pair = best + tl.max(others, axis=1)
        kept = _are_best(pair, group < NUM_GROUPS, TOP_GROUPS, GROUPS)
        choice = tl.where(kept[:, None], choice, float("-inf"))
    flat = tl.reshape(choice, [GROUPS * SIZE])
    real = tl.reshape(exists.to(tl.int32), [GROUPS * SIZE]) != 0
    key = _ordered(flat, real, GROUPS * SIZE)
    chosen = tl.zeros([GROUPS * SIZE], tl.int1)
    for _ in tl.static_range(TOP_K):
        is_best = key == tl.max(key, axis=0)
        chosen = chosen | is_best
        key = tl.where(is_best, _LOWEST, key)
    weights = tl.where(chosen, tl.reshape(scores, [GROUPS * SIZE]), 0.0)
    if NORM:
        weights = weights / (tl.sum(weights, axis=0) + 1e-20)
    place = tl.program_id(0) * TOP_K + tl.cumsum(chosen.to(tl.int32), axis=0) - 1
    expert = tl.reshape(expert, [GROUPS * SIZE])
    expert = tl.where(padding, -1, expert)
    weights = tl.where(padding, 0.0, weights)
    tl.store(ids_ptr + place, expert, mask=chosen)
    tl.store(weights_ptr + place, weights * scaling, mask=chosen)
    if pairs_ptr is not None:
        list_pairs(
            tl.where(chosen, expert, -1), place, ids_ptr, pairs_ptr, counts_ptr, scratch_ptr,
            NUM_EXPERTS, TOP_K, EXPERTS, MAX_PAIRS,
        )  # fmt: skip


def choose_experts(
    logits: Tensor,
    bias: Tensor,
    *,
    top_k: int,
    n_group: int,
    topk_group: int,
    norm: bool,
    scaling: float,
    slot_mapping: Tensor,
    score: str = "sigmoid",
) -> Choice:
    """Select experts by scores plus a correction bias, which does not enter the weights.

    With groups, the score of a group is that of its two best experts, and only experts of the best
    `topk_group` groups are selected. Of equal scores the lower expert is selected.

    Args:
        logits: float32 [num_tokens, num_experts], contiguous.
        bias: float32 [num_experts].
        top_k: number of experts of a token.
        n_group, topk_group: number of groups, and of selected groups; 1 and 1 = no groups.
        norm: True if the weights of a token are divided by their sum.
        scaling: factor of the weights.
        slot_mapping: integers [num_tokens], below 0 for padding.
        score: function of the logits, "sigmoid" or "sqrtsoftplus".

    Returns:
        Choice whose ids are ascending. Padding has ids of -1 and weights of 0.

    Source: DeepSeek-V3 (arXiv 2412.19437) §2.1.2.
    """
    experts = logits.shape[1]
    return launch_choice(
        choose_experts_kernel,
        top_k,
        logits,
        bias,
        slot_mapping,
        scaling,
        NUM_GROUPS=n_group,
        TOP_GROUPS=topk_group,
        NORM=norm,
        SCORE=score,
        GROUPS=next_power_of_2(n_group),
        SIZE=next_power_of_2(experts // n_group),
        # the maxima of a warp need no shared memory
        num_warps=1,
        # the compiler computes a score once for each layout; with a fused product in only one
        # of them, a score would not equal itself
        enable_fp_fusion=False,
    )


@step_kernel(waits=True)
def look_up_experts_kernel(
    logits_ptr,
    table_ptr,
    token_ids_ptr,
    rows_ptr,
    scaling,
    ids_ptr,
    weights_ptr,
    pairs_ptr,
    counts_ptr,
    scratch_ptr,
    NUM_EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    EXPERTS: tl.constexpr,
    MAX_PAIRS: tl.constexpr,
    SCORE: tl.constexpr,
    SIZE: tl.constexpr,
):
    """Look up the experts of token `program 0`, and list pairs as `choose_experts_kernel`.

    SIZE is TOP_K as a power of two.
    """
    wait_for_inputs()
    start_next()
    token = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, SIZE)
    real = place < TOP_K
    is_token = tl.load(rows_ptr + token) >= 0
    token_id = tl.load(token_ids_ptr + token).to(tl.int64) + tl.zeros([SIZE], tl.int64)
    # a request that got no token has a result code in its place
    known = real & (token_id >= 0)
    # no expert is below -1, so places past the last one equal no expert
    expert = tl.load(table_ptr + token_id * TOP_K + place, mask=known, other=-2)
    logits = tl.load(logits_ptr + token * NUM_EXPERTS + expert, mask=known, other=0.0)
    scores = tl.where(real, _scores(logits, SCORE), 0.0)
    weights = scores / (tl.sum(scores, axis=0) + 1e-20) * scaling
    # the first pair of an expert that is named several times stands for all of them
    same = expert[:, None] == expert[None, :]
    is_first = tl.sum((same & (place[None, :] < place[:, None])).to(tl.int32), axis=1) == 0
    weights = weights * tl.sum(same.to(tl.float32), axis=1)
    is_used = known & is_first & is_token
    pair = tl.program_id(0) * TOP_K + place
    expert = tl.where(is_used, expert, -1)
    tl.store(ids_ptr + pair, expert, mask=real)
    tl.store(weights_ptr + pair, tl.where(is_used, weights, 0.0), mask=real)
    if pairs_ptr is not None:
        list_pairs(
            expert, pair, ids_ptr, pairs_ptr, counts_ptr, scratch_ptr,
            NUM_EXPERTS, TOP_K, EXPERTS, MAX_PAIRS,
        )  # fmt: skip


def look_up_experts(
    logits: Tensor,
    table: Tensor,
    token_ids: Tensor,
    rows: Tensor,
    *,
    scaling: float,
    score: str,
) -> Choice:
    """Return the experts of each token by its id, weighted by their normalised scores.

    Args:
        logits: float32 [num_tokens, num_experts], contiguous.
        table: int32 [vocab_size, top_k], experts of each token id, ascending. An expert that is
            named twice counts twice.
        token_ids: integers [num_tokens]. One below 0 has no experts.
        rows: int32 [num_tokens or more], below 0 for padding.
        scaling: factor of the weights.
        score: as for `choose_experts`.

    Returns:
        As `choose_experts`; an expert that is named again has an id of -1 there.
    """
    top_k = table.shape[1]
    return launch_choice(
        look_up_experts_kernel, top_k, logits, table, token_ids, rows, scaling,
        SCORE=score, SIZE=next_power_of_2(top_k), num_warps=1,
    )  # fmt: skip


@step_kernel(waits=True)
def sum_experts_kernel(
    parts_ptr,
    weights_ptr,
    ids_ptr,
    base_ptr,
    out_ptr,
    TOP_K: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sum block `program 1` of token `program 0` over its experts, in the order of their ids."""
    wait_for_inputs()
    start_next()
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < WIDTH
    total = widened(tl.load(base_ptr + token * WIDTH + column, mask=inside, other=0.0))
    # unrolled, so that all loads are in flight before the first sum
    for choice in tl.static_range(TOP_K):
        pair = token * TOP_K + choice
        # a vector, because some versions of the interpreter refuse masks of a scalar and a vector
        expert = tl.load(ids_ptr + pair) + tl.zeros([BLOCK], tl.int32)
        part = tl.load(parts_ptr + pair * WIDTH + column, mask=inside & (expert >= 0), other=0.0)
        total += widened(part) * tl.load(weights_ptr + pair)
    tl.store(out_ptr + token * WIDTH + column, stored(total, out_ptr), mask=inside)


def sum_experts(parts: Tensor, weights: Tensor, ids: Tensor, base: Tensor) -> Tensor:
    """Add the weighted results of a token's experts to `base`, in float32, rounded to its dtype.

    Args:
        parts: float32 or bfloat16 [num_tokens * top_k, width], contiguous. Rows with ids of -1 are
            not read.
        weights: float32 [num_tokens, top_k].
        ids: int32 [num_tokens, top_k]; -1 = padding.
        base: float32 or bfloat16 [num_tokens, width], contiguous; result of the shared expert.
    """
    (rows, top_k), width = weights.shape, parts.shape[1]
    out = empty_beside(base, rows, width)
    if rows and width:
        block = min(_BLOCK, next_power_of_2(width))
        grid = rows, -(-width // block)
        sum_experts_kernel[grid](
            parts, weights, ids, base, out, TOP_K=top_k, WIDTH=width, BLOCK=block, num_warps=4
        )
    return out
