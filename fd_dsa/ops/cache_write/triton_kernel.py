"""Cache writes on a device: norms, RoPE, quantisation and both scatters in one launch.

A program processes BLOCK_TOKENS tokens. If it has one warp for each token, sums and maxima of a
token are warp shuffles, and no value passes through shared memory.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fd_dsa.cache_formats import CACHE_FORMATS, TILE_WIDTH
from fd_dsa.errors import ShapeError
from fd_dsa.ops.arrays import check_shape, outer_strides
from fd_dsa.ops.device_functions import (
    absolute_maximum,
    hadamard,
    load_pairs,
    load_row,
    magnitude,
    mean_of,
    over_448,
    quotient,
    rotated,
    scale_of_row,
    store_pairs,
    store_row,
    store_row_codes,
    stored,
    to_e4m3,
    widened,
)
from fd_dsa.ops.split_sums import rows_of_tiles
from fd_dsa.ops.step_kernel import step_kernel
from fd_dsa.tensor import Tensor
from fd_dsa.triton_runtime import next_power_of_2, start_next, wait_for_inputs

import triton  # isort: skip
import triton.language as tl  # isort: skip

if TYPE_CHECKING:
    from fd_dsa.ops.cache_write import CacheWriteParams

_SMALLEST_NORMAL = tl.constexpr(2.0**-126)


def configuration(num_tokens: int) -> tuple[int, int, int | None]:
    """Return BLOCK_TOKENS, num_warps and maxnreg, so that all programs fit one wave."""
    if num_tokens <= 2048:
        return 1, 1, None
    return (2, 1, None) if num_tokens <= 4096 else (4, 1, 128)


@triton.jit
def _load_latent(row, RANK: tl.constexpr, TILE: tl.constexpr, TILES: tl.constexpr):
    """Load each row by tiles, [TOKENS, TILES, TILE].

    A weight is loaded for each token, so that its values are in the threads of the token's values.
    """
    column = tl.arange(0, TILES)[None, :, None] * TILE + tl.arange(0, TILE)[None, None, :]
    return widened(tl.load(row[:, None, None] + column, mask=column < RANK, other=0.0))


@triton.jit
def _inverse_rms(x, eps, RANK: tl.constexpr):
    """Return rsqrt(mean(x^2) + eps) of x [TOKENS, TILES, TILE], float32 [TOKENS]."""
    wide = x.to(tl.float64)
    total = tl.sum(tl.sum(wide * wide, 2), 1)
    return tl.div_rn(1.0, tl.sqrt_rn(mean_of(total, RANK) + eps))


@triton.jit
def _store_latent(
    latent_ptr,
    slot,
    live,
    x,
    first,
    second,
    RANK: tl.constexpr,
    HALF: tl.constexpr,
    TILE: tl.constexpr,
    TILES: tl.constexpr,
    FP8: tl.constexpr,
):
    """Store latents and k_pe of the `live` tokens, and in FP8 the scales of the tiles."""
    tile = tl.arange(0, TILES)[None, :]
    column = tile[:, :, None] * TILE + tl.arange(0, TILE)[None, None, :]
    mask = live[:, None, None] & (column < RANK)
    if FP8:
        record = latent_ptr + slot * (RANK + 4 * (RANK // TILE) + 4 * HALF)
        scale = tl.maximum(over_448(absolute_maximum(magnitude(x), 2)), _SMALLEST_NORMAL)
        codes = to_e4m3(quotient(x, scale[:, :, None]))
        tl.store(record[:, None, None] + column, codes, mask=mask)
        scales = (record + RANK).to(tl.pointer_type(tl.float32))[:, None] + tile
        tl.store(scales, scale, mask=live[:, None] & (tile * TILE < RANK))
        k_pe_out = (record + RANK + 4 * (RANK // TILE)).to(tl.pointer_type(tl.bfloat16))
    else:
        record = latent_ptr + slot * (RANK + 2 * HALF)
        tl.store(record[:, None, None] + column, stored(x, record), mask=mask)
        k_pe_out = record + RANK
    first, second = stored(first, k_pe_out), stored(second, k_pe_out)
    store_pairs(k_pe_out[:, None], first, second, live[:, None], HALF, True)


@triton.jit
def _standardised(a, b, c, d, eps, HALF: tl.constexpr):
    """Return (x - mean) * rsqrt(variance + eps) of the rows that `load_row` loaded."""
    total = (a.to(tl.float64) + b.to(tl.float64)) + (c.to(tl.float64) + d.to(tl.float64))
    mean = mean_of(tl.sum(total, 1), 4 * HALF)[:, None]
    a, b, c, d = a - mean, b - mean, c - mean, d - mean
    wa, wb, wc, wd = a.to(tl.float64), b.to(tl.float64), c.to(tl.float64), d.to(tl.float64)
    total = (wa * wa + wb * wb) + (wc * wc + wd * wd)
    factor = tl.div_rn(1.0, tl.sqrt_rn(mean_of(tl.sum(total, 1), 4 * HALF) + eps))[:, None]
    return a * factor, b * factor, c * factor, d * factor


@triton.jit
def _store_index(
    index_ptr,
    slot,
    live,
    a,
    b,
    c,
    d,
    HALF: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    FP8: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    HADAMARD: tl.constexpr,
    UE8M0: tl.constexpr,
):
    """Store index keys of the `live` tokens, and in FP8 their scales."""
    out = index_ptr + slot * (4 * HALF)
    if FP8:
        # a block has its keys, then its scales of 4 bytes each
        block, offset = slot // BLOCK_SIZE, slot % BLOCK_SIZE
        out = (out + block * (4 * BLOCK_SIZE))[:, None]
        scales = index_ptr + block * (BLOCK_SIZE * (4 * HALF + 4)) + BLOCK_SIZE * 4 * HALF
        scale = scale_of_row(a, b, c, d, UE8M0)
        tl.store(scales.to(tl.pointer_type(tl.float32)) + offset, scale, mask=live)
        store_row_codes(out, a, b, c, d, scale, live[:, None], HALF, INTERLEAVED, HADAMARD, UE8M0)
    else:
        store_row(out[:, None], a, b, c, d, live[:, None], HALF, INTERLEAVED, HADAMARD)


@triton.jit
def _load_angles(cos_sin_ptr, row, HALF: tl.constexpr):
    """Load cos and sin [TOKENS, HALF] from rows of the table."""
    angle = (cos_sin_ptr + row * (2 * HALF))[:, None] + tl.arange(0, HALF)[None, :]
    return tl.load(angle), tl.load(angle + HALF)


@step_kernel(
    strided=("kv_a_ptr", "index_k_ptr"), specialized=("kv_a_stride", "index_k_stride"), waits=True
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
    num_positions,
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
    """Write the keys of BLOCK_TOKENS tokens. A pointer that is None leaves its part out.

    All loads are before the first store, because a store would delay them. Loads that depend only
    on the token's number are first, so rows of tokens without a slot are loaded too. Weights are
    loaded later if many tokens need the registers, because weights are in the L1 cache.
    """
    wait_for_inputs()
    start_next()
    EARLY: tl.constexpr = BLOCK_TOKENS == 1
    token = tl.program_id(0) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    known = token < num_tokens
    token = tl.minimum(token, num_tokens - 1).to(tl.int64)
    # zeros, so that the address of a weight is the same for each token
    none = token * 0
    slot = tl.load(slot_mapping_ptr + token)
    if position_ids_ptr is not None:
        position = tl.load(position_ids_ptr + token)
    elif cos_sin_ptr is not None:
        cos, sin = _load_angles(cos_sin_ptr, token, HALF)
    if kv_a_ptr is not None:
        kv_a_row = kv_a_ptr + token * kv_a_stride
        x = _load_latent(kv_a_row, RANK, TILE, TILES)
        first, second = load_pairs((kv_a_row + RANK)[:, None], None, HALF, True)
        if EARLY and kv_weight_ptr is not None:
            kv_weight = _load_latent(kv_weight_ptr + none, RANK, TILE, TILES)
    if index_k_ptr is not None:
        index_k_row = (index_k_ptr + token * index_k_stride)[:, None]
        a, b, c, d = load_row(index_k_row, None, HALF, INTERLEAVED, HADAMARD)
        if k_weight_ptr is not None:
            k_weight_row, k_bias_row = (k_weight_ptr + none)[:, None], (k_bias_ptr + none)[:, None]
            if EARLY:
                wa, wb, wc, wd = load_row(k_weight_row, None, HALF, INTERLEAVED, HADAMARD)
                ba, bb, bc, bd = load_row(k_bias_row, None, HALF, INTERLEAVED, HADAMARD)
    live = known & (slot >= 0) & (slot < num_slots)
    # an invalid slot or position must not become an address
    slot = tl.where(live, slot, 0)
    if position_ids_ptr is not None:
        position = tl.minimum(tl.maximum(position, 0), num_positions - 1)
        cos, sin = _load_angles(cos_sin_ptr, position, HALF)
    if kv_a_ptr is not None:
        if kv_weight_ptr is not None:
            factor = _inverse_rms(x, kv_eps, RANK)[:, None, None]
            if not EARLY:
                kv_weight = _load_latent(kv_weight_ptr + none, RANK, TILE, TILES)
            x = x * factor * kv_weight
        if cos_sin_ptr is not None:
            first, second = rotated(first, second, cos, sin)
        _store_latent(latent_ptr, slot, live, x, first, second, RANK, HALF, TILE, TILES, FP8)
    if index_k_ptr is not None:
        if k_weight_ptr is not None:
            if not EARLY:
                wa, wb, wc, wd = load_row(k_weight_row, None, HALF, INTERLEAVED, HADAMARD)
                ba, bb, bc, bd = load_row(k_bias_row, None, HALF, INTERLEAVED, HADAMARD)
            a, b, c, d = _standardised(a, b, c, d, k_eps, HALF)
            a, b, c, d = a * wa + ba, b * wb + bb, c * wc + bc, d * wd + bd
        if cos_sin_ptr is not None:
            a, b = rotated(a, b, cos, sin)
        if HADAMARD:
            a, b, c, d = hadamard(a, b, c, d, HALF, INTERLEAVED)
        _store_index(
            index_ptr, slot, live, a, b, c, d, HALF, BLOCK_SIZE, FP8, INTERLEAVED, HADAMARD, UE8M0
        )


def write_caches(
    kv_a: Tensor | None,
    index_k: Tensor | None,
    position_ids: Tensor | None,
    slot_mapping: Tensor,
    cos_sin_cache: Tensor | None,
    latent_cache: Tensor | None,
    index_cache: Tensor | None,
    params: CacheWriteParams,
) -> None:
    """Write the caches as `fd_dsa.ops.cache_write.write_caches`, in one launch."""
    num_tokens = slot_mapping.shape[0]
    if num_tokens == 0:
        return
    block_tokens, num_warps, maxnreg = configuration(rows_of_tiles(num_tokens))
    rows, caches = (kv_a, index_k, position_ids, slot_mapping), (latent_cache, index_cache)
    write_caches_kernel[(-(-num_tokens // block_tokens),)](
        **kernel_arguments(*rows, cos_sin_cache, *caches, params),
        BLOCK_TOKENS=block_tokens,
        num_warps=num_warps,
        maxnreg=maxnreg,
        enable_fp_fusion=False,
    )


def kernel_arguments(
    kv_a: Tensor | None,
    index_k: Tensor | None,
    position_ids: Tensor | None,
    slot_mapping: Tensor,
    cos_sin_cache: Tensor | None,
    latent_cache: Tensor | None,
    index_cache: Tensor | None,
    params: CacheWriteParams,
) -> dict[str, object]:
    """Return the arguments of `write_caches_kernel` by name, without BLOCK_TOKENS.

    The launch must have `enable_fp_fusion=False`.

    Raises:
        ShapeError: the kernel has no tiles for a width, or the caches have different sizes.
    """
    half = _rope_half(kv_a, index_k, cos_sin_cache, params)
    rank = kv_a.shape[1] - 2 * half if kv_a is not None else TILE_WIDTH
    tile = min(TILE_WIDTH, next_power_of_2(rank))
    if kv_a is not None and params.kv_norm_weight is not None:
        check_shape("write_caches", "kv_norm_weight", params.kv_norm_weight, (rank,))
    positions, num_positions = None, 0
    if cos_sin_cache is not None and position_ids is not None:
        positions, num_positions = position_ids, cos_sin_cache.shape[0]
    caches = [cache for cache in (latent_cache, index_cache) if cache is not None]
    sizes = {cache.shape[0] * cache.shape[-2] for cache in caches}
    if len(sizes) > 1:
        raise ShapeError(f"write_caches: caches have {sorted(sizes)} slots, allowed is one size")
    return {
        "kv_a_ptr": kv_a,
        "kv_a_stride": _row_stride("kv_a", kv_a),
        "index_k_ptr": index_k,
        "index_k_stride": _row_stride("index_k", index_k),
        "position_ids_ptr": positions,
        "slot_mapping_ptr": slot_mapping,
        "cos_sin_ptr": cos_sin_cache,
        "latent_ptr": latent_cache,
        "index_ptr": index_cache,
        "kv_weight_ptr": params.kv_norm_weight,
        "k_weight_ptr": params.k_norm_weight,
        "k_bias_ptr": params.k_norm_bias,
        "num_tokens": slot_mapping.shape[0],
        "num_slots": sizes.pop(),
        "num_positions": num_positions,
        "kv_eps": params.kv_norm_eps,
        "k_eps": params.k_norm_eps,
        "RANK": rank,
        "HALF": half,
        "BLOCK_SIZE": caches[0].shape[-2],
        "TILE": tile,
        "TILES": next_power_of_2(-(-rank // tile)),
        "FP8": CACHE_FORMATS[params.kv_cache_dtype].is_fp8,
        "INTERLEAVED": params.index_rope_interleave,
        "HADAMARD": params.index_hadamard,
        "UE8M0": params.index_scale_fmt == "ue8m0",
    }


def _rope_half(
    kv_a: Tensor | None,
    index_k: Tensor | None,
    cos_sin_cache: Tensor | None,
    params: CacheWriteParams,
) -> int:
    """Return the pairs of a RoPE slice, half of rope_dim.

    Without a rotation the number only splits the rows for loads.

    Raises:
        ShapeError: the kernel has no tiles for the width.
    """
    if cos_sin_cache is not None:
        half = cos_sin_cache.shape[1] // 2
    elif index_k is not None:
        half = index_k.shape[1] // 4
    else:
        is_wide = kv_a is not None and kv_a.shape[1] > 64
        half = params.rope_width(kv_a, None) // 2 or (32 if is_wide else 1)
    if half < 1 or half & (half - 1):
        raise ShapeError(f"write_caches: a device needs a power of two as rope_dim, got {2 * half}")
    if index_k is not None and index_k.shape[1] != 4 * half:
        raise ShapeError(
            f"write_caches: a device needs index_head_dim = 2 * rope_dim, got "
            f"{index_k.shape[1]} and {2 * half}"
        )
    return half


def _row_stride(name: str, rows: Tensor | None) -> int:
    """Return the stride of rows, in values.

    Raises:
        ShapeError: a row has gaps, or pairs of its values are not aligned.
    """
    if rows is None:
        return 0
    (stride,) = outer_strides("write_caches", name, rows)
    if (stride | rows.shape[1]) % 2 or rows.data_ptr() % (2 * rows.element_size()):
        raise ShapeError(
            f"write_caches: rows of {name} are {stride} values apart, from address "
            f"{rows.data_ptr()}; a device needs both even, in values"
        )
    return stride
