"""Routed experts on a device: their choice by scores, lists of their pairs, and their weighted sum.

The launch of a choice also lists the pairs of each expert if there are few tokens. Each token sets
its bit in a mask of each of its experts, and the last program turns the masks into lists. The order
of the programs changes no mask, so the lists are always the same.

Grids depend only on the number of tokens, so the launches can be captured. Every sum has a fixed
order. Tokens of padding have expert ids of -1.
"""

from __future__ import annotations

from fd_dsa.ops.dense_kernels import empty_beside, sigmoid
from fd_dsa.ops.device_functions import image_of, stored, widened
from fd_dsa.ops.expert_pairs import MAX_EXPERTS, MAX_TOKENS, Choice
from fd_dsa.ops.split_sums import NUM_COUNTERS, is_last, scratch_beside
from fd_dsa.ops.step_kernel import step_kernel
from fd_dsa.tensor import Tensor
from fd_dsa.triton_runtime import Kernel, next_power_of_2, start_next, wait_for_inputs

import triton  # isort: skip
import triton.language as tl  # isort: skip

_BLOCK = 1024
# where the masks begin in the scratch memory, whose first value counts the finished programs
_MASKS = tl.constexpr(NUM_COUNTERS)
_MASK_BITS = tl.constexpr(MAX_TOKENS)
# below the image of any value
_LOWEST = tl.constexpr(-(1 << 31))


@triton.jit
def _are_best(values, exists, k, SIZE: tl.constexpr):
    """Return a mask of the k largest existing `values` [SIZE]. Of equal values the first counts."""
    place = tl.arange(0, SIZE)
    mine, other = values[:, None], values[None, :]
    ahead = (other > mine) | ((other == mine) & (place[None, :] < place[:, None]))
    rank = tl.sum((ahead & exists[None, :]).to(tl.int32), axis=1)
    return exists & (rank < k)


@triton.jit
def _best(values, exists, K: tl.constexpr, SIZE: tl.constexpr):
    """Return a mask of the K largest existing `values` [SIZE]. Of equal values the first counts.

    NaN is above all numbers. A warp finds the maximum of 32-bit integers in one instruction, which
    it lacks for pairs of a value and its place.
    """
    place = tl.arange(0, SIZE)
    image = tl.where(exists, image_of(values), _LOWEST)
    # not zeros of int1, which the interpreter of Triton 3.3 cannot make
    chosen = place < 0
    for _ in tl.static_range(K):
        first = tl.min(tl.where(image == tl.max(image, axis=0), place, SIZE), axis=0)
        is_best = place == first
        chosen = chosen | is_best
        image = tl.where(is_best, _LOWEST, image)
    return chosen


@triton.jit
def scores_of(logits, SCORE: tl.constexpr):
    """Return the score of each logit by the function that SCORE names."""
    if SCORE == "sigmoid":
        return sigmoid(logits)
    # sqrt(log(1 + exp(x))); the quotient keeps the bits of small numbers that 1 + small loses
    small = tl.exp(-tl.abs(logits))
    more = 1.0 + small
    is_one = more == 1.0
    log = tl.where(is_one, small, tl.log(more) * (small / tl.where(is_one, 1.0, more - 1.0)))
    return tl.sqrt_rn(log + tl.maximum(logits, 0.0))


@triton.jit
def _num_bits(mask):
    """Return the number of set bits of uint64 masks, int32."""
    twos = mask - ((mask >> 1) & 0x5555555555555555)
    fours = (twos & 0x3333333333333333) + ((twos >> 2) & 0x3333333333333333)
    eights = (fours + (fours >> 4)) & 0x0F0F0F0F0F0F0F0F
    return ((eights * 0x0101010101010101) >> 56).to(tl.int32)


@triton.jit
def _fill_lists(
    ids_ptr,
    pairs_ptr,
    counts_ptr,
    masks,
    num_tokens,
    NUM_EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    EXPERTS: tl.constexpr,
    MAX_PAIRS: tl.constexpr,
):
    """Write the lists of all experts from their `masks`, and reset the masks."""
    expert, pair = tl.arange(0, EXPERTS), tl.arange(0, MAX_PAIRS)
    exists = expert < NUM_EXPERTS
    # bypass the L1 cache, because stores of other programs do not reach it
    mask = tl.load(masks + expert, mask=exists, other=0, cache_modifier=".cg")
    is_pair = pair < num_tokens * TOP_K
    ids = tl.load(ids_ptr + pair, mask=is_pair, other=-1, cache_modifier=".cg")
    own = tl.load(masks + ids, mask=ids >= 0, other=0, cache_modifier=".cg")
    tl.store(counts_ptr + expert, _num_bits(mask), mask=exists)
    token = (pair // TOP_K % _MASK_BITS).to(tl.uint64)
    before = (tl.full([MAX_PAIRS], 1, tl.uint64) << token) - 1
    tl.store(pairs_ptr + ids * num_tokens + _num_bits(own & before), pair, mask=ids >= 0)
    # all threads must have read the masks
    tl.debug_barrier()
    tl.store(masks + expert, tl.zeros([EXPERTS], tl.uint64), mask=exists)


@triton.jit
def list_pairs(
    expert,
    pair,
    ids_ptr,
    pairs_ptr,
    counts_ptr,
    scratch_ptr,
    NUM_EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    EXPERTS: tl.constexpr,
    MAX_PAIRS: tl.constexpr,
):
    """Add the pairs of token `program 0` to the lists, after the program has stored its ids.

    Args:
        expert, pair: vectors of one size; an expert below 0 has no pair.
        ids_ptr: ids of all tokens.
        pairs_ptr, counts_ptr: the lists.
        scratch_ptr: None if the launch has one token.
        EXPERTS: NUM_EXPERTS as a power of two.
        MAX_PAIRS: maximum number of pairs of a launch, as a power of two.
    """
    is_used = expert >= 0
    if scratch_ptr is None:
        every = tl.arange(0, EXPERTS)
        tl.store(counts_ptr + every, tl.zeros([EXPERTS], tl.int32), mask=every < NUM_EXPERTS)
        # the threads that store a 1 are others
        tl.debug_barrier()
        tl.store(counts_ptr + expert, tl.full(expert.shape, 1, tl.int32), mask=is_used)
        tl.store(pairs_ptr + expert, pair, mask=is_used)
    else:
        masks = (scratch_ptr + _MASKS).to(tl.pointer_type(tl.uint64))
        bit = tl.full(expert.shape, 1, tl.uint64) << tl.program_id(0).to(tl.uint64)
        tl.atomic_or(masks + expert, bit, mask=is_used, sem="relaxed")
        num_tokens = tl.num_programs(0)
        if is_last(scratch_ptr, num_tokens):
            _fill_lists(
                ids_ptr, pairs_ptr, counts_ptr, masks, num_tokens,
                NUM_EXPERTS, TOP_K, EXPERTS, MAX_PAIRS,
            )  # fmt: skip


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
    scores = scores_of(logits, SCORE)
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
    chosen = _best(flat, real, TOP_K, GROUPS * SIZE)
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


def launch_choice(
    kernel: Kernel, top_k: int, logits: Tensor, *given: object, **options: object
) -> Choice:
    """Launch a kernel that chooses the experts of each token, and lists the pairs of few tokens.

    Args:
        logits: float32 [num_tokens, num_experts].
        given: arguments of the kernel between `logits` and the results.
        options: further constants and options of the launch.
    """
    rows, experts = logits.shape
    ids = empty_beside(logits, rows, top_k, dtype="int32")
    weights = empty_beside(logits, rows, top_k)
    if not rows:
        return Choice(ids, weights)
    lists: tuple[Tensor, Tensor] | None = None
    scratch = None
    if 1 < rows <= MAX_TOKENS and experts <= MAX_EXPERTS:
        # masks of 64 bits in place of float32 values
        scratch = scratch_beside(logits, "choice of experts", 2 * MAX_EXPERTS)
    if rows == 1 or scratch is not None:
        lists = empty_beside(ids, experts, rows), empty_beside(ids, experts)
    pairs, counts = lists or (None, None)
    kernel[(rows,)](
        logits, *given, ids, weights, pairs, counts, scratch, NUM_EXPERTS=experts, TOP_K=top_k,
        EXPERTS=next_power_of_2(experts), MAX_PAIRS=next_power_of_2(MAX_TOKENS * top_k), **options,
    )  # fmt: skip
    return Choice(ids, weights, lists)


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
