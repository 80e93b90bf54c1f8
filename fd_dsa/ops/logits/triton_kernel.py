"""Indexer scores on a device, straight from the pages; correct first, not tuned.

One program scores one token against one tile of its row's keys, so prefill and decode tokens are
alike and keys are read once for each token. A provider that shares a tile of keys between the
tokens of a prompt, on the tensor cores' FP8 path, can replace it without a change to callers.
"""

from __future__ import annotations

from typing import Any

from fd_dsa.ops._triton import blocks_of, e4m3_values, stored_values
from fd_dsa.step import ForwardMeta
from fd_dsa.triton_runtime import paddle_jit

import triton.language as tl  # isort: skip

_BLOCK_N = 64
_BLOCK_H = 16
_BLOCK_D = 32


@paddle_jit(
    do_not_specialize=("first_token", "table_width", "logits_width", "num_blocks", "num_heads"),
    contiguous=(
        "q_ptr",
        "weights_ptr",
        "cache_ptr",
        "position_ids_ptr",
        "batch_id_per_token_ptr",
        "block_tables_ptr",
        "logits_ptr",
    ),
)
def logits_kernel(
    q_ptr,
    weights_ptr,
    cache_ptr,
    position_ids_ptr,
    batch_id_per_token_ptr,
    block_tables_ptr,
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
    BLOCK_N: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Scores of token `first_token + program 0` for the keys of tile `program 1`.

    A float32 GEMM reads its operands as full float32 (no TF32). FP8 values are exact in float16,
    and their GEMM adds up in float32.
    """
    row = tl.program_id(0).to(tl.int64)
    token = first_token + row
    first_key = tl.program_id(1) * BLOCK_N
    batch_id = tl.load(batch_id_per_token_ptr + token)
    window = tl.load(position_ids_ptr + token).to(tl.int32) + 1
    window = tl.minimum(tl.where(batch_id < 0, 0, window), logits_width)
    if first_key >= window:
        return
    key = first_key + tl.arange(0, BLOCK_N)
    block = blocks_of(
        block_tables_ptr, batch_id, key, key < window, table_width, num_blocks, BLOCK_SIZE
    )
    held = block >= 0
    offset = (key % BLOCK_SIZE).to(tl.int64)
    if FP8:
        q_ptr = q_ptr.to(tl.pointer_type(tl.uint8))
        block_start = block.to(tl.int64) * (BLOCK_SIZE * (HEAD_DIM + 4))
        key_start = block_start + offset * HEAD_DIM
    else:
        key_start = (block.to(tl.int64) * BLOCK_SIZE + offset) * HEAD_DIM
    scores = tl.zeros([BLOCK_N], tl.float32)
    for first_head in range(0, num_heads, BLOCK_H):
        head = first_head + tl.arange(0, BLOCK_H)
        head_start = (token * num_heads + head) * HEAD_DIM
        dots = tl.zeros([BLOCK_H, BLOCK_N], tl.float32)
        for first_dim in tl.static_range(0, HEAD_DIM, BLOCK_D):
            dim = first_dim + tl.arange(0, BLOCK_D)
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
        # a comparison, not a maximum: a NaN stays one
        rectified = tl.where(dots < 0.0, 0.0, dots)
        # rows past the last head have no query and no weight: they add 0
        scores += tl.sum(rectified * weight.to(tl.float32)[:, None], axis=0)
    if FP8:
        scale_start = block_start + BLOCK_SIZE * HEAD_DIM + offset * 4
        scale_ptr = (cache_ptr + scale_start).to(tl.pointer_type(tl.float32))
        scores *= tl.load(scale_ptr, mask=held, other=0.0)
    # a key without a block exists for nobody
    scores = tl.where(held, scores, float("-inf"))
    tl.store(logits_ptr + row * logits_width + key, scores, mask=key < window)


def score_pages(
    q: Any,
    weights: Any,
    cache: Any,
    position_ids: Any,
    batch_id_per_token: Any,
    block_tables: Any,
    logits: Any,
    *,
    block_size: int,
    first_token: int = 0,
    max_seqlen_k: int | None = None,
) -> None:
    """Fill `logits` with the scores of consecutive tokens against their own rows' keys.

    logits[i, s] = sum_h weights[t, h] * relu(q[t, h] . key s of t's row), t = first_token + i

    Args:
        q: [num_tokens, index_n_heads, index_head_dim], roped; float32 or bfloat16, with an FP8
            cache uint8 or float8_e4m3fn (e4m3 values).
        weights: float32 [num_tokens, index_n_heads]; all scales of the query folded in.
        cache: the layer's indexer cache, float32, bfloat16 or int16 (bfloat16 bits)
            [num_blocks, block_size, index_head_dim], or uint8 [num_blocks, block_size,
            index_head_dim + 4]: a block's e4m3 keys, then its float32 scales.
        position_ids: int64 [num_tokens]; a token sees the keys 0..position of its row.
        batch_id_per_token: int32 [num_tokens]; -1 = padding.
        block_tables: int32 [num_reqs, max_blocks].
        logits: float32 [num_rows, width], written in place; entries past a token's window, and
            rows of padded tokens, are left as they are. A key whose block is -1 or past the
            cache gets -inf.
        max_seqlen_k: most keys of a row, at most `width`; columns from there on are not looked
            at. None is `width`.

    Raises:
        LaunchError: a tensor is not contiguous, or not on the device of the others.

    Cost: one launch; no allocation, no wait.
    Source: DeepSeek-V3.2 (arXiv 2512.02556) §2, eq. 1.
    """
    fp8 = str(cache.dtype).endswith("uint8")
    num_rows, width = logits.shape
    num_keys = width if max_seqlen_k is None else min(width, max_seqlen_k)
    if num_rows == 0 or num_keys == 0:
        return
    both_bfloat16 = "bfloat16" in str(q.dtype) and "float32" not in str(cache.dtype)
    wide = tl.float16 if fp8 else tl.bfloat16 if both_bfloat16 else tl.float32
    logits_kernel[(num_rows, -(-num_keys // _BLOCK_N))](
        q,
        weights,
        cache,
        position_ids,
        batch_id_per_token,
        block_tables,
        logits,
        first_token,
        block_tables.shape[1],
        width,
        cache.shape[0],
        q.shape[1],
        HEAD_DIM=q.shape[2],
        BLOCK_SIZE=block_size,
        FP8=fp8,
        WIDE=wide,
        BLOCK_N=_BLOCK_N,
        BLOCK_H=_BLOCK_H,
        BLOCK_D=_BLOCK_D,
        num_warps=4,
    )


def score_step(q: Any, weights: Any, cache: Any, step: ForwardMeta, logits: Any) -> None:
    """See `fd_dsa.ops.logits.indexer_logits`, with a result to write."""
    tokens = step.position_ids, step.batch_id_per_token, step.block_tables
    options = {"block_size": cache.shape[1], "max_seqlen_k": step.max_seqlen_k}
    score_pages(q, weights, cache, *tokens, logits, **options)
