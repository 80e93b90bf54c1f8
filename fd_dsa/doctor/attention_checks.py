"""Checks of the operators that read caches: scores, selection and attention.

Scores and attention are sums whose order a device chooses, so they are compared with their
definition in float64; a selection is exact.
"""

from __future__ import annotations

import numpy as np

from fd_dsa.doctor.case import UNTOUCHED, Memory, Outputs, require
from fd_dsa.ops._fp8 import E4M3_VALUES
from fd_dsa.ops.logits import PagedUnits, indexer_logits, paged_indexer_logits
from fd_dsa.ops.mla import masked_mla, sparse_mla
from fd_dsa.ops.topk import positions_to_slots, topk_indices

FORMATS = ("float32", "bfloat16", "fp8_ds_mla")
_BLOCK, _BLOCKS, _HEADS, _WIDTH = 64, 6, 4, 128
_RANK, _ROPE, _TILE = 512, 64, 128
# three tokens of a prefill row behind a prefix, one of a decode row, a padded one
_ROWS = np.array([0, 0, 0, 1, -1], np.int32)
_POSITIONS = np.array([66, 67, 68, 70, 0], np.int64)
_LONGEST = 71
_SCALE, _TOPK = 0.05, 24


def _tables(rng: np.random.Generator) -> np.ndarray:
    """int32 [2, 3]: blocks of the two rows."""
    return rng.permutation(_BLOCKS).astype(np.int32).reshape(2, 3)


def _slots(tables: np.ndarray, row: int, length: int) -> np.ndarray:
    """int64 [length]: slots of a row's first keys."""
    position = np.arange(length)
    return tables[row, position // _BLOCK].astype(np.int64) * _BLOCK + position % _BLOCK


def _codes(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """uint8: random e4m3 numbers."""
    codes = rng.integers(0, 256, shape, np.uint8)
    return np.where(codes & 0x7F == 0x7F, np.uint8(0), codes)


def _floats(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """float32: random numbers that bfloat16 holds."""
    return (rng.normal(0, 1, shape).astype(np.float32).view(np.uint32) & 0xFFFF0000).view(
        np.float32
    )


def _bfloat16(values: np.ndarray) -> np.ndarray:
    """int16 bits of float32 values that bfloat16 holds."""
    return (values.view(np.uint32) >> 16).astype(np.uint16).view(np.int16)


def _index_cache(rng: np.random.Generator, form: str) -> tuple[np.ndarray, np.ndarray]:
    """A cache of index keys, and the keys; float64 [num_slots, width]."""
    shape = (_BLOCKS, _BLOCK, _WIDTH)
    if form != "fp8_ds_mla":
        keys = _floats(rng, shape)
        cache = keys if form == "float32" else _bfloat16(keys)
        return cache, keys.reshape(-1, _WIDTH).astype(np.float64)
    codes = _codes(rng, shape)
    scales = rng.uniform(0.1, 2, shape[:2]).astype(np.float32)
    planes = codes.reshape(_BLOCKS, -1), scales.view(np.uint8)
    keys = E4M3_VALUES[codes].astype(np.float64) * scales[..., None]
    cache = np.concatenate(planes, axis=1).reshape(_BLOCKS, _BLOCK, _WIDTH + 4)
    return cache, keys.reshape(-1, _WIDTH)


def _latent_cache(rng: np.random.Generator, form: str) -> tuple[np.ndarray, np.ndarray]:
    """A cache of latents, a row a slot, and the keys; float64 [num_slots, width]."""
    num_slots = _BLOCKS * _BLOCK
    keys = _floats(rng, (num_slots, _RANK + _ROPE))
    if form != "fp8_ds_mla":
        cache = keys if form == "float32" else _bfloat16(keys)
        return cache, keys.astype(np.float64)
    codes = _codes(rng, (num_slots, _RANK // _TILE, _TILE))
    scales = rng.uniform(0.002, 0.02, codes.shape[:2]).astype(np.float32)
    k_pe = _bfloat16(np.ascontiguousarray(keys[:, _RANK:]))
    parts = codes.reshape(num_slots, -1), scales.view(np.uint8), k_pe.view(np.uint8)
    latents = (E4M3_VALUES[codes].astype(np.float64) * scales[..., None]).reshape(num_slots, -1)
    return np.concatenate(parts, axis=1), np.concatenate([latents, keys[:, _RANK:]], axis=1)


def logits(memory: Memory) -> Outputs:
    """Scores of five tokens over caches of every format."""
    rng = np.random.default_rng(6)
    tables = _tables(rng)
    weights = rng.normal(0, 1, (5, _HEADS)).astype(np.float32)
    out = {"tables": tables, "weights": weights}
    score = _score_on_device if memory.uses_kernel("indexer_logits") else _score_on_host
    for form in FORMATS:
        cache, keys = _index_cache(rng, form)
        q = _codes(rng, (5, _HEADS, _WIDTH)) if form == "fp8_ds_mla" else None
        query = _floats(rng, (5, _HEADS, _WIDTH)) if q is None else E4M3_VALUES[q]
        stored = query if q is None or memory.on_host else q
        out[form] = score(memory, stored, weights, cache, tables)
        out |= {f"{form} q": query, f"{form} keys": keys}
    return out


def _score_on_device(
    memory: Memory, q: np.ndarray, weights: np.ndarray, cache: np.ndarray, tables: np.ndarray
) -> np.ndarray:
    """float32 [5, _LONGEST]: one launch for all tokens."""
    from fd_dsa.ops.logits.triton_kernel import score_pages

    out = memory.put(_unwritten())
    inputs = map(memory.put, (q, weights, cache, _POSITIONS, _ROWS, tables))
    score_pages(*inputs, out, block_size=_BLOCK)
    return memory.get(out)


def _score_on_host(
    memory: Memory, q: np.ndarray, weights: np.ndarray, cache: np.ndarray, tables: np.ndarray
) -> np.ndarray:
    """float32 [5, _LONGEST]: the prompt's tokens by gathered keys, the decode row by its pages."""
    out = _unwritten()
    length = int(_POSITIONS[2]) + 1
    prompt = indexer_logits(q[:3], weights[:3], cache, _slots(tables, 0, length))
    units = PagedUnits.build(np.array([_LONGEST]), tables[1:], _BLOCK)
    decode = paged_indexer_logits(q[None, 3:4], weights[None, 3:4], cache, units)
    for token, scores in enumerate([*prompt, decode[0, 0]]):
        window = int(_POSITIONS[token]) + 1
        out[token, :window] = scores[:window]
    return out


def _unwritten() -> np.ndarray:
    """float32 [5, _LONGEST], every byte of it UNTOUCHED."""
    return np.full((5, 4 * _LONGEST), UNTOUCHED, np.uint8).view(np.float32)


def is_logits(out: Outputs) -> None:
    """Every score in a token's window is the weighted sum over heads; nothing else is written."""
    for form in FORMATS:
        q, keys = out[f"{form} q"].astype(np.float64), out[f"{form} keys"]
        for token, (row, position) in enumerate(zip(_ROWS, _POSITIONS, strict=True)):
            window = 0 if row < 0 else int(position) + 1
            own = keys[_slots(out["tables"], row, window)]
            weights = out["weights"][token].astype(np.float64)
            wanted = weights @ np.maximum(q[token] @ own.T, 0)
            allowed = 1e-5 * (abs(weights) @ (abs(q[token]) @ abs(own).T))
            found = out[form][token]
            off = abs(found[:window] - wanted)
            require(
                off <= allowed, f"{form}: scores of token {token} are off by {off.max(initial=0)}"
            )
            rest = found[window:].view(np.uint8)
            require(rest == UNTOUCHED, f"{form}: token {token} was written past its window")


def topk(memory: Memory) -> Outputs:
    """Slots of the best 8 keys of rows with 0, 5 and 40 keys, whose scores are often equal."""
    rng = np.random.default_rng(5)
    scores = rng.integers(-2, 3, (3, 40)).astype(np.float32)
    rows, positions = np.array([-1, 0, 1], np.int32), np.array([0, 4, 39], np.int64)
    lengths = np.array([0, 5, 40], np.int32)
    tables = rng.permutation(10).astype(np.int32).reshape(2, 5)
    if memory.uses_kernel("topk"):
        from fd_dsa.ops.topk.triton_kernel import select_slots

        best = memory.put(np.full((3, 8), UNTOUCHED, np.int32))
        inputs = map(memory.put, (scores, positions, rows, tables))
        select_slots(*inputs, best, block_size=8, num_blocks=10)
        found = memory.get(best)
    else:
        found = positions_to_slots(topk_indices(scores, lengths, 8), rows, tables, 8)
    return {"best": found, "scores": scores, "lengths": lengths, "tables": tables}


def is_topk(out: Outputs) -> None:
    """A sort by score, then by position, says the same."""
    for token, (scores, length) in enumerate(zip(out["scores"], out["lengths"], strict=True)):
        order = sorted(range(length), key=lambda i, s=scores: (-s[i], i))[:8]
        table = out["tables"][token - 1]
        slots = [int(table[p // 8]) * 8 + p % 8 for p in sorted(order)]
        wanted = [*slots, *[-1] * (8 - len(slots))]
        found = out["best"][token].tolist()
        require(found == wanted, f"row {token} is {found}, not {wanted}")


def mla(memory: Memory) -> Outputs:
    """Attention of tokens that see 24, 1, no and 17 keys, over caches of every format."""
    rng = np.random.default_rng(7)
    q = (0.5 * rng.normal(0, 1, (4, 3, _RANK + _ROPE))).astype(np.float32)
    slots = np.full((4, _TOPK), -1, np.int32)
    for token, count in enumerate((24, 1, 0, 17)):
        slots[token, :count] = np.sort(rng.choice(_BLOCKS * _BLOCK, count, replace=False))
    out = {"q": q, "slots": slots}
    attend = _attend_on_device if memory.uses_kernel("sparse_mla") else _attend_on_host
    for form in FORMATS:
        cache, keys = _latent_cache(rng, form)
        out |= {form: attend(memory, q, cache, slots), f"{form} keys": keys}
    return out


def _attend_on_device(
    memory: Memory, q: np.ndarray, cache: np.ndarray, slots: np.ndarray
) -> np.ndarray:
    """float32 [4, heads, rank]: one launch for all tokens."""
    from fd_dsa.ops.mla.triton_kernel import attend_slots

    out = memory.put(np.full((*q.shape[:2], _RANK), np.nan, np.float32))
    inputs = map(memory.put, (q, cache, slots))
    attend_slots(*inputs, out, softmax_scale=_SCALE, kv_lora_rank=_RANK)
    return memory.get(out)


def _attend_on_host(
    memory: Memory, q: np.ndarray, cache: np.ndarray, slots: np.ndarray
) -> np.ndarray:
    """float32 [4, heads, rank]: the first token by a dense product, the others by gathered keys."""
    dense, gathered = slots[:1], slots[1:]
    mask = np.zeros(dense.shape, np.float32)
    first = masked_mla(
        q[:1], cache, dense[0].astype(np.int64), mask, softmax_scale=_SCALE, kv_lora_rank=_RANK
    )
    others = sparse_mla(q[1:], cache, gathered, softmax_scale=_SCALE, kv_lora_rank=_RANK)
    return np.concatenate([first, others])


def is_mla(out: Outputs) -> None:
    """The mean of the selected latents, weighted by the softmax of their scores."""
    for form in FORMATS:
        for token, (q, slots) in enumerate(zip(out["q"], out["slots"], strict=True)):
            keys = out[f"{form} keys"][slots[slots >= 0]]
            scores = _SCALE * q.astype(np.float64) @ keys.T
            weights = np.exp(scores - scores.max(axis=1, keepdims=True, initial=0))
            total = weights.sum(axis=1, keepdims=True)
            wanted = weights / np.where(total == 0, 1, total) @ keys[:, :_RANK]
            off = abs(out[form][token] - wanted)
            allowed = 1e-5 * abs(wanted).max()
            require(off <= allowed, f"{form}: outputs of token {token} are off by {off.max()}")
