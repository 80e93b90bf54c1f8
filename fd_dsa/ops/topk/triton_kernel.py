"""Kernel for exact top-k on a device, as cache slots. It is not tuned.

One program selects for one token. It finds the k-th best score bit by bit, over an image of the
scores in the same order. Then it writes the slots in ascending position. The result does not depend
on the order of threads. A faster provider needs fewer passes over the row.
"""

from __future__ import annotations

from fd_dsa.ops.device_functions import blocks_of, key_bounds
from fd_dsa.ops.key_bounds import NO_WINDOWS, PromptWindows
from fd_dsa.ops.step_kernel import step_kernel
from fd_dsa.tensor import Tensor
from fd_dsa.triton_runtime import wait_for_inputs

import triton  # isort: skip
import triton.language as tl  # isort: skip

_BLOCK = tl.constexpr(1024)


@triton.jit
def _ordered_bits(scores):
    """Map scores to uint32 in the same order. NaN is 0, below -inf. -0.0 equals +0.0."""
    # integers only, because a comparison of floats may flush denormal numbers to zero
    bits = scores.to(tl.uint32, bitcast=True)
    bits = tl.where(bits == 0x80000000, tl.zeros_like(bits), bits)
    image = tl.where((bits >> 31) != 0, bits ^ 0xFFFFFFFF, bits | 0x80000000)
    is_nan = (bits & 0x7FFFFFFF) > 0x7F800000
    return tl.where(is_nan, tl.zeros_like(bits), image)


@triton.jit
def _kth_best(row_ptr, window, k):
    """Return the largest image that at least k scores of a row reach, and how many exceed it.

    From the highest bit down, a bit is set if k scores still reach the value.
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
        # if the bit stays clear, `reached` counts the scores above all values that remain
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
    """Write the slots of the k best keys of token `first_token + program 0`."""
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
    # scores equal to the k-th best fill the remaining entries, lowest positions first
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
    them, and its scores are not read.

    Args:
        logits: float32 [num_rows, width], scores of the tokens from `first_token` on; rows may have
            gaps.
        position_ids, batch_id_per_token, block_tables: see ForwardMeta.
        slots: int32 [num_tokens, k]; -1 for an unused entry and for a key without a block of the
            cache.
        block_size, num_blocks: size of the cache.
        windows: `prompt_windows` of the step; NO_WINDOWS = all keys up to the token's own.
        first_token: first token whose row is filled.
        num_rows: number of tokens; None = rows of `logits`. It may exceed these rows if no token
            has more than k keys.

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
