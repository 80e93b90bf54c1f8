"""Self-checks of the operators that write and read caches, see `probes.py`.

Scores and attention are sums in an order that the device chooses. So they are compared with their
definition in float64. Written caches, queries and dequantized keys must have the CPU's bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import numpy as np

from fd_dsa.cache_formats import (
    CACHE_FORMATS,
    INDEX_RECORD_BYTES,
    INDEX_WIDTH,
    LATENT_RECORD_BYTES,
    LATENT_ROPE_AT,
    LATENT_SCALES_AT,
    LATENT_WIDTH,
    ROPE_WIDTH,
    TILE_WIDTH,
)
from fd_dsa.ops.cache_write import CacheWriteParams
from fd_dsa.ops.fp8 import E4M3_VALUES
from fd_dsa.ops.probes import STEP_CASES, UNTOUCHED, Call, Case, Memory, Outputs, require

FORMATS = tuple(CACHE_FORMATS)
_BLOCK, _BLOCKS, _HEADS = 64, 6, 4
_WIDTH, _RANK, _ROPE, _TILE = INDEX_WIDTH, LATENT_WIDTH, ROPE_WIDTH, TILE_WIDTH
_SLOTS = np.array([70, 0, -1, 127, 5], np.int64)
_POSITIONS = np.array([0, 3, 7, 15, 1], np.int64)
# three tokens of a prompt after a prefix, one of a decode row, one of padding
_STEP = [3, 0], [66, 70], [3, 1]
_TOKENS = (0, 66), (0, 67), (0, 68), (1, 70), (-1, 0)
_LONGEST, _SCALE = 71, 0.05


def _angles(rng: np.random.Generator) -> np.ndarray:
    """Return cos and sin of random angles, float32 [16, 64]."""
    angle = rng.uniform(0, 6, (16, _ROPE // 2))
    return np.concatenate([np.cos(angle), np.sin(angle)], axis=1).astype(np.float32)


def _codes(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Return codes of random e4m3 numbers, uint8, without NaN."""
    codes = rng.integers(0, 256, shape, np.uint8)
    return np.where(codes & 0x7F == 0x7F, np.uint8(0), codes)


def _floats(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Return random float32 numbers that bfloat16 represents exactly."""
    bits = rng.normal(0, 1, shape).astype(np.float32).view(np.uint32) & 0xFFFF0000
    return bits.view(np.float32)


def _bfloat16(values: np.ndarray) -> np.ndarray:
    """Return the int16 bits of float32 values that bfloat16 represents exactly."""
    return (np.ascontiguousarray(values).view(np.uint32) >> 16).astype(np.uint16).view(np.int16)


def _stored(keys: np.ndarray, form: str) -> np.ndarray:
    """Return keys as a float32 or bfloat16 cache stores them."""
    return keys if form == "float32" else _bfloat16(keys)


def _latent_cache(rng: np.random.Generator, form: str) -> tuple[np.ndarray, np.ndarray]:
    """Return a latent cache with one row for each slot, and its keys as float64."""
    num_slots = _BLOCKS * _BLOCK
    keys = _floats(rng, (num_slots, _RANK + _ROPE))
    if form != "fp8_ds_mla":
        return _stored(keys, form), keys.astype(np.float64)
    codes = _codes(rng, (num_slots, _RANK // _TILE, _TILE))
    scales = rng.uniform(0.002, 0.02, codes.shape[:2]).astype(np.float32)
    k_pe = _bfloat16(keys[:, _RANK:])
    parts = codes.reshape(num_slots, -1), scales.view(np.uint8), k_pe.view(np.uint8)
    latents = (E4M3_VALUES[codes].astype(np.float64) * scales[..., None]).reshape(num_slots, -1)
    return np.concatenate(parts, axis=1), np.concatenate([latents, keys[:, _RANK:]], axis=1)


def _index_cache(rng: np.random.Generator, form: str) -> tuple[np.ndarray, np.ndarray]:
    """Return an indexer cache, and its keys as float64 [num_slots, width]."""
    shape = (_BLOCKS, _BLOCK, _WIDTH)
    if form != "fp8_ds_mla":
        keys = _floats(rng, shape)
        return _stored(keys, form), keys.reshape(-1, _WIDTH).astype(np.float64)
    codes = _codes(rng, shape)
    scales = rng.uniform(0.1, 2, shape[:2]).astype(np.float32)
    planes = codes.reshape(_BLOCKS, -1), scales.view(np.uint8)
    keys = E4M3_VALUES[codes].astype(np.float64) * scales[..., None]
    cache = np.concatenate(planes, axis=1).reshape(_BLOCKS, _BLOCK, INDEX_RECORD_BYTES)
    return cache, keys.reshape(-1, _WIDTH)


def _rotated(x: np.ndarray, cos: np.ndarray, sin: np.ndarray, interleaved: bool) -> np.ndarray:
    """Rotate the first values, in pairs of neighbours or of both halves."""
    x, rest = x[..., :_ROPE].astype(np.float64), x[..., _ROPE:]
    first, second = (x[..., ::2], x[..., 1::2]) if interleaved else np.split(x, 2, axis=-1)
    pair = first * cos - second * sin, second * cos + first * sin
    turned = np.stack(pair, -1).reshape(x.shape) if interleaved else np.concatenate(pair, -1)
    return np.concatenate([turned, rest], axis=-1)


def _require_e4m3(codes: np.ndarray, scales: np.ndarray, expected: np.ndarray) -> None:
    """Raise CheckFailed unless codes times scales are within one rounding of `expected`."""
    values = E4M3_VALUES[codes].astype(np.float64) * scales[..., None]
    # half a step of a normal or of a subnormal number, and the rounding of the norms
    allowed = 2.0**-4 * abs(expected) + 2.0**-10 * scales[..., None] + 1e-5
    off = abs(values - expected)
    require(off <= allowed, f"e4m3 values are off by {off.max()}")


def _drawn(rng: np.random.Generator, *shapes: tuple[int, ...]) -> list[np.ndarray]:
    """Return arrays of normal random numbers, float32."""
    return [rng.normal(0, 2, shape).astype(np.float32) for shape in shapes]


def _cache_write(call: Call, memory: Memory) -> Iterator[Outputs]:
    """Write five tokens, one of them without a slot, to fp8_ds_mla caches of two blocks.

    Written records must be within one step of e4m3 or bfloat16 of their definition. Other records
    must keep their bytes.
    """
    rng = np.random.default_rng(2)
    kv_a, index_k, *norms = _drawn(rng, (5, _RANK + _ROPE), (5, _WIDTH), (_RANK,), *2 * [(_WIDTH,)])
    cos_sin = _angles(rng)
    latent = memory.blank((2, 1, _BLOCK, LATENT_RECORD_BYTES), np.uint8)
    index = memory.blank((2, _BLOCK, INDEX_RECORD_BYTES), np.uint8)
    names = "kv_norm_weight", "k_norm_weight", "k_norm_bias"
    stored = dict(zip(names, map(memory.put, norms), strict=True))
    params = CacheWriteParams("fp8_ds_mla", **stored)
    inputs = map(memory.put, (kv_a, index_k, _POSITIONS, _SLOTS, cos_sin))
    call(*inputs, latent, index, params)
    out = {"latent": memory.get(latent), "index": memory.get(index)}
    yield out

    kept, slots = _SLOTS >= 0, _SLOTS[_SLOTS >= 0]
    cos, sin = (half[_POSITIONS] for half in np.split(cos_sin.astype(np.float64), 2, axis=1))
    kv_norm, k_norm, k_bias = norms
    x = kv_a[:, :_RANK].astype(np.float64)
    x = x / np.sqrt((x**2).mean(1, keepdims=True) + 1e-6) * kv_norm
    pe = _rotated(kv_a[:, _RANK:], cos, sin, interleaved=True)
    k = index_k - index_k.mean(1, keepdims=True, dtype=np.float64)
    k = k / np.sqrt((k**2).mean(1, keepdims=True) + 1e-6) * k_norm + k_bias
    k = _rotated(k, cos, sin, interleaved=False)

    records = out["latent"].reshape(-1, LATENT_RECORD_BYTES)
    scales = records[slots, LATENT_SCALES_AT:LATENT_ROPE_AT].copy().view(np.float32)
    codes, latents = (a.reshape(*scales.shape, _TILE) for a in (records[slots, :_RANK], x[kept]))
    _require_e4m3(codes, scales, latents)
    # bfloat16 is the upper half of a float32
    bits = records[slots, LATENT_ROPE_AT:].copy().view(np.uint16).astype(np.uint32) << 16
    require(abs(bits.view(np.float32) - pe[kept]) <= 2.0**-8 * abs(pe[kept]) + 1e-6, "k_pe is off")
    blocks = out["index"].reshape(2, -1)
    keys = blocks[:, : _BLOCK * _WIDTH].reshape(-1, _WIDTH)
    key_scales = blocks[:, _BLOCK * _WIDTH :].copy().view(np.float32).reshape(-1)
    _require_e4m3(keys[slots], key_scales[slots], k[kept])
    others = np.setdiff1d(np.arange(2 * _BLOCK), slots)
    require(records[others] == UNTOUCHED, "a latent record without a token was written")
    require(keys[others] == UNTOUCHED, "an index key without a token was written")


def _indexer_query(call: Call, memory: Memory) -> Iterator[Outputs]:
    """Quantise three tokens of four heads.

    The rotated queries must be codes times a power of two, which is folded into the weights.
    """
    rng = np.random.default_rng(3)
    (q, weights), cos_sin = _drawn(rng, (3, _HEADS, _WIDTH), (3, _HEADS)), _angles(rng)
    made = memory.blank(q.shape, np.uint8), memory.blank(weights.shape, np.float32)
    inputs = map(memory.put, (q, weights, _POSITIONS[:3], cos_sin))
    call(*inputs, rope_interleave=False, quantized=True, out=made)
    out = dict(zip(("codes", "folded"), map(memory.get, made), strict=True))
    yield out
    cos, sin = (half[_POSITIONS[:3], None] for half in np.split(cos_sin, 2, axis=1))
    scales = out["folded"].astype(np.float64) / weights
    require(np.frexp(scales)[0] == 0.5, "a scale is no power of two")
    _require_e4m3(out["codes"], scales, _rotated(q, cos, sin, interleaved=False))


def _mla_query(call: Call, memory: Memory) -> Iterator[Outputs]:
    """Make the queries of three tokens of four heads. The rotated part is a slice of wider heads.

    The latent part must be unchanged. Neighbours of the other part are rotated by the angle of
    their position.
    """
    rng = np.random.default_rng(9)
    latent, heads = _drawn(rng, (3, _HEADS, _RANK), (3, _HEADS, 2 * _ROPE))
    cos_sin, query = _angles(rng), memory.blank((3, _HEADS, _RANK + _ROPE), np.float32)
    inputs = memory.put(latent), memory.put(heads)[:, :, _ROPE:]
    call(*inputs, memory.put(_POSITIONS[:3]), memory.put(cos_sin), query)
    out = {"query": memory.get(query)}
    yield out
    cos, sin = (half[_POSITIONS[:3], None] for half in np.split(cos_sin, 2, axis=1))
    turned = _rotated(heads[:, :, _ROPE:], cos, sin, interleaved=True)
    require(out["query"][..., :_RANK] == latent, "the latent part is another")
    off = abs(out["query"][..., _RANK:] - turned).max()
    require(off <= 1e-6 * (1 + abs(turned).max()), f"the rotated part is off by {off}")


def _logits(
    formats: tuple[str, ...], tolerance: float, call: Call, memory: Memory
) -> Iterator[Outputs]:
    """Score five tokens over caches of some formats.

    Scores in a token's window must be the weighted sums over heads. Other scores must keep their
    bytes.
    """
    rng = np.random.default_rng(6)
    tables = rng.permutation(_BLOCKS).astype(np.int32).reshape(2, 3)
    weights = rng.normal(0, 1, (5, _HEADS)).astype(np.float32)
    step, out, known = memory.step(_STEP, tables, _BLOCK, 5), {}, {}
    for form in formats:
        cache, keys = _index_cache(rng, form)
        draw = _codes if form == "fp8_ds_mla" else _floats
        q = draw(rng, (5, _HEADS, _WIDTH))
        logits = memory.blank((5, _LONGEST), np.float32)
        call(*map(memory.put, (q, weights, cache)), step, logits)
        out[form] = memory.get(logits)
        known[form] = E4M3_VALUES[q] if form == "fp8_ds_mla" else q, keys
    yield out
    for form, (q, keys) in known.items():
        for token, (row, position) in enumerate(_TOKENS):
            window = np.arange(0 if row < 0 else position + 1)
            own = keys[tables[row, window // _BLOCK] * _BLOCK + window % _BLOCK]
            query, weight = q[token].astype(np.float64), weights[token].astype(np.float64)
            expected = weight @ np.maximum(query @ own.T, 0)
            allowed = tolerance * (abs(weight) @ (abs(query) @ abs(own).T))
            scores, rest = np.split(out[form][token], [len(window)])
            off = abs(scores - expected)
            message = f"{form}: scores of token {token} are off by {off.max(initial=0)}"
            require(off <= allowed, message)
            message = f"{form}: token {token} was written past its window"
            require(rest.view(np.uint8) == UNTOUCHED, message)


def logits_case(formats: tuple[str, ...] = FORMATS, tolerance: float = 1e-5) -> Case:
    """Make a case of scores.

    Args:
        formats: formats of the caches.
        tolerance: allowed difference, as a fraction of the sum of the magnitudes of all terms.
    """
    return Case(partial(_logits, formats, tolerance), same_bytes=False)


def _mla(
    limits: dict[str, float], heads: int, bfloat16: bool, call: Call, memory: Memory
) -> Iterator[Outputs]:
    """Attend for tokens that see 150, 1, no and 17 keys, over caches of some formats.

    The expected result is the mean of the selected latents, weighted by the softmax of the scores.
    """
    rng = np.random.default_rng(7)
    q = _floats(rng, (4, heads, _RANK + _ROPE))
    slots = np.full((4, 150), -1, np.int32)
    for token, count in enumerate((150, 1, 0, 17)):
        slots[token, :count] = np.sort(rng.choice(_BLOCKS * _BLOCK, count, replace=False))
    out, known = {}, {}
    for form in limits:
        cache, known[form] = _latent_cache(rng, form)
        query = memory.put(_bfloat16(q), "bfloat16") if bfloat16 else memory.put(q)
        stored = memory.put(cache, "bfloat16" if bfloat16 and form == "bfloat16" else "")
        result = memory.blank((4, heads, _RANK), np.float32)
        options = {"softmax_scale": _SCALE, "kv_lora_rank": _RANK}
        call(query, stored, memory.put(slots), result, **options)
        out[form] = memory.get(result)
    yield out
    for form, limit in limits.items():
        for token, row in enumerate(slots):
            keys = known[form][row[row >= 0]]
            scores = _SCALE * q[token].astype(np.float64) @ keys.T
            weights = np.exp(scores - scores.max(axis=1, keepdims=True, initial=0))
            total = weights.sum(axis=1, keepdims=True)
            expected = weights / np.where(total == 0, 1, total) @ keys[:, :_RANK]
            off = abs(out[form][token] - expected)
            message = f"{form}, {heads} heads: outputs of token {token} are off by {off.max()}"
            require(off <= limit * abs(expected).max(), message)


def mla_case(tolerance: dict[str, float] | None = None, heads: int = 3) -> Case:
    """Make a case of attention, on tensor cores with bfloat16 queries if there is a tolerance.

    Args:
        tolerance: format of the cache -> allowed difference, as a fraction of the largest result;
            None = that of float32 arithmetic, for all formats.
        heads: number of heads.
    """
    limits = tolerance or dict.fromkeys(FORMATS, 1e-5)
    return Case(partial(_mla, limits, heads, tolerance is not None), same_bytes=False)


def _dequantize(call: Call, memory: Memory) -> Iterator[Outputs]:
    """Dequantize keys of some slots, one of them twice."""
    rng, out, known = np.random.default_rng(4), {}, {}
    slots = np.array([70, 0, 383, 5, 70], np.int64)
    for form in FORMATS:
        cache, keys = _latent_cache(rng, form)
        values = memory.blank((5, _RANK + _ROPE), np.float32)
        call(memory.put(cache), memory.put(slots), values)
        out[form], known[form] = memory.get(values), keys[slots].astype(np.float32)
    yield out
    for form, keys in known.items():
        require(out[form] == keys, f"{form}: a key is another")


CASES: dict[str, Case] = {
    **STEP_CASES,
    "cache_write": Case(_cache_write),
    "indexer_query": Case(_indexer_query),
    "mla_query": Case(_mla_query),
    "indexer_logits": logits_case(),
    "sparse_mla": mla_case(),
    "dequantize": Case(_dequantize),
}
TENSOR_CORE_TOLERANCE = {"fp8_ds_mla": 4e-3, "bfloat16": 2e-2}
"""Format of the cache -> allowed difference of attention, because weights have 8 to 11 bits."""
# GEMMs on tensor cores have other widths and do not support float32. 20 heads select one kernel of
# custom_ops/ over records, and the other one over bfloat16 latents
TENSOR_CORE_CASES = {
    "indexer_logits": logits_case(("fp8_ds_mla",), 2e-4),
    "sparse_mla": mla_case(TENSOR_CORE_TOLERANCE, 20),
}
