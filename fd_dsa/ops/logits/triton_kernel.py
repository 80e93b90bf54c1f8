"""Indexer scores on a device, directly from the pages, for all formats of the cache.

One program scores one token against one tile of its row's keys, so prefill and decode tokens are
alike. Each token reads its keys again. For the caches that it reads, `tile_kernel.py` is faster.
"""

from __future__ import annotations

from fd_dsa.ops.arrays import cache_format
from fd_dsa.ops.device_functions import blocks_of, e4m3_values, key_bounds, stored_values
from fd_dsa.ops.key_bounds import prompt_windows
from fd_dsa.ops.step_kernel import step_kernel
from fd_dsa.step import ForwardMeta
from fd_dsa.tensor import Tensor
from fd_dsa.triton_runtime import wait_for_inputs

import triton.language as tl  # isort: skip

# tile sizes of a GEMM: keys, heads and values of a head
BLOCK_N = 64
_BLOCK_N, _BLOCK_H, _BLOCK_D = tl.constexpr(BLOCK_N), tl.constexpr(16), tl.constexpr(32)


@step_kernel(waits=True)
def logits_kernel(
    q_ptr,
    weights_ptr,
    cache_ptr,
    position_ids_ptr,
    batch_id_per_token_ptr,
    block_tables_ptr,
    offsets_ptr,
    key_starts_ptr,
    seq_lens_encoder_ptr,
    logits_ptr,
    first_token,
    table_width,
    logits_width,
    num_blocks,
    num_heads,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    FP8: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Score token `first_token + program 0` against the keys of tile `program 1`.

    A float32 GEMM reads its operands as float32, without TF32. FP8 values are exact in float16, and
    their GEMM has sums in float32.
    """
    wait_for_inputs()
    row = tl.program_id(0).to(tl.int64)
    token = first_token + row
    first_key = tl.program_id(1) * _BLOCK_N
    batch_id = tl.load(batch_id_per_token_ptr + token)
    begin, end = key_bounds(
        token,
        batch_id,
        batch_id >= 0,
        position_ids_ptr,
        offsets_ptr,
        key_starts_ptr,
        seq_lens_encoder_ptr,
    )
    end = tl.minimum(end, logits_width)
    if (first_key >= end) | (first_key + _BLOCK_N <= begin):
        return
    key = first_key + tl.arange(0, _BLOCK_N)
    seen = (key >= begin) & (key < end)
    block = blocks_of(
        block_tables_ptr, batch_id, key, seen, table_width, num_blocks, BLOCK_SIZE
    )  # fmt: skip
    held = block >= 0
    offset = (key % BLOCK_SIZE).to(tl.int64)
    if FP8:
        q_ptr = q_ptr.to(tl.pointer_type(tl.uint8))
        block_start = block.to(tl.int64) * (BLOCK_SIZE * (HEAD_DIM + 4))
        key_start = block_start + offset * HEAD_DIM
    else:
        key_start = (block.to(tl.int64) * BLOCK_SIZE + offset) * HEAD_DIM
    scores = tl.zeros([_BLOCK_N], tl.float32)
    for first_head in range(0, num_heads, _BLOCK_H):
        head = first_head + tl.arange(0, _BLOCK_H)
        head_start = (token * num_heads + head) * HEAD_DIM
        dots = tl.zeros([_BLOCK_H, _BLOCK_N], tl.float32)
        for first_dim in tl.static_range(0, HEAD_DIM, _BLOCK_D):
            dim = first_dim + tl.arange(0, _BLOCK_D)
            q_mask = (head < num_heads)[:, None] & (dim < HEAD_DIM)[None, :]
            q = tl.load(q_ptr + head_start[:, None] + dim[None, :], mask=q_mask, other=0)
            # transposed: [BLOCK_D, BLOCK_N]
            k_mask = held[None, :] & (dim < HEAD_DIM)[:, None]
            k = tl.load(cache_ptr + key_start[None, :] + dim[:, None], mask=k_mask, other=0)
            if FP8:
                q, k = e4m3_values(q, WIDE), e4m3_values(k, WIDE)
            else:
                q, k = stored_values(q, WIDE), stored_values(k, WIDE)
            dots = tl.dot(q, k, acc=dots, input_precision="ieee")
        weight = tl.load(weights_ptr + token * num_heads + head, mask=head < num_heads, other=0.0)
        # a comparison instead of a maximum keeps NaN
        rectified = tl.where(dots < 0.0, 0.0, dots)
        # rows past the last head have queries and weights of 0
        scores += tl.sum(rectified * weight.to(tl.float32)[:, None], axis=0)
    if FP8:
        scale_start = block_start + BLOCK_SIZE * HEAD_DIM + offset * 4
        scale_ptr = (cache_ptr + scale_start).to(tl.pointer_type(tl.float32))
        scores *= tl.load(scale_ptr, mask=held, other=0.0)
    # keys without a block are masked
    scores = tl.where(held, scores, float("-inf"))
    tl.store(logits_ptr + row * logits_width + key, scores, mask=seen)


def score_pages(
    q: Tensor,
    weights: Tensor,
    cache: Tensor,
    step: ForwardMeta,
    logits: Tensor,
    first_token: int = 0,
) -> None:
    """Write the scores of consecutive tokens, as `fd_dsa.ops.indexer_logits` describes.

    Args:
        q: may also be bfloat16 over a float32 cache, and float8_e4m3fn.
        step: step whose `max_seqlen_k` bounds the keys of a row.
        logits: float32 [num_rows, width], scores of the tokens from `first_token` on. Entries
            outside of a token's window, and rows of padding, stay as they are. A key whose block is
            -1 or past the cache gets -inf.

    Cost: one launch.
    """
    fp8 = cache_format(cache).is_fp8
    num_rows, width = logits.shape
    num_keys = min(width, step.max_seqlen_k)
    if num_rows == 0 or num_keys == 0:
        return
    both_bfloat16 = "bfloat16" in str(q.dtype) and "float32" not in str(cache.dtype)
    wide = tl.float16 if fp8 else tl.bfloat16 if both_bfloat16 else tl.float32
    logits_kernel[(num_rows, -(-num_keys // BLOCK_N))](
        *(q, weights, cache),
        *(step.position_ids, step.batch_id_per_token, step.block_tables, *prompt_windows(step)),
        *(logits, first_token, step.block_tables.shape[1], width, cache.shape[0], q.shape[1]),
        HEAD_DIM=q.shape[2],
        BLOCK_SIZE=cache.shape[1],
        FP8=fp8,
        WIDE=wide,
        num_warps=4,
    )
