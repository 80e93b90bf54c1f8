"""Random inputs of a cache write, as arguments for the CPU and for the kernel's memories."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from fd_dsa.ops.cache_write import CacheWriteParams, write_on_host
from tests.kernel_memory import POISON, KernelMemory
from tests.ops.e4m3 import E4M3_VALUES
from tests.reference.bfloat16 import upper_half

RANK, ROPE, DIM, BLOCK = 512, 64, 128, 64
BITS = {"float32": np.float32, "bfloat16": np.int16, "fp8_ds_mla": np.uint8}
# choices of a layer's indexer, as fields of CacheWriteParams
FORMATS = {
    "half-split": {},
    "interleaved": {"index_rope_interleave": True},
    "raw scales": {"index_scale_fmt": None},
    "hadamard": {"index_hadamard": True},
    "interleaved hadamard raw": {
        "index_rope_interleave": True,
        "index_hadamard": True,
        "index_scale_fmt": None,
    },
}
NORMS = ("kv_norm_weight", "k_norm_weight", "k_norm_bias")


@dataclass(frozen=True)
class Case:
    """Arguments of `write_caches` without the caches, as float32 NumPy arrays."""

    kv_a: np.ndarray | None
    index_k: np.ndarray | None
    position_ids: np.ndarray | None
    slot_mapping: np.ndarray
    cos_sin_cache: np.ndarray | None
    params: CacheWriteParams
    num_blocks: int

    def changed(self, **fields: Any) -> Case:
        """The same case with other fields of the case or of its params."""
        own = {name: fields.pop(name) for name in list(fields) if name in Case.__annotations__}
        return replace(self, params=replace(self.params, **fields), **own)

    def gathered(self) -> Case:
        """The same case with a row of cos and sin for each token instead of its position."""
        assert self.cos_sin_cache is not None
        return replace(self, cos_sin_cache=self.cos_sin_cache[self.position_ids], position_ids=None)

    def poisoned_caches(self) -> tuple[np.ndarray, np.ndarray]:
        """A latent and an indexer cache, every byte POISON."""
        dtype = np.dtype(BITS[self.params.kv_cache_dtype])
        fp8, rows = dtype == np.uint8, []
        for shape in ((self.num_blocks, 1, BLOCK, 656 if fp8 else RANK + ROPE),
                      (self.num_blocks, BLOCK, 132 if fp8 else DIM)):  # fmt: skip
            raw = np.full(int(np.prod(shape)) * dtype.itemsize, POISON, np.uint8)
            rows.append(raw.view(dtype).reshape(shape))
        return rows[0], rows[1]


def make_case(
    num_tokens: int, kv_cache_dtype: str = "fp8_ds_mla", *, seed: int = 0, **params: Any
) -> Case:
    """Normal values, unaligned random positions, slots shuffled over more blocks than needed."""
    rng = np.random.default_rng(seed)
    num_blocks = -(-num_tokens // BLOCK) + 2

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(np.float32)

    angles = rng.uniform(-3, 3, (4 * num_tokens + 1, ROPE // 2))
    return Case(
        kv_a=normal(num_tokens, RANK + ROPE),
        index_k=normal(num_tokens, DIM) + np.float32(0.5),
        position_ids=rng.integers(0, len(angles), num_tokens),
        slot_mapping=rng.permutation(num_blocks * BLOCK)[:num_tokens],
        cos_sin_cache=np.concatenate([np.cos(angles), np.sin(angles)], 1).astype(np.float32),
        params=CacheWriteParams(
            kv_cache_dtype,
            kv_norm_weight=normal(RANK),
            k_norm_weight=normal(DIM),
            k_norm_bias=normal(DIM),
            **params,
        ),
        num_blocks=num_blocks,
    )


def on_cpu(case: Case) -> tuple[np.ndarray, np.ndarray]:
    """Both caches as the CPU writes them."""
    caches = case.poisoned_caches()
    with np.errstate(all="ignore"):
        write_on_host(
            case.kv_a,
            case.index_k,
            case.position_ids,
            case.slot_mapping,
            case.cos_sin_cache,
            *caches,
            case.params,
        )
    return caches


def arguments(m: KernelMemory, case: Case, dtype: str = "float32") -> tuple[Any, ...]:
    """Arguments of the kernel's `write_caches` in a memory, its caches poisoned.

    Args:
        dtype: of the activations; "bfloat16" asks for a case whose values are such numbers.
    """

    def floats(array: np.ndarray | None) -> Any:
        if array is None or dtype == "float32":
            return None if array is None else m.put(array)
        return m.put(upper_half(array).view(np.uint16), "bfloat16")

    given = {name: getattr(case.params, name) for name in NORMS}
    norms = {name: None if value is None else m.put(value) for name, value in given.items()}
    latent, index = case.poisoned_caches()
    return (
        floats(case.kv_a),
        floats(case.index_k),
        None if case.position_ids is None else m.put(case.position_ids),
        m.put(case.slot_mapping),
        None if case.cos_sin_cache is None else m.put(case.cos_sin_cache),
        None if case.kv_a is None else m.put(latent),
        None if case.index_k is None else m.put(index),
        replace(case.params, **norms),
    )


def in_kernel(m: KernelMemory, case: Case, dtype: str = "float32") -> tuple[np.ndarray, np.ndarray]:
    """Return both caches after the kernel. A cache that it does not get stays poisoned."""
    from fd_dsa.ops.cache_write.triton_kernel import write_caches

    given = arguments(m, case, dtype)
    with np.errstate(all="ignore"):
        write_caches(*given)
    latent, index = case.poisoned_caches()
    return (
        latent if given[5] is None else m.get(given[5]),
        index if given[6] is None else m.get(given[6]),
    )


def assert_same_bytes(found: Any, wanted: Any) -> None:
    """Compare both caches byte by byte, and report the first differences."""
    for name, left, right in zip(("latent", "index"), found, wanted, strict=True):
        left, right = (x.view(np.uint8).reshape(x.shape[0], -1) for x in (left, right))
        different = np.argwhere(left != right)
        assert not len(different), f"{name} cache: {len(different)} bytes, {different[:4].tolist()}"


def extreme_rows(width: int) -> np.ndarray:
    """float32 [rows, width]: every kind of number that quantisation has to get right."""
    rng = np.random.default_rng(3)
    codes = E4M3_VALUES[:127].astype(np.float64)
    middles = (codes[1:] + codes[:-1]) / 2
    rows = [np.zeros(width), np.full(width, -0.0), np.full(width, np.nan)]
    # halves and their neighbours at scale 1, and at a scale that is no power of two
    for scale in (1.0, 1.37, 2.0**-119, 2.0**-126 * 1.5):
        near = np.concatenate([middles, middles * (1 + 2e-7), middles * (1 - 2e-7)])
        row = rng.choice(near, width) * rng.choice([-1, 1], width)
        row[:: min(width, 128)] = 448.0
        rows.append(row * scale)
    smallest = 2.0**-149
    rows.append(rng.integers(-9, 9, width) * smallest)
    rows.append(rng.standard_normal(width) * 2.0**-125)
    # scales that are a power of two, and just beside one
    for largest in (448.0, 2.0**-20 * 448, np.nextafter(np.float32(448), np.float32(449)), 2.0**20):
        rows.append(np.where(np.arange(width) % 128 == 7, largest, rng.uniform(-1, 1, width)))
    rows.append(rng.standard_normal(width) * 3.4e38 / 6)
    for special in (np.inf, -np.inf, np.nan):
        row = rng.standard_normal(width)
        row[rng.integers(0, width, 3)] = special
        rows.append(row)
    return np.array(rows).astype(np.float32)
