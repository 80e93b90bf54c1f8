"""Exact top-k on a device, written as cache slots; correct first, not tuned.

One program serves one token: it finds the k-th best score bit by bit over an order-preserving
image of the scores, then writes the winners in ascending position. Nothing depends on the order
of threads. A provider with fewer passes over the row can replace it without a change to callers.
"""

from __future__ import annotations

from fd_dsa.ops.key_bounds import NO_WINDOWS, PromptWindows
from fd_dsa.ops.step_kernel import blocks_of, key_bounds, step_kernel
from fd_dsa.tensor import Tensor
from fd_dsa.triton_runtime import wait_for_inputs

import triton  # isort: skip
import triton.language as tl  # isort: skip

_BLOCK = tl.constexpr(1024)


@triton.jit
def _ordered_bits(scores):
    """uint32 image: larger = higher score; NaN is 0, below -inf, and -0.0 equals +0.0."""
    # integers alone: no comparison of floats may take a denormal number for zero
    bits = scores.to(tl.uint32, bitcast=True)
    bits = tl.where(bits == 0x80000000, tl.zeros_like(bits), bits)
    image = tl.where((bits >> 31) != 0, bits ^ 0xFFFFFFFF, bits | 0x80000000)
    is_nan = (bits & 0x7FFFFFFF) > 0x7F800000
    return tl.where(is_nan, tl.zeros_like(bits), image)


@triton.jit
def _kth_best(row_ptr, window, k):
    """Largest image that at least k of the row's scores reach, and how many exceed it.

    Built from the highest bit down: a bit is set while k scores still reach the value.
    """
    kth = tl.full([], 0, tl.uint32)
    above = tl.full([], 0, tl.int32)
    for i in range(32):
        candidate = kth | (tl.full([], 0x80000000, tl.uint32) >> i)
        reached = tl.full([], 0, tl.int32)
        for start in range(0, window, _BLOCK):
            column = start + tl.arange(0, _BLOCK)
            image = _ordered_bits(tl.load(row_ptr + column, mask=column < window, other=0.0))
            hit = (column < window) & (image >= candidate)
            reached += tl.sum(hit.to(tl.int32), axis=0)
        # where the bit stays clear, `reached` counts scores above every value still possible
        above = tl.where(reached >= k, above, reached)
        kth = tl.where(reached >= k, candidate, kth)
    return kth, above


@step_kernel(strided=("logits_ptr",), waits=True)
def topk_kernel(
    logits_ptr,
    position_ids_ptr,
    batch_id_per_token_ptr,
    block_tables_ptr,
    offsets_ptr,
    key_starts_ptr,
    seq_lens_encoder_ptr,
    slots_ptr,
    k,
    first_token,
    table_width,
    logits_width,
    logits_stride,
    num_blocks,
    BLOCK_SIZE: tl.constexpr,
):
    """Slots of the k best keys of token `first_token + program 0`."""
    wait_for_inputs()
    row = tl.program_id(0).to(tl.int64)
    token = first_token + row
    batch_id = tl.load(batch_id_per_token_ptr + token)
    begin, end = key_bounds(
        token, batch_id, batch_id >= 0, position_ids_ptr,
        offsets_ptr, key_starts_ptr, seq_lens_encoder_ptr,
    )  # fmt: skip
    window = end - begin
    out_ptr = slots_ptr + token * k
    row_ptr = logits_ptr + row * logits_stride + begin
    kth = tl.full([], 0, tl.uint32)
    above = tl.full([], 0, tl.int32)
    if window > k:
        window = tl.minimum(window, tl.maximum(logits_width - begin, 0))
        kth, above = _kth_best(row_ptr, window, k)
    # scores equal to the k-th best fill what the better ones leave, lowest positions first
    wanted_ties = k - above
    scored_end = tl.where(window > k, window, 0)
    unscored_end = window - scored_end
    num_written = tl.full([], 0, tl.int32)
    num_ties = tl.full([], 0, tl.int32)
    for start in range(0, window, _BLOCK):
        column = start + tl.arange(0, _BLOCK)
        seen = column < window
        image = _ordered_bits(tl.load(row_ptr + column, mask=column < scored_end, other=0.0))
        tie = seen & (image == kth)
        tie_rank = num_ties + tl.cumsum(tie.to(tl.int32), axis=0)
        chosen = (seen & (image > kth)) | (tie & (tie_rank <= wanted_ties))
        chosen = chosen | (column < unscored_end)
        rank = num_written + tl.cumsum(chosen.to(tl.int32), axis=0) - 1
        position = begin + column
        block = blocks_of(
            block_tables_ptr, batch_id, position, chosen, table_width, num_blocks, BLOCK_SIZE
        )
        slot = tl.where(block < 0, -1, block * BLOCK_SIZE + position % BLOCK_SIZE)
        tl.store(out_ptr + rank, slot, mask=chosen)
        num_written += tl.sum(chosen.to(tl.int32), axis=0)
        num_ties += tl.sum(tie.to(tl.int32), axis=0)
    for start in range(0, k - num_written, _BLOCK):
        column = num_written + start + tl.arange(0, _BLOCK)
        tl.store(out_ptr + column, tl.full([_BLOCK], -1, tl.int32), mask=column < k)


def select_slots(
    logits: Tensor,
    position_ids: Tensor,
    batch_id_per_token: Tensor,
    block_tables: Tensor,
    slots: Tensor,
    *,
    block_size: int,
    num_blocks: int,
    windows: PromptWindows = NO_WINDOWS,
    first_token: int = 0,
    num_rows: int | None = None,
) -> None:
    """Fill rows of `slots` with the cache slots of the best keys of consecutive tokens.

    Ranks and order are those of `fd_dsa.ops.topk_indices`. A token with at most k keys gets all of
    them, without a look at its scores.

    Args:
        logits: float32 [num_rows, width], of the tokens from `first_token` on; rows may have gaps.
        position_ids, batch_id_per_token, block_tables: as of a ForwardMeta; rows of padding are -1.
        slots: int32 [num_tokens, k]; -1 also for a key without a block of 0..num_blocks - 1.
        windows: `prompt_windows` of the step; without them every token sees all keys up to its own.
        num_rows: how many tokens; None is the rows of `logits`. May be more where no token has
            more than k keys: the scores are not read then.

    Cost: one launch; no allocation, no wait.
    """
    num_rows = logits.shape[0] if num_rows is None else num_rows
    if num_rows == 0:
        return
    topk_kernel[(num_rows,)](
        *(logits, position_ids, batch_id_per_token, block_tables, *windows),
        *(slots, slots.shape[1]),
        *(first_token, block_tables.shape[1], logits.shape[1], logits.stride()[0], num_blocks),
        BLOCK_SIZE=block_size,
        num_warps=4,
    )
