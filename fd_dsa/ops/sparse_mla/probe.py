"""Small cases on which a sparse MLA kernel of custom_ops/ has to agree before it serves."""

from __future__ import annotations

from typing import Any

import numpy as np

from fd_dsa.ops._fp8 import (
    LATENT_RECORD_BYTES,
    LATENT_ROPE_AT,
    LATENT_SCALES_AT,
    LATENT_TILES,
    LATENT_WIDTH,
    ROPE_WIDTH,
    decode_e4m3,
)
from fd_dsa.ops.cache_write.paddle_impl import bfloat16_bits
from fd_dsa.ops.sparse_mla.custom_op import CustomAttention
from fd_dsa.step.device import Allocate
from fd_dsa.triton_runtime.transfers import on_host, uploaded

_SLOTS, _TOPK, _SCALE = 300, 150, 0.05


def difference(kind: type[CustomAttention], kernels: Any, allocate: Allocate) -> str:
    """How far small cases over each cache are from the definition; "" where they are near.

    Waits for the device.

    Args:
        kind: of kernel.
        kernels: a library that offers to serve.
        allocate: makes a tensor of a shape and dtype on the device.
    """
    attend, rng = kind(kernels), np.random.default_rng(1)
    roped = rng.standard_normal((_SLOTS, LATENT_WIDTH + ROPE_WIDTH)).astype(np.float32)
    caches = [_records(rng), *([bfloat16_bits(roped)] if kind.takes_bfloat16 else [])]
    wrong = (_difference(attend, cache, allocate) for cache in caches)
    return next(filter(None, wrong), "")


def _records(rng: np.random.Generator) -> np.ndarray:
    """uint8 [num_slots, 656] fp8_ds_mla records."""
    cache = rng.integers(0, 120, (_SLOTS, LATENT_RECORD_BYTES)).astype(np.uint8)
    scales = rng.uniform(0.001, 0.01, (_SLOTS, LATENT_TILES)).astype(np.float32)
    roped = bfloat16_bits(rng.standard_normal((_SLOTS, ROPE_WIDTH)).astype(np.float32))
    cache[:, LATENT_SCALES_AT:LATENT_ROPE_AT] = scales.view(np.uint8)
    cache[:, LATENT_ROPE_AT:] = roped.view(np.uint8)
    return cache


def _difference(attend: CustomAttention, cache: np.ndarray, allocate: Allocate) -> str:
    """How far the cases over a cache are from the definition; "" where they are near."""
    rng, is_fp8 = np.random.default_rng(0), cache.dtype == np.uint8
    on_device = uploaded(allocate, cache, "uint8" if is_fp8 else "bfloat16")
    keys = _keys_of(cache) if is_fp8 else _widened(cache)
    for heads in attend.probed_heads:
        shape = 3, heads, LATENT_WIDTH + ROPE_WIDTH
        bits = bfloat16_bits(rng.standard_normal(shape).astype(np.float32)).view(np.uint16)
        slots = rng.integers(0, len(cache), (3, _TOPK)).astype(np.int32)
        slots[1, 9:], slots[2] = -1, -1
        wanted = _attended(_widened(bits), keys, slots)
        q, chosen = uploaded(allocate, bits, "bfloat16"), uploaded(allocate, slots, "int32")
        out = allocate(wanted.shape, "float32")
        attend(q, on_device, chosen, out, softmax_scale=_SCALE)
        error = np.linalg.norm(on_host(out, wanted) - wanted) / np.linalg.norm(wanted)
        if not error < (2e-3 if is_fp8 else 8e-3):
            return f"{heads} heads of the probe are off by {error:.1e} of the definition"
    return ""


def _attended(q: np.ndarray, keys: np.ndarray, slots: np.ndarray) -> np.ndarray:
    """float32 [tokens, heads, 512]: the definition, in NumPy; zeros where a row names no slot."""
    wanted = np.zeros((*q.shape[:2], LATENT_WIDTH), np.float32)
    for token, row in enumerate(slots):
        chosen = keys[row[row >= 0]].astype(np.float64)
        if len(chosen):
            scores = _SCALE * q[token] @ chosen.T
            weights = np.exp(scores - scores.max(axis=1, keepdims=True))
            weights /= weights.sum(axis=1, keepdims=True)
            wanted[token] = weights @ chosen[:, :LATENT_WIDTH]
    return wanted


def _keys_of(records: np.ndarray) -> np.ndarray:
    """float32 [num_slots, 576] of fp8_ds_mla records."""
    scales = np.ascontiguousarray(records[:, LATENT_SCALES_AT:LATENT_ROPE_AT]).view(np.float32)
    latents = decode_e4m3(records[:, :LATENT_WIDTH]) * np.repeat(
        scales, LATENT_WIDTH // LATENT_TILES, axis=1
    )
    roped = np.ascontiguousarray(records[:, LATENT_ROPE_AT:]).view(np.uint16)
    return np.concatenate([latents, _widened(roped)], axis=1)


def _widened(bits: np.ndarray) -> np.ndarray:
    """float32 values of bfloat16 bits."""
    return (bits.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
