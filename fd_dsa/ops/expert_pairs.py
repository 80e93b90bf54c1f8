"""Lists of the pairs of each expert, in order of the tokens.

A pair is a token and one of its experts, and a row of the grouped GEMMs (`expert_gemm`). A launch
that chooses the experts of few tokens lists their pairs too. Each token sets its bit in a mask of
each of its experts, and the last program turns the masks into lists. The order of the programs
changes no mask, so the lists are always the same.
"""

from __future__ import annotations

from typing import NamedTuple

from fd_dsa.ops.dense_kernels import empty_beside
from fd_dsa.ops.split_sums import NUM_COUNTERS, clear_counters, scratch_beside
from fd_dsa.ops.step_kernel import step_kernel
from fd_dsa.tensor import Tensor
from fd_dsa.triton_runtime import Kernel, next_power_of_2, start_next, wait_for_inputs

import triton  # isort: skip
import triton.language as tl  # isort: skip

MAX_TOKENS = 64
"""Maximum number of tokens of a launch that lists the pairs: bits of a mask."""
_MAX_EXPERTS = 1024
_BLOCK = 1024
# maximum number of pairs that the program of an expert scans at a time
_MAX_PAIRS = 4096
# where the masks begin in the scratch memory, whose first value counts the finished programs
_MASKS = tl.constexpr(NUM_COUNTERS)
_MASK_BITS = tl.constexpr(MAX_TOKENS)


class Choice(NamedTuple):
    """Experts of each token.

    Attributes:
        ids: int32 [num_tokens, top_k], distinct experts of a token; -1 = padding.
        weights: float32 [num_tokens, top_k], 0 for padding.
        lists: pairs and counts as of `group_pairs`. None = not listed yet.
    """

    ids: Tensor
    weights: Tensor
    lists: tuple[Tensor, Tensor] | None = None


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
        # all threads must have set their bits before one of them counts this program
        tl.debug_barrier()
        num_tokens = tl.num_programs(0)
        if tl.atomic_add(scratch_ptr, 1.0, sem="acq_rel") == num_tokens - 1:
            _fill_lists(
                ids_ptr, pairs_ptr, counts_ptr, masks, num_tokens,
                NUM_EXPERTS, TOP_K, EXPERTS, MAX_PAIRS,
            )  # fmt: skip
            tl.store(scratch_ptr, 0.0)


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
    if 1 < rows <= MAX_TOKENS and experts <= _MAX_EXPERTS:
        # masks of 64 bits in place of float32 values
        scratch = scratch_beside(logits, "choice of experts", 2 * _MAX_EXPERTS)
    if rows == 1 or scratch is not None:
        lists = _empty_lists(ids, experts)
    pairs, counts = lists or (None, None)
    try:
        kernel[(rows,)](
            logits, *given, ids, weights, pairs, counts, scratch, NUM_EXPERTS=experts, TOP_K=top_k,
            EXPERTS=next_power_of_2(experts), MAX_PAIRS=next_power_of_2(MAX_TOKENS * top_k),
            **options,
        )  # fmt: skip
    except BaseException:
        clear_counters(scratch)
        raise
    return Choice(ids, weights, lists)


def _empty_lists(ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """Allocate the lists of `group_pairs`."""
    return empty_beside(ids, num_experts, ids.shape[0]), empty_beside(ids, num_experts)


@step_kernel(waits=True)
def group_pairs_kernel(ids_ptr, pairs_ptr, counts_ptr, num_pairs, num_tokens, BLOCK: tl.constexpr):
    """List the pairs of expert `program 0`, at most one for each token."""
    wait_for_inputs()
    start_next()
    expert = tl.program_id(0)
    count = 0
    for start in range(0, num_pairs, BLOCK):
        pair = start + tl.arange(0, BLOCK)
        mine = tl.load(ids_ptr + pair, mask=pair < num_pairs, other=-1) == expert
        place = expert.to(tl.int64) * num_tokens + count + tl.cumsum(mine.to(tl.int32), axis=0) - 1
        tl.store(pairs_ptr + place, pair, mask=mine)
        count += tl.sum(mine.to(tl.int32), axis=0)
    tl.store(counts_ptr + expert, count)


def group_pairs(ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """List the pairs of each expert. Pair i is expert i % top_k of token i // top_k.

    Args:
        ids: int32 [num_tokens, top_k], contiguous. The experts of a row are distinct, -1 = padding.

    Returns:
        Pairs of each expert in order, int32 [num_experts, num_tokens], and their numbers, int32
        [num_experts].
    """
    rows, top_k = ids.shape
    pairs, counts = _empty_lists(ids, num_experts)
    block = min(_MAX_PAIRS, next_power_of_2(max(rows * top_k, 1)))
    group_pairs_kernel[(num_experts,)](
        ids, pairs, counts, rows * top_k, rows, BLOCK=block, num_warps=8 if block > _BLOCK else 4
    )
    return pairs, counts
