"""Checks of the operators that fill caches and prepare queries."""

from __future__ import annotations

import numpy as np

from fd_dsa.doctor.case import UNTOUCHED, Memory, Outputs, require
from fd_dsa.ops._fp8 import E4M3_VALUES, INDEX_RECORD_BYTES, LATENT_RECORD_BYTES
from fd_dsa.ops.cache_write import CacheWriteParams, write_caches
from fd_dsa.ops.query import prepare_indexer_query

_BLOCK, _RANK, _ROPE, _WIDTH = 64, 512, 64, 128


def _angles(rng: np.random.Generator) -> np.ndarray:
    """float32 [16, 64]: cos and sin of random angles."""
    angle = rng.uniform(0, 6, (16, _ROPE // 2))
    return np.concatenate([np.cos(angle), np.sin(angle)], axis=1).astype(np.float32)


_SLOTS = np.array([70, 0, -1, 127, 5], np.int64)
_POSITIONS = np.array([0, 3, 7, 15, 1], np.int64)


def _cache_inputs() -> dict[str, np.ndarray]:
    """What the cache check writes."""
    rng = np.random.default_rng(2)
    shapes = {
        "kv_a": (5, _RANK + _ROPE),
        "index_k": (5, _WIDTH),
        "kv_norm_weight": (_RANK,),
        "k_norm_weight": (_WIDTH,),
        "k_norm_bias": (_WIDTH,),
    }
    drawn = {name: rng.normal(0, 2, shape).astype(np.float32) for name, shape in shapes.items()}
    return drawn | {"cos_sin": _angles(rng)}


def cache_write(memory: Memory) -> Outputs:
    """Five tokens, one without a slot, into fp8_ds_mla caches of two blocks."""
    given = {name: memory.put(array) for name, array in _cache_inputs().items()}
    latent = memory.put(np.full((2, 1, _BLOCK, LATENT_RECORD_BYTES), UNTOUCHED, np.uint8))
    index = memory.put(np.full((2, _BLOCK, INDEX_RECORD_BYTES), UNTOUCHED, np.uint8))
    weights = {name: given[name] for name in given if "norm" in name}
    write_caches(
        given["kv_a"],
        given["index_k"],
        memory.put(_POSITIONS),
        memory.put(_SLOTS),
        given["cos_sin"],
        latent,
        index,
        CacheWriteParams("fp8_ds_mla", **weights),
    )
    return {"latent": memory.get(latent), "index": memory.get(index)}


def is_cache_write(out: Outputs) -> None:
    """Every record is within one step of e4m3 or bfloat16 of its definition; no other changed."""
    given = {name: array.astype(np.float64) for name, array in _cache_inputs().items()}
    kept, slots = _SLOTS >= 0, _SLOTS[_SLOTS >= 0]
    cos, sin = (half[_POSITIONS] for half in np.split(given["cos_sin"], 2, axis=1))
    x, pe = given["kv_a"][:, :_RANK], given["kv_a"][:, _RANK:]
    x = x / np.sqrt((x**2).mean(1, keepdims=True) + 1e-6) * given["kv_norm_weight"]
    first, second = pe[:, ::2], pe[:, 1::2]
    pe = np.stack([first * cos - second * sin, second * cos + first * sin], -1).reshape(5, -1)
    k = given["index_k"] - given["index_k"].mean(1, keepdims=True)
    k = k / np.sqrt((k**2).mean(1, keepdims=True) + 1e-6)
    k = _rotate_halves(k * given["k_norm_weight"] + given["k_norm_bias"], cos, sin)

    records = out["latent"].reshape(-1, LATENT_RECORD_BYTES)
    scales = records[slots, _RANK : _RANK + 16].copy().view(np.float32)
    _require_e4m3(records[slots, :_RANK].reshape(-1, 4, 128), scales, x[kept].reshape(-1, 4, 128))
    # bfloat16 is the upper half of a float32
    bits = records[slots, _RANK + 16 :].copy().view(np.uint16).astype(np.uint32) << 16
    require(abs(bits.view(np.float32) - pe[kept]) <= 2.0**-8 * abs(pe[kept]) + 1e-6, "k_pe is off")
    blocks = out["index"].reshape(2, -1)
    keys = blocks[:, : _BLOCK * _WIDTH].reshape(-1, _WIDTH)
    key_scales = blocks[:, _BLOCK * _WIDTH :].copy().view(np.float32).reshape(-1)
    _require_e4m3(keys[slots], key_scales[slots], k[kept])
    others = np.setdiff1d(np.arange(2 * _BLOCK), slots)
    require(records[others] == UNTOUCHED, "a latent record without a token was written")
    require(keys[others] == UNTOUCHED, "an index key without a token was written")


def _rotate_halves(x: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
    """RoPE of the first values, the first half of them paired with the second."""
    half = _ROPE // 2
    first, second, rest = x[..., :half], x[..., half:_ROPE], x[..., _ROPE:]
    return np.concatenate([first * cos - second * sin, second * cos + first * sin, rest], axis=-1)


def _require_e4m3(codes: np.ndarray, scales: np.ndarray, wanted: np.ndarray) -> None:
    """Codes times their scale are within one rounding of the values they stand for."""
    found = E4M3_VALUES[codes].astype(np.float64) * scales[..., None]
    # half a step of a normal number, or of a subnormal one, and the rounding of the norms
    allowed = 2.0**-4 * abs(wanted) + 2.0**-10 * scales[..., None] + 1e-5
    require(abs(found - wanted) <= allowed, f"e4m3 values are off by {abs(found - wanted).max()}")


def indexer_query(memory: Memory) -> Outputs:
    """Three tokens of four heads, quantised."""
    rng = np.random.default_rng(3)
    q = rng.normal(0, 3, (3, 4, _WIDTH)).astype(np.float32)
    weights, cos_sin = rng.normal(0, 1, (3, 4)).astype(np.float32), _angles(rng)
    out = (memory.put(np.zeros(q.shape, np.uint8)), memory.put(np.zeros_like(weights)))
    prepare_indexer_query(
        *(memory.put(array) for array in (q, weights, _POSITIONS[:3], cos_sin)),
        rope_interleave=False,
        quantized=True,
        out=out,
    )
    folded = dict(zip(("codes", "folded"), map(memory.get, out), strict=True))
    return folded | {"q": q, "weights": weights, "cos_sin": cos_sin}


def is_indexer_query(out: Outputs) -> None:
    """Codes times a power of two are the rotated queries; the weights hold that power."""
    cos, sin = (half[_POSITIONS[:3], None] for half in np.split(out["cos_sin"], 2, axis=1))
    scales = out["folded"].astype(np.float64) / out["weights"]
    require(np.frexp(scales)[0] == 0.5, "a scale is no power of two")
    _require_e4m3(out["codes"], scales, _rotate_halves(out["q"].astype(np.float64), cos, sin))
