"""Small random cases of every operator: on a CPU against their definition, on a device by bytes.

The definitions are written again here, in float64 and without the package's arithmetic.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from fd_dsa.ops._fp8 import E4M3_VALUES, INDEX_RECORD_BYTES, LATENT_RECORD_BYTES
from fd_dsa.ops.cache_write import CacheWriteParams, write_caches
from fd_dsa.ops.indexer_gather import gather_indexer_keys
from fd_dsa.ops.indexer_query import prepare_indexer_query
from fd_dsa.ops.topk import topk_indices
from fd_dsa.step import StepMetadataBuilder

Outputs = dict[str, np.ndarray]

_BLOCK, _RANK, _ROPE, _WIDTH = 64, 512, 64, 128
_UNTOUCHED = 0xA5


class Memory:
    """Where a check's arrays live: NumPy's memory, or Paddle tensors on a device."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.on_host = device == "cpu"

    def put(self, array: np.ndarray) -> Any:
        """A copy of an array in this memory."""
        if self.on_host:
            return array.copy()
        import paddle

        kind, _, number = self.device.partition(":")
        index = int(number or 0)
        place = paddle.CUDAPlace(index) if kind == "gpu" else paddle.CustomPlace(kind, index)
        return paddle.to_tensor(array, place=place)

    def get(self, array: Any) -> np.ndarray:
        """The values of what `put` made or a step returned."""
        return array if isinstance(array, np.ndarray) else array.numpy()


class CheckFailed(Exception):
    """An operator gave something else than its definition."""


def require(condition: Any, said: str) -> None:
    """Fail with these words unless all of `condition` holds."""
    if not np.all(condition):
        raise CheckFailed(said)


def step_metadata(memory: Memory) -> Outputs:
    """A prefill row behind a cached prefix, a decode row and an idle one."""
    device = "numpy" if memory.on_host else memory.device
    builder = StepMetadataBuilder(4, 16, 4, 2, num_blocks=16, device=device)
    lens = [np.array(x, np.int32) for x in ([3, 0, 0], [2, 4, 0], [3, 1, 0])]
    tables = np.random.default_rng(1).permutation(12).astype(np.int32).reshape(3, 4)
    meta = builder.build(*lens, tables)
    names = ("batch_id_per_token", "position_ids", "slot_mapping", "cu_seqlens_q", "cache_seqlens")
    names += ("cu_seqlens_kg", "indexer_attn_mask_offsets")
    return {"tables": tables} | {name: memory.get(getattr(meta, name)) for name in names}


def is_step_metadata(out: Outputs) -> None:
    """The numbers of that step, worked by hand."""
    wanted = {
        "batch_id_per_token": [0, 0, 0, 1],
        "position_ids": [2, 3, 4, 4],
        "cu_seqlens_q": [0, 3, 4, 4],
        "cache_seqlens": [0, 5, 0],
        "cu_seqlens_kg": [0, 5, 6, 6],
        "indexer_attn_mask_offsets": [0, 3, 0, 4, 0, 5, 0, 0],
    }
    for name, values in wanted.items():
        require(out[name].tolist() == values, f"{name} is {out[name].tolist()}, not {values}")
    rows, positions = wanted["batch_id_per_token"], wanted["position_ids"]
    tables = out["tables"]
    slots = [2 * tables[b, p // 2] + p % 2 for b, p in zip(rows, positions, strict=True)]
    require(out["slot_mapping"] == slots, f"slot_mapping is {out['slot_mapping']}, not {slots}")


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
    latent = memory.put(np.full((2, 1, _BLOCK, LATENT_RECORD_BYTES), _UNTOUCHED, np.uint8))
    index = memory.put(np.full((2, _BLOCK, INDEX_RECORD_BYTES), _UNTOUCHED, np.uint8))
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
    require(records[others] == _UNTOUCHED, "a latent record without a token was written")
    require(keys[others] == _UNTOUCHED, "an index key without a token was written")


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


def indexer_gather(memory: Memory) -> Outputs:
    """Keys of two prefill rows, a decode row between them."""
    rng = np.random.default_rng(4)
    cache = rng.integers(0, 256, (6, _BLOCK, INDEX_RECORD_BYTES), np.uint8)
    tables = rng.permutation(6).astype(np.int32).reshape(3, 2)
    cu_seqlens, encoder = np.array([0, 70, 71, 100], np.int32), np.array([70, 0, 9], np.int32)
    out = [np.full((100, _WIDTH), _UNTOUCHED, np.uint8), np.full(100, -1, np.float32)]
    keys, scales = (memory.put(array) for array in out)
    gather_indexer_keys(*map(memory.put, (cache, tables, cu_seqlens, encoder)), keys, scales)
    # scales by their bits: random bytes hold NaN
    gathered = {"keys": memory.get(keys), "scales": memory.get(scales).view(np.uint32)}
    return gathered | {"cache": cache, "tables": tables}


def is_indexer_gather(out: Outputs) -> None:
    """Each key by the definition; the row of the decode request is left as it was."""
    blocks = out["cache"].reshape(6, -1)
    scales = blocks[:, _BLOCK * _WIDTH :].copy().view(np.uint32)
    for row, start, length in ((0, 0, 70), (2, 71, 29)):
        for p in range(length):
            block, offset = out["tables"][row, p // _BLOCK], p % _BLOCK
            key = blocks[block, offset * _WIDTH : (offset + 1) * _WIDTH]
            require(out["keys"][start + p] == key, f"key {p} of row {row} is another")
            same = out["scales"][start + p] == scales[block, offset]
            require(same, f"scale {p} of row {row} is another")
    require(out["keys"][70] == _UNTOUCHED, "the row of a decode request was written")


def topk(memory: Memory) -> Outputs:
    """The best 8 of 40 scores with many ties, for rows of 0, 5 and 40 keys."""
    logits = np.random.default_rng(5).integers(-2, 3, (3, 40)).astype(np.float32)
    lengths = np.array([0, 5, 40], np.int32)
    return {"best": topk_indices(logits, lengths, 8), "logits": logits, "lengths": lengths}


def is_topk(out: Outputs) -> None:
    """A sort by score, then by position, says the same."""
    for row, (scores, length) in enumerate(zip(out["logits"], out["lengths"], strict=True)):
        order = sorted(range(length), key=lambda i, s=scores: (-s[i], i))[:8]
        wanted = [*sorted(order), *[-1] * (8 - len(order))]
        require(out["best"][row].tolist() == wanted, f"row {row} is {out['best'][row].tolist()}")


# operator -> what runs it, what knows the right result, whether a device runs it too
CHECKS: dict[str, tuple[Callable[[Memory], Outputs], Callable[[Outputs], None], bool]] = {
    "step_metadata": (step_metadata, is_step_metadata, True),
    "cache_write": (cache_write, is_cache_write, True),
    "indexer_query": (indexer_query, is_indexer_query, True),
    "indexer_gather": (indexer_gather, is_indexer_gather, True),
    "topk": (topk, is_topk, False),
}


def run_checks(device: str) -> list[dict[str, Any]]:
    """Check every operator on the CPU, and on `device` against the CPU.

    Returns:
        `name`, `device`, `passed`, `detail` (what was wrong, or "") and `ms` of each check.
    """
    found = []
    for name, (run, is_right, on_devices) in CHECKS.items():
        host: Outputs = {}
        found.append(_timed(name, "cpu", partial(_check_host, run, is_right, host)))
        if on_devices and device != "cpu":
            found.append(_timed(name, device, partial(_check_device, run, device, host)))
    return found


def _check_host(
    run: Callable[[Memory], Outputs], is_right: Callable[[Outputs], None], host: Outputs
) -> None:
    """Run an operator on the CPU and keep what it gave, if that is right."""
    out = run(Memory("cpu"))
    is_right(out)
    host.update(out)


def _check_device(run: Callable[[Memory], Outputs], device: str, host: Outputs) -> None:
    """Run an operator on a device: every output has the bytes that the CPU gave."""
    require(host, "nothing to compare with: the check on the CPU failed")
    found = run(Memory(device))
    for name, values in host.items():
        differ = int(np.count_nonzero(found[name] != values))
        require(differ == 0, f"{name}: {differ} of {values.size} values differ from the CPU's")


def _timed(name: str, device: str, check: Callable[[], None]) -> dict[str, Any]:
    """Run a check; whatever it raises is its finding."""
    begin, detail = time.perf_counter(), ""
    try:
        check()
    except Exception as error:
        first_line = str(error).strip().partition("\n")[0]
        kind = "" if isinstance(error, CheckFailed) else f"{type(error).__name__}: "
        detail = kind + first_line
    milliseconds = 1e3 * (time.perf_counter() - begin)
    return {
        "name": name,
        "device": device,
        "passed": not detail,
        "detail": detail,
        "ms": round(milliseconds, 1),
    }
