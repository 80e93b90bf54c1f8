"""Cache writes on a device: norms, RoPE, quantisation and both scatters in one launch.

A program takes BLOCK_TOKENS tokens. With as many warps as tokens each warp owns a token: its
sums and maxima are warp shuffles, and nothing passes through shared memory.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fd_dsa.errors import ShapeError
from fd_dsa.ops._triton_fp8 import (
    absolute_maximum,
    divided,
    hadamard,
    index_divisor,
    index_scale,
    load_pairs,
    magnitude,
    mean_of,
    quotient,
    rotated,
    store_codes,
    store_pairs,
    to_bfloat16,
    to_e4m3,
    widened,
)
from fd_dsa.triton_runtime import paddle_jit

import triton  # isort: skip
import triton.language as tl  # isort: skip

if TYPE_CHECKING:
    from fd_dsa.ops.cache_write import CacheWriteParams

# values of a latent that share a scale
_TILE = 128
_SMALLEST_NORMAL = tl.constexpr(2.0**-126)

# (BLOCK_TOKENS, num_warps) that benchmarks/cache_write.py times
CANDIDATES = ((1, 1), (2, 1), (4, 1), (2, 2), (4, 2), (4, 4), (8, 2), (8, 4))


def configuration(num_tokens: int) -> tuple[int, int]:
    """BLOCK_TOKENS and num_warps for a step: one wave of programs, then more tokens in each."""
    return (1, 1) if num_tokens <= 4096 else (2, 1)


@triton.jit
def _stored(x, pointer):
    """float32 `x` as the elements of a float32, bfloat16 or int16 (bfloat16 bits) pointer."""
    element = pointer.dtype.element_ty
    if element != tl.float32:
        x = to_bfloat16(x).to(element, bitcast=True)
    return x


@triton.jit
def _load_latent(
    row,
    weight_ptr,
    known,
    RANK: tl.constexpr,
    HALF: tl.constexpr,
    TILE: tl.constexpr,
    TILES: tl.constexpr,
):
    """Latents [TOKENS, TILES, TILE], their norm's weights, k_pe's pairs [TOKENS, HALF]."""
    column = (tl.arange(0, TILES)[:, None] * TILE + tl.arange(0, TILE)[None, :])[None]
    # weights too have an element a token: a smaller tensor would lie in other threads
    weight_column = column + (known.to(tl.int32) * 0)[:, None, None]
    mask = known[:, None, None] & (column < RANK)
    x = widened(tl.load(row[:, None, None] + column, mask=mask, other=0.0))
    weight = x
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + weight_column, mask=weight_column < RANK, other=0.0)
    first, second = load_pairs((row + RANK)[:, None], known[:, None], HALF, True)
    return x, weight, first, second


@triton.jit
def _rms_norm(x, weight, eps, RANK: tl.constexpr):
    """x * rsqrt(mean(x^2) + eps) * weight of [TOKENS, TILES, TILE]."""
    wide = x.to(tl.float64)
    total = tl.sum(tl.sum(wide * wide, 2), 1)
    factor = tl.div_rn(1.0, tl.sqrt_rn(mean_of(total, RANK) + eps))
    return x * factor[:, None, None] * weight


@triton.jit
def _store_latent(
    record, x, live, RANK: tl.constexpr, TILE: tl.constexpr, TILES: tl.constexpr, FP8: tl.constexpr
):
    """Latents of the `live` tokens, and the scales of their tiles."""
    tile = tl.arange(0, TILES)
    column = (tile[:, None] * TILE + tl.arange(0, TILE)[None, :])[None]
    mask = live[:, None, None] & (column < RANK)
    if FP8:
        largest = absolute_maximum(magnitude(x), 2)
        scale = tl.maximum(tl.div_rn(largest, 448.0), _SMALLEST_NORMAL)
        tl.store(record[:, None, None] + column, to_e4m3(quotient(x, scale[:, :, None])), mask=mask)
        scales = (record + RANK).to(tl.pointer_type(tl.float32))
        inside = live[:, None] & (tile * TILE < RANK)[None, :]
        tl.store(scales[:, None] + tile[None, :], scale, mask=inside)
    else:
        tl.store(record[:, None, None] + column, _stored(x, record), mask=mask)


@triton.jit
def _load_parts(row, known, HALF: tl.constexpr, INTERLEAVED: tl.constexpr):
    """Rows of 4 * HALF values as the pairs of both halves, four parts [TOKENS, HALF]."""
    a, b = load_pairs(row[:, None], known[:, None], HALF, INTERLEAVED)
    c, d = load_pairs((row + 2 * HALF)[:, None], known[:, None], HALF, INTERLEAVED)
    return a, b, c, d


@triton.jit
def _centred(a, b, c, d, HALF: tl.constexpr):
    """The four parts of rows, less the mean of each row."""
    total = (a.to(tl.float64) + b.to(tl.float64)) + (c.to(tl.float64) + d.to(tl.float64))
    mean = mean_of(tl.sum(total, 1), 4 * HALF)[:, None]
    return a - mean, b - mean, c - mean, d - mean


@triton.jit
def _inverse_deviation(a, b, c, d, eps, HALF: tl.constexpr):
    """float32 [TOKENS, 1]: rsqrt(variance + eps) of centred rows."""
    a, b, c, d = a.to(tl.float64), b.to(tl.float64), c.to(tl.float64), d.to(tl.float64)
    total = (a * a + b * b) + (c * c + d * d)
    return tl.div_rn(1.0, tl.sqrt_rn(mean_of(tl.sum(total, 1), 4 * HALF) + eps))[:, None]


@triton.jit
def _store_index(
    key_out,
    scale_out,
    a,
    b,
    c,
    d,
    live,
    HALF: tl.constexpr,
    FP8: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    UE8M0: tl.constexpr,
):
    """Index keys of the `live` tokens, and their scales."""
    if FP8:
        high = tl.maximum(magnitude(a), magnitude(b))
        low = tl.maximum(magnitude(c), magnitude(d))
        scale = index_scale(absolute_maximum(tl.maximum(high, low), 1), UE8M0)
        tl.store(scale_out, scale, mask=live)
        by = index_divisor(scale, UE8M0)[:, None]
        a, b = divided(a, by, UE8M0), divided(b, by, UE8M0)
        c, d = divided(c, by, UE8M0), divided(d, by, UE8M0)
        store_codes(key_out[:, None], a, b, live[:, None], HALF, INTERLEAVED)
        store_codes((key_out + 2 * HALF)[:, None], c, d, live[:, None], HALF, INTERLEAVED)
    else:
        a, b = _stored(a, key_out), _stored(b, key_out)
        c, d = _stored(c, key_out), _stored(d, key_out)
        store_pairs(key_out[:, None], a, b, live[:, None], HALF, INTERLEAVED)
        store_pairs((key_out + 2 * HALF)[:, None], c, d, live[:, None], HALF, INTERLEAVED)


@paddle_jit(
    do_not_specialize=("num_tokens", "num_slots", "kv_eps", "k_eps"),
    contiguous=(
        "position_ids_ptr",
        "slot_mapping_ptr",
        "cos_sin_ptr",
        "latent_ptr",
        "index_ptr",
        "kv_weight_ptr",
        "k_weight_ptr",
        "k_bias_ptr",
    ),
)
def write_caches_kernel(
    kv_a_ptr,
    kv_a_stride,
    index_k_ptr,
    index_k_stride,
    position_ids_ptr,
    slot_mapping_ptr,
    cos_sin_ptr,
    latent_ptr,
    index_ptr,
    kv_weight_ptr,
    k_weight_ptr,
    k_bias_ptr,
    num_tokens,
    num_slots,
    kv_eps: float,
    k_eps: float,
    RANK: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    TILES: tl.constexpr,
    FP8: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    HADAMARD: tl.constexpr,
    UE8M0: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
):
    """See `write_caches`; a pointer that is None leaves its step out.

    All loads come before the first store, which they could not pass, and those that need nothing
    but the token's number come first. So rows of tokens without a slot are loaded as well.
    """
    token = tl.program_id(0) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    known = token < num_tokens
    token = token.to(tl.int64)
    slot = tl.load(slot_mapping_ptr + token, mask=known, other=-1)
    if cos_sin_ptr is not None:
        position = tl.load(position_ids_ptr + token, mask=known, other=0)
    if kv_a_ptr is not None:
        x, kv_weight, first, second = _load_latent(
            kv_a_ptr + token * kv_a_stride, kv_weight_ptr, known, RANK, HALF, TILE, TILES
        )
    if index_k_ptr is not None:
        a, b, c, d = _load_parts(index_k_ptr + token * index_k_stride, known, HALF, INTERLEAVED)
        if k_weight_ptr is not None:
            none = token * 0
            wa, wb, wc, wd = _load_parts(k_weight_ptr + none, known, HALF, INTERLEAVED)
            ba, bb, bc, bd = _load_parts(k_bias_ptr + none, known, HALF, INTERLEAVED)
    live = (slot >= 0) & (slot < num_slots)
    # a dead slot must not even be an address
    slot = tl.where(live, slot, 0)
    if cos_sin_ptr is not None:
        angle = cos_sin_ptr + position[:, None] * (2 * HALF) + tl.arange(0, HALF)[None, :]
        cos = tl.load(angle, mask=live[:, None], other=0.0)
        sin = tl.load(angle + HALF, mask=live[:, None], other=0.0)
    if kv_a_ptr is not None:
        if kv_weight_ptr is not None:
            x = _rms_norm(x, kv_weight, kv_eps, RANK)
        if cos_sin_ptr is not None:
            first, second = rotated(first, second, cos, sin)
        if FP8:
            record = latent_ptr + slot * (RANK + 4 * (RANK // TILE) + 4 * HALF)
            k_pe_out = (record + RANK + 4 * (RANK // TILE)).to(tl.pointer_type(tl.bfloat16))
        else:
            record = latent_ptr + slot * (RANK + 2 * HALF)
            k_pe_out = record + RANK
        _store_latent(record, x, live, RANK, TILE, TILES, FP8)
        first, second = _stored(first, k_pe_out), _stored(second, k_pe_out)
        store_pairs(k_pe_out[:, None], first, second, live[:, None], HALF, True)
    if index_k_ptr is not None:
        if k_weight_ptr is not None:
            a, b, c, d = _centred(a, b, c, d, HALF)
            factor = _inverse_deviation(a, b, c, d, k_eps, HALF)
            a, b = a * factor * wa + ba, b * factor * wb + bb
            c, d = c * factor * wc + bc, d * factor * wd + bd
        if cos_sin_ptr is not None:
            a, b = rotated(a, b, cos, sin)
        if HADAMARD:
            a, b, c, d = hadamard(a, b, c, d, HALF, INTERLEAVED)
        key_out = index_ptr + slot * (4 * HALF)
        scale_out = None
        if FP8:
            # a block is its keys, then its scales: 4 bytes a token more
            block, offset = slot // BLOCK_SIZE, slot % BLOCK_SIZE
            key_out += block * (4 * BLOCK_SIZE)
            scales = index_ptr + block * (BLOCK_SIZE * (4 * HALF + 4)) + BLOCK_SIZE * 4 * HALF
            scale_out = scales.to(tl.pointer_type(tl.float32)) + offset
        _store_index(
            key_out, scale_out, a, b, c, d, live, HALF, FP8, INTERLEAVED, UE8M0
        )  # fmt: skip


def write_caches(
    kv_a: Any,
    index_k: Any,
    position_ids: Any,
    slot_mapping: Any,
    cos_sin_cache: Any,
    latent_cache: Any,
    index_cache: Any,
    params: CacheWriteParams,
) -> None:
    """See `fd_dsa.ops.cache_write.write_caches`."""
    num_tokens = slot_mapping.shape[0]
    if num_tokens == 0 or (kv_a is None and index_k is None):
        return
    arguments = kernel_arguments(
        kv_a, index_k, position_ids, slot_mapping, cos_sin_cache, latent_cache, index_cache, params
    )
    block_tokens, num_warps = configuration(num_tokens)
    write_caches_kernel[(-(-num_tokens // block_tokens),)](
        **arguments,
        BLOCK_TOKENS=block_tokens,
        num_warps=num_warps,
        enable_fp_fusion=False,
    )


def kernel_arguments(
    kv_a: Any,
    index_k: Any,
    position_ids: Any,
    slot_mapping: Any,
    cos_sin_cache: Any,
    latent_cache: Any,
    index_cache: Any,
    params: CacheWriteParams,
) -> dict[str, Any]:
    """Arguments of `write_caches_kernel` by name, but for BLOCK_TOKENS; launch without fusion.

    Raises:
        ShapeError: a width that the kernel has no tiles for, or caches of different sizes.
    """
    half = _rope_half(kv_a, index_k, cos_sin_cache, params)
    rank = kv_a.shape[1] - 2 * half if kv_a is not None else _TILE
    tile = min(_TILE, 1 << (rank - 1).bit_length())
    return {
        "kv_a_ptr": kv_a,
        "kv_a_stride": _row_stride("kv_a", kv_a),
        "index_k_ptr": index_k,
        "index_k_stride": _row_stride("index_k", index_k),
        "position_ids_ptr": None if cos_sin_cache is None else position_ids,
        "slot_mapping_ptr": slot_mapping,
        "cos_sin_ptr": cos_sin_cache,
        "latent_ptr": latent_cache,
        "index_ptr": index_cache,
        "kv_weight_ptr": params.kv_norm_weight,
        "k_weight_ptr": params.k_norm_weight,
        "k_bias_ptr": params.k_norm_bias,
        "num_tokens": slot_mapping.shape[0],
        "num_slots": _num_slots(latent_cache, index_cache),
        "kv_eps": params.kv_norm_eps,
        "k_eps": params.k_norm_eps,
        "RANK": rank,
        "HALF": half,
        "BLOCK_SIZE": (index_cache if latent_cache is None else latent_cache).shape[-2],
        "TILE": tile,
        "TILES": 1 << (-(-rank // tile) - 1).bit_length(),
        "FP8": params.kv_cache_dtype == "fp8_ds_mla",
        "INTERLEAVED": params.index_rope_interleave,
        "HADAMARD": params.index_hadamard,
        "UE8M0": params.index_scale_fmt == "ue8m0",
    }


def _rope_half(kv_a: Any, index_k: Any, cos_sin_cache: Any, params: CacheWriteParams) -> int:
    """Pairs of a RoPE slice; where nothing is rotated, any width that splits the rows."""
    if cos_sin_cache is not None:
        half = cos_sin_cache.shape[1] // 2
    elif index_k is not None:
        half = index_k.shape[1] // 4
    elif params.kv_norm_weight is not None:
        half = (kv_a.shape[1] - params.kv_norm_weight.shape[0]) // 2
    else:
        half = 32 if kv_a.shape[1] > 64 else 1
    if half < 1 or half & (half - 1):
        raise ShapeError(f"write_caches: a device needs a power of two as rope_dim, got {2 * half}")
    if index_k is not None and index_k.shape[1] != 4 * half:
        raise ShapeError(
            f"write_caches: a device needs index_head_dim = 2 * rope_dim, got "
            f"{index_k.shape[1]} and {2 * half}"
        )
    return half


def _row_stride(name: str, rows: Any) -> int:
    """Values from one row to the next; rows are dense and start where a pair of values may."""
    if rows is None:
        return 0
    stride, step = rows.stride()
    if step != 1 and rows.shape[1] > 1:
        raise ShapeError(f"write_caches: values of a row of {name} lie {step} apart, wanted 1")
    pair_bytes = 8 if str(rows.dtype).endswith("float32") else 4
    if stride % 2 or rows.shape[1] % 2 or rows.data_ptr() % pair_bytes:
        raise ShapeError(
            f"write_caches: rows of {name} are {stride} values apart, from address "
            f"{rows.data_ptr()}; a device needs both even, in values"
        )
    return stride


def _num_slots(latent_cache: Any, index_cache: Any) -> int:
    """Slots of the caches that are written."""
    sizes = {c.shape[0] * c.shape[-2] for c in (latent_cache, index_cache) if c is not None}
    if len(sizes) > 1:
        raise ShapeError(f"write_caches: caches of {sorted(sizes)} slots; a step has one table")
    return sizes.pop()
