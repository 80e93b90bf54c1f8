"""Kernels for sparse MLA and dequantization on every device and dtype. They are not tuned.

One program attends for one token and one group of heads, with an online softmax over tiles of the
selected keys. The other providers keep a tile of keys in shared memory for more heads, and split
long selections among programs.
"""

from __future__ import annotations

from math import prod

from fd_dsa.cache_formats import LATENT_WIDTH, ROPE_WIDTH, TILE_WIDTH
from fd_dsa.ops.arrays import cache_format
from fd_dsa.ops.device_functions import e4m3_values, stored_values
from fd_dsa.ops.step_kernel import step_kernel
from fd_dsa.tensor import Tensor
from fd_dsa.triton_runtime import next_power_of_2, wait_for_inputs

import triton  # isort: skip
import triton.language as tl  # isort: skip

# heads, keys and values that are multiplied at a time
BLOCK_H, BLOCK_N = 16, 16
_BLOCK_H, _BLOCK_N, _BLOCK_D = tl.constexpr(BLOCK_H), tl.constexpr(BLOCK_N), tl.constexpr(64)
_TILE = tl.constexpr(TILE_WIDTH)


@triton.jit
def latents_of(
    cache_ptr, slot, dim, mask, RANK: tl.constexpr, ROPE: tl.constexpr, FP8: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """Load latent values `dim` of the keys in `slot`. Both and `mask` are broadcast."""
    if FP8:
        record = slot * (RANK + RANK // _TILE * 4 + ROPE * 2)
        values = e4m3_values(tl.load(cache_ptr + record + dim, mask=mask, other=0), tl.float32)
        scale_ptr = (cache_ptr + record + RANK).to(tl.pointer_type(tl.float32))
        return (values * tl.load(scale_ptr + dim // _TILE, mask=mask, other=0.0)).to(WIDE)
    return stored_values(tl.load(cache_ptr + slot * (RANK + ROPE) + dim, mask=mask, other=0), WIDE)


@triton.jit
def roped_of(
    cache_ptr, slot, dim, mask, RANK: tl.constexpr, ROPE: tl.constexpr, FP8: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """Load rotated values `dim` of the keys in `slot`."""
    if FP8:
        record = slot * (RANK + RANK // _TILE * 4 + ROPE * 2)
        start = cache_ptr + record + (RANK + RANK // _TILE * 4)
        values = tl.load(start.to(tl.pointer_type(tl.bfloat16)) + dim, mask=mask, other=0.0)
        return values.to(WIDE)
    return stored_values(
        tl.load(cache_ptr + slot * (RANK + ROPE) + RANK + dim, mask=mask, other=0), WIDE
    )


@step_kernel(waits=True)
def sparse_mla_kernel(
    q_ptr,
    cache_ptr,
    slots_ptr,
    out_ptr,
    softmax_scale,
    topk,
    num_heads,
    num_slots,
    RANK: tl.constexpr,
    ROPE: tl.constexpr,
    RANK_PADDED: tl.constexpr,
    ROPE_PADDED: tl.constexpr,
    FP8: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Attend for token `program 0` and the heads of group `program 1`."""
    wait_for_inputs()
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * _BLOCK_H + tl.arange(0, _BLOCK_H)
    is_head = head < num_heads
    query_start = (token * num_heads + head) * (RANK + ROPE)
    value_dim = tl.arange(0, RANK_PADDED)
    rope_dim = tl.arange(0, ROPE_PADDED)
    rope_mask = is_head[:, None] & (rope_dim < ROPE)[None, :]
    q_rope = tl.load(
        q_ptr + query_start[:, None] + RANK + rope_dim[None, :], mask=rope_mask, other=0
    )
    q_rope = stored_values(q_rope, WIDE)
    top = tl.full([_BLOCK_H], float("-inf"), tl.float32)
    total = tl.zeros([_BLOCK_H], tl.float32)
    out = tl.zeros([_BLOCK_H, RANK_PADDED], tl.float32)
    for start in range(0, topk, _BLOCK_N):
        entry = start + tl.arange(0, _BLOCK_N)
        slot = tl.load(slots_ptr + token * topk + entry, mask=entry < topk, other=-1)
        seen = (slot >= 0) & (slot < num_slots)
        # a row ends with unused entries, and a tile of them is skipped
        if tl.max(seen.to(tl.int32), axis=0) > 0:
            key = slot.to(tl.int64)
            scores = tl.zeros([_BLOCK_H, _BLOCK_N], tl.float32)
            for first_dim in tl.static_range(0, RANK, _BLOCK_D):
                dim = first_dim + tl.arange(0, _BLOCK_D)
                q_mask = is_head[:, None] & (dim < RANK)[None, :]
                q = tl.load(q_ptr + query_start[:, None] + dim[None, :], mask=q_mask, other=0)
                k = latents_of(
                    cache_ptr, key[None, :], dim[:, None], seen[None, :] & (dim < RANK)[:, None],
                    RANK, ROPE, FP8, WIDE,
                )  # fmt: skip
                scores = tl.dot(stored_values(q, WIDE), k, acc=scores, input_precision="ieee")
            k = roped_of(
                cache_ptr, key[None, :], rope_dim[:, None],
                seen[None, :] & (rope_dim < ROPE)[:, None], RANK, ROPE, FP8, WIDE,
            )  # fmt: skip
            scores = tl.dot(q_rope, k, acc=scores, input_precision="ieee")
            scores = tl.where(seen[None, :], scores * softmax_scale, float("-inf"))
            new_top = tl.maximum(top, tl.max(scores, axis=1))
            # 0 if all scores so far are -inf, to avoid a difference of infinities
            base = tl.where(new_top == float("-inf"), 0.0, new_top)
            shrink = tl.exp(top - base)
            weight = tl.where(seen[None, :], tl.exp(scores - base[:, None]), 0.0)
            total = total * shrink + tl.sum(weight, axis=1)
            value = latents_of(
                cache_ptr, key[:, None], value_dim[None, :],
                seen[:, None] & (value_dim < RANK)[None, :], RANK, ROPE, FP8, WIDE,
            )  # fmt: skip
            out = tl.dot(weight.to(WIDE), value, acc=out * shrink[:, None], input_precision="ieee")
            top = new_top
    out = out / tl.where(total == 0.0, 1.0, total)[:, None]
    out_start = (token * num_heads + head) * RANK
    out_mask = is_head[:, None] & (value_dim < RANK)[None, :]
    tl.store(out_ptr + out_start[:, None] + value_dim[None, :], out, mask=out_mask)


def attend_slots(
    q: Tensor, cache: Tensor, slots: Tensor, out: Tensor, *, softmax_scale: float, kv_lora_rank: int
) -> None:
    """Attend to the slots of each token's row, as `fd_dsa.ops.sparse_mla`, to `out`.

    Slots of -1 or past the cache are ignored at any place of a row. Products are bfloat16 if the
    query is, with latents rounded to bfloat16, and float32 (not TF32) otherwise. Sums are float32.

    Cost: one launch, without an allocation or a wait.
    """
    num_tokens, num_heads, width = q.shape
    if num_tokens == 0:
        return
    fp8 = cache_format(cache).is_fp8
    both_bfloat16 = "bfloat16" in str(q.dtype) and "float32" not in str(cache.dtype)
    rope_dim = width - kv_lora_rank
    sparse_mla_kernel[(num_tokens, -(-num_heads // BLOCK_H))](
        *(q, cache, slots, out, softmax_scale),
        *(slots.shape[1], num_heads, prod(cache.shape[:-1])),
        RANK=kv_lora_rank,
        ROPE=rope_dim,
        RANK_PADDED=max(16, next_power_of_2(kv_lora_rank)),
        ROPE_PADDED=max(16, next_power_of_2(rope_dim)),
        FP8=fp8,
        WIDE=tl.bfloat16 if both_bfloat16 else tl.float32,
        num_warps=4,
    )


@step_kernel()
def dequantize_kernel(
    cache_ptr,
    slots_ptr,
    out_ptr,
    num_keys,
    num_slots,
    RANK: tl.constexpr,
    ROPE: tl.constexpr,
    FP8: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Dequantize BLOCK_N keys."""
    key = tl.program_id(0) * _BLOCK_N + tl.arange(0, _BLOCK_N)
    slot = tl.load(slots_ptr + key, mask=key < num_keys, other=-1)[:, None]
    held = (slot >= 0) & (slot < num_slots)
    dim = tl.arange(0, WIDTH)[None, :]
    is_latent, is_rope = dim < RANK, (dim >= RANK) & (dim < RANK + ROPE)
    values = latents_of(cache_ptr, slot, dim, held & is_latent, RANK, ROPE, FP8, tl.float32)
    if FP8:
        rope = dim - RANK
        values += roped_of(cache_ptr, slot, rope, held & is_rope, RANK, ROPE, FP8, tl.float32)
    out = out_ptr + key.to(tl.int64)[:, None] * (RANK + ROPE) + dim
    tl.store(out, values, mask=(key < num_keys)[:, None] & (is_latent | is_rope))


def dequantize(cache: Tensor, slots: Tensor, out: Tensor) -> None:
    """Dequantize as `fd_dsa.ops.mla.dequantize`, in one launch, to `out`."""
    num_keys, width = out.shape
    if num_keys == 0:
        return
    fp8 = cache_format(cache).is_fp8
    dequantize_kernel[(-(-num_keys // BLOCK_N),)](
        *(cache, slots, out, num_keys, cache.shape[0]),
        # caches of other formats have one part
        RANK=LATENT_WIDTH if fp8 else width,
        ROPE=ROPE_WIDTH if fp8 else 0,
        FP8=fp8,
        WIDTH=next_power_of_2(width),
        num_warps=4,
    )
