"""Choices of experts, and lists of the pairs of each expert in order of the tokens.

A pair is a token and one of its experts, and a row of the grouped GEMMs (`expert_gemm`). A launch
that chooses the experts of few tokens lists their pairs too (`expert_kernels`).
"""

from __future__ import annotations

from typing import NamedTuple

from fd_dsa.ops.dense_kernels import empty_beside
from fd_dsa.ops.step_kernel import step_kernel
from fd_dsa.tensor import Tensor
from fd_dsa.triton_runtime import next_power_of_2, start_next, wait_for_inputs

import triton.language as tl  # isort: skip

MAX_TOKENS = 64
"""Maximum number of tokens of a launch that lists the pairs: bits of a mask."""
MAX_EXPERTS = 1024
"""Maximum number of experts of such a launch."""
_BLOCK = 1024
# maximum number of pairs that the program of an expert scans at a time
_MAX_PAIRS = 4096


class Choice(NamedTuple):
    """Experts of each token.

    Attributes:
        ids: int32 [num_tokens, top_k], distinct experts of a token; -1 = padding.
        weights: float32 [num_tokens, top_k], 0 for padding.
        lists: pairs and counts, same as the results of `group_pairs`. None = not listed yet.
    """

    ids: Tensor
    weights: Tensor
    lists: tuple[Tensor, Tensor] | None = None


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
    pairs, counts = empty_beside(ids, num_experts, rows), empty_beside(ids, num_experts)
    block = min(_MAX_PAIRS, next_power_of_2(max(rows * top_k, 1)))
    group_pairs_kernel[(num_experts,)](
        ids, pairs, counts, rows * top_k, rows, BLOCK=block, num_warps=8 if block > _BLOCK else 4
    )
    return pairs, counts
