"""e4m3 codes and the two cache records, as custom_ops/gpu_ops/append_attn/ds_mla_cache_kernel.cuh
and the indexer's cache operators lay them out.
"""

from __future__ import annotations

import numpy as np

BLOCK, TILE, LATENT, ROPE, INDEX = 64, 128, 512, 64, 128
RECORD = LATENT + 4 * LATENT // TILE + 2 * ROPE
INDEX_RECORD = INDEX + 4
LARGEST = np.float32(448.0)

_CODES = np.arange(127)
_POSITIVE = np.where(
    _CODES < 8, np.ldexp(_CODES, -9), np.ldexp(1.0 + (_CODES & 7) / 8.0, (_CODES >> 3) - 7)
)
_VALUES = np.concatenate([_POSITIVE, [np.nan], -_POSITIVE, [np.nan]]).astype(np.float32)


def encode(x: np.ndarray) -> np.ndarray:
    """uint8 codes: nearest, the even one of two, at most 448; NaN is 127."""
    nan = np.isnan(x)
    size = np.minimum(np.where(nan, 0, np.abs(x)), LARGEST)
    # below 2^-6 numbers are as far apart as just above it
    exponent = np.where(size < 2.0**-6, -6, np.frexp(size)[1] - 1)
    eighths = np.rint(np.ldexp(size, 3 - exponent)).astype(np.int32)
    codes = np.where(nan, 127, eighths + 8 * (exponent + 6))
    return (codes + 128 * np.signbit(x)).astype(np.uint8)


def decode(codes: np.ndarray) -> np.ndarray:
    """float32 values of uint8 codes."""
    return _VALUES[codes]


def latent_records(latent: np.ndarray, rope: np.ndarray) -> np.ndarray:
    """uint8 [T, 656] of float32 latent [T, 512] and rotated key [T, 64]: raw float32 scales."""
    tiles = latent.astype(np.float32).reshape(len(latent), -1, TILE)
    scales = np.maximum(np.abs(tiles).max(-1) / LARGEST, np.finfo(np.float32).tiny)
    codes = encode(tiles / scales[..., None]).reshape(len(latent), -1)
    bits = np.ascontiguousarray(rope, np.float32).view(np.uint32)
    half = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.concatenate([codes, scales.view(np.uint8), half.view(np.uint8)], axis=1)


def latent_values(records: np.ndarray) -> np.ndarray:
    """float32 [n, 576] of uint8 records [n, 656]: 512 latents, then 64 of the rotated key."""
    tiles = decode(records[:, :LATENT]).reshape(-1, LATENT // TILE, TILE)
    scales = np.ascontiguousarray(records[:, LATENT : LATENT + 16]).view(np.float32)
    half = np.ascontiguousarray(records[:, LATENT + 16 :]).view(np.uint16)
    rope = (half.astype(np.uint32) << 16).view(np.float32)
    return np.concatenate([(tiles * scales[..., None]).reshape(-1, LATENT), rope], axis=1)


def power_of_two_scales(absmax: np.ndarray, least: float = 1e-4) -> np.ndarray:
    """absmax / 448, rounded up to a power of two ("ue8m0")."""
    scale = np.maximum(absmax, np.float32(least)).astype(np.float32) / LARGEST
    mantissa, exponent = np.frexp(scale)
    return np.ldexp(np.float32(1.0), np.where(mantissa == 0.5, exponent - 1, exponent))


def index_keys(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Codes uint8 [T, 128] and scales float32 [T] of float32 keys [T, 128]."""
    scales = power_of_two_scales(np.abs(keys).max(-1)).astype(np.float32)
    return encode(keys.astype(np.float32) / scales[:, None]), scales


def index_planes(cache: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Views of an indexer cache uint8 [N, 64, 132]: codes [N, 64, 128], scales float32 [N, 64]."""
    blocks = cache.reshape(len(cache), -1)
    codes = blocks[:, : BLOCK * INDEX].reshape(len(cache), BLOCK, INDEX)
    return codes, blocks[:, BLOCK * INDEX :].view(np.float32)
