"""Random cases for the sparse MLA kernels for tensor cores, and how far a result may be off."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from fd_dsa.ops.cache_write import bfloat16_bits
from tests.kernel_memory import KernelMemory
from tests.ops.e4m3 import E4M3_VALUES
from tests.reference.bfloat16 import widened

RANK, ROPE, SCALE = 512, 64, 0.05
UNNAMED = 5
"""Slots of each cache that no row names; they hold NaN."""


@dataclass
class Case:
    """Queries, cache and selection: as stored, and as float64 values.

    Attributes:
        latents: exact values of the cache, [num_slots, 576].
    """

    cache_dtype: str
    q_bits: np.ndarray
    cache: np.ndarray
    slots: np.ndarray
    q: np.ndarray
    latents: np.ndarray
    scale: float = SCALE

    def inputs(self, m: KernelMemory) -> tuple[Any, Any, Any]:
        """Query, cache and slots in a memory."""
        if self.cache_dtype == "bfloat16":
            cache = m.put(self.cache.view(np.uint16), "bfloat16")
        else:
            cache = m.put(self.cache)
        return m.put(self.q_bits.view(np.uint16), "bfloat16"), cache, m.put(self.slots)

    def run(
        self, m: KernelMemory, partial_rows: int = 0, **options: Any
    ) -> tuple[np.ndarray, np.ndarray]:
        """float32 [num_tokens, num_heads, 512] and [num_tokens, num_heads], of poisoned memory."""
        from fd_dsa.ops.mla.tensor_core import Partials, attend_on_tensor_cores

        num_tokens, num_heads, _ = self.q.shape
        out = m.poisoned((num_tokens, num_heads, RANK), "float32")
        lse = m.poisoned((num_tokens, num_heads), "float32")
        if partial_rows:
            values = m.poisoned((partial_rows * RANK,), "float32")
            options["partials"] = Partials(values, m.poisoned((partial_rows,), "float32"))
        q, cache, slots = self.inputs(m)
        options |= {"softmax_scale": self.scale, "lse": lse}
        attend_on_tensor_cores(q, cache, slots, out, **options)
        return m.get(out), m.get(lse)

    def scale_records(self, factors: np.ndarray | float) -> None:
        """Multiply the scales of each record by a power of two, [num_slots] or one for all."""
        factors = np.broadcast_to(factors, len(self.latents))[:, None]
        scales = self.cache[:, RANK : RANK + 16].copy().view(np.float32) * factors
        self.cache[:, RANK : RANK + 16] = scales.astype(np.float32).view(np.uint8)
        self.latents[:, :RANK] *= factors

    def move_queries(self, power: int) -> None:
        """Bring head 1 far from the others, by 2^power, and make head 2 zeros."""
        bits = self.q_bits.view(np.uint16)
        bits[:, 1] += np.uint16((power % 512) << 7)
        bits[:, 2] = 0
        self.q = widened(bits.view(np.int16)).astype(np.float64)

    def selected(self, token: int) -> np.ndarray:
        """The slots of a row that are slots."""
        row = self.slots[token]
        return row[(row >= 0) & (row < len(self.latents))]

    def exact(self, token: int) -> np.ndarray:
        """float64 [num_heads, 512]: attention of a token in doubles."""
        keys = self.latents[self.selected(token)]
        return softmax(self.scale * self.q[token] @ keys.T) @ keys[:, :RANK]

    def rounded(self, token: int) -> np.ndarray:
        """float64 [num_heads, 512]: the same with the kernel's roundings, of one tile of keys."""
        chosen = self.selected(token)
        keys = self.latents[chosen]
        if self.cache_dtype == "fp8_ds_mla":
            codes = E4M3_VALUES[self.cache[chosen, :RANK]].astype(np.float16) * np.float16(2**-8)
            scales = self.cache[chosen, RANK : RANK + 16].copy().view(np.float32) * 256
            tiles = codes.reshape(-1, 4, 128) * scales.astype(np.float16)[:, :, None]
            keys = np.concatenate([tiles.reshape(-1, RANK), keys[:, RANK:]], 1).astype(float)
        scores = self.scale * self.q[token] @ keys.T
        weights = np.exp(scores - scores.max(axis=1, keepdims=True))
        total = weights.sum(axis=1, keepdims=True)
        if self.cache_dtype == "fp8_ds_mla":
            weights = weights.astype(np.float16).astype(float)
        else:
            weights = widened(bfloat16_bits(weights.astype(np.float32))).astype(float)
        return weights / total @ keys[:, :RANK]

    def check(self, found: np.ndarray, lse: np.ndarray) -> None:
        """Every output within the bound that the kernel's roundings have, in float64.

        FP8: 2^-10 for a latent and 2^-11 for a weight, or 2^-25 absolute. bfloat16: 2^-8 for a
        weight, half a unit in the last of its 8 bits. The error of a score shifts its weight;
        twice, since the sum of weights has it, too. Tensor cores add with fewer bits than float32
        has.
        """
        fp8 = self.cache_dtype == "fp8_ds_mla"
        of_latents, of_weights, least = (
            (2.0**-10, 2.0**-11, 2.0**-25) if fp8 else (0.0, 2.0**-8, 0.0)
        )
        for token, (line, logs) in enumerate(zip(found, lse, strict=True)):
            keys = self.latents[self.selected(token)]
            if not len(keys):
                assert not line.any() and (logs == -np.inf).all(), f"token {token}: no keys"
                continue
            scores = self.scale * self.q[token] @ keys.T
            top = scores.max(axis=1, keepdims=True)
            weights = np.exp(scores - top)
            total = weights.sum(axis=1, keepdims=True)
            size = self.scale * np.abs(self.q[token]) @ np.abs(keys).T
            shift = ((of_latents + 2.0**-18) * size).max(axis=1, keepdims=True)
            shift += least * self.scale * np.abs(self.q[token]).sum(axis=1, keepdims=True)
            share, values = weights / total, keys[:, :RANK]
            bound = (of_latents + of_weights + 2 * shift + 2.0**-17) * (share @ np.abs(values))
            bound += least * (1 + np.abs(values).sum(axis=0) / total) + 1e-12
            error = np.abs(line - share @ values)
            assert (error <= bound).all(), f"token {token}: {(error / bound).max():.2f} of bound"
            wanted = (top + np.log(total))[:, 0]
            assert (np.abs(logs - wanted) <= shift[:, 0] + 2.0**-17 * (1 + np.abs(wanted))).all()


def softmax(scores: np.ndarray) -> np.ndarray:
    """Softmax of the last axis."""
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


def records(
    rng: np.random.Generator, n: int, rank: int = RANK, rope: int = ROPE
) -> tuple[np.ndarray, np.ndarray]:
    """uint8 records of n keys, and their exact values, float64 [n, rank + rope]."""
    codes = rng.integers(0, 256, (n, rank)).astype(np.uint8)
    codes[(codes & 0x7F) == 0x7F] = 0x08
    scales = np.exp(rng.uniform(-9, -3, (n, rank // 128))).astype(np.float32)
    k_pe = bfloat16_bits(rng.standard_normal((n, rope)).astype(np.float32))
    wide = E4M3_VALUES[codes].astype(np.float64).reshape(n, -1, 128) * scales[:, :, None]
    parts = [codes, scales.view(np.uint8), k_pe.view(np.uint8)]
    return np.concatenate(parts, axis=1), np.concatenate([wide.reshape(n, -1), widened(k_pe)], 1)


def make(
    cache_dtype: str, counts: list[int], topk: int, *, heads: int, num_slots: int = 256
) -> Case:
    """Make a case in which token t names counts[t] random slots. Other slots have NaN."""
    rng = np.random.default_rng(heads)
    q_bits = bfloat16_bits(
        rng.standard_normal((len(counts), heads, RANK + ROPE)).astype(np.float32)
    )
    named = rng.permutation(num_slots)[UNNAMED:]
    chosen = [rng.choice(named, n, replace=n > len(named)).tolist() for n in counts]
    slots = np.array([c + [-1] * (topk - len(c)) for c in chosen], np.int32)
    slots = slots.reshape(len(counts), topk)
    unnamed = np.setdiff1d(np.arange(num_slots), named)
    if cache_dtype == "fp8_ds_mla":
        cache, latents = records(rng, num_slots)
        cache[unnamed] = 0xFF
    else:
        cache = bfloat16_bits(rng.standard_normal((num_slots, RANK + ROPE)).astype(np.float32))
        latents = widened(cache).astype(np.float64)
        cache[unnamed] = 0x7FC0
    q = widened(q_bits).astype(np.float64)
    return Case(cache_dtype, q_bits, cache, slots, q, latents)
