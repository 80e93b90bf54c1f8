"""Choice of experts by token id, for the first layers of DeepSeek-V4."""

from __future__ import annotations

from fd_dsa.ops.expert_kernels import launch_choice, list_pairs, scores_of
from fd_dsa.ops.expert_pairs import Choice
from fd_dsa.ops.step_kernel import step_kernel
from fd_dsa.tensor import Tensor
from fd_dsa.triton_runtime import next_power_of_2, start_next, wait_for_inputs

import triton.language as tl  # isort: skip


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
    scores = tl.where(real, scores_of(logits, SCORE), 0.0)
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
    slot_mapping: Tensor,
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
        slot_mapping: as for `choose_experts`.
        scaling: factor of the weights.
        score: as for `choose_experts`.

    Returns:
        As `choose_experts`; an expert that is named again has an id of -1 there.
    """
    top_k = table.shape[1]
    return launch_choice(
        look_up_experts_kernel, top_k, logits, table, token_ids, slot_mapping, scaling,
        SCORE=score, SIZE=next_power_of_2(top_k), num_warps=1,
    )  # fmt: skip
