"""The sparse MLA kernel against attention in doubles, on all memories."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from fd_dsa.ops.cache_write import bfloat16_bits
from fd_dsa.ops.mla import attend_gathered
from tests.kernel_memory import KernelMemory
from tests.ops.tensor_core_case import records, widened
from tests.reference.sparse_mla import ref_attend

SCALE = 0.11
# (query, cache) -> largest error as a share of the largest output
TOLERANCE = {
    ("float32", "float32"): 2e-6,
    ("float32", "bfloat16"): 2e-6,
    ("float32", "int16"): 2e-6,
    ("float32", "fp8_ds_mla"): 2e-6,
    # weights and latents are rounded to bfloat16, and so is the output
    ("bfloat16", "bfloat16"): 2**-7,
    ("bfloat16", "fp8_ds_mla"): 2**-7,
}


@dataclass
class Case:
    """Queries, cache and selection: as stored, and as float64 values."""

    q_dtype: str
    cache_dtype: str
    q_stored: np.ndarray
    cache_stored: np.ndarray
    slots: np.ndarray
    q: np.ndarray
    latents: np.ndarray
    rank: int

    def run(self, m: KernelMemory) -> np.ndarray:
        """float32 [num_tokens, num_heads, rank]."""
        from fd_dsa.ops.mla.triton_kernel import attend_slots

        out_dtype = self.q_dtype
        out = m.poisoned((*self.q.shape[:2], self.rank), out_dtype)
        attend_slots(
            self._put(m, self.q_stored, self.q_dtype),
            self._put(m, self.cache_stored, self.cache_dtype),
            m.put(self.slots),
            out,
            softmax_scale=SCALE,
            kv_lora_rank=self.rank,
        )
        found = m.get(out)
        return widened(found) if out_dtype == "bfloat16" else found

    @staticmethod
    def _put(m: KernelMemory, array: np.ndarray, dtype: str) -> Any:
        return m.put(array.view(np.uint16), dtype) if dtype == "bfloat16" else m.put(array)

    def wanted(self, token: int) -> np.ndarray:
        """Return the oracle's output of a token: float64 [num_heads, rank]."""
        chosen = self.slots[token][self.slots[token] >= 0].tolist()
        return ref_attend(self.q[token], self.latents, chosen, SCALE, self.rank)


def make(
    q_dtype: str,
    cache_dtype: str,
    counts: list[int],
    topk: int,
    *,
    heads: int = 3,
    rank: int = 128,
    rope: int = 16,
    num_slots: int = 96,
    seed: int = 0,
) -> Case:
    """Make a case in which token t attends to counts[t] random slots. Other slots have NaN."""
    rng = np.random.default_rng(seed)
    q = q_stored = (0.5 * rng.standard_normal((len(counts), heads, rank + rope))).astype(np.float32)
    if q_dtype == "bfloat16":
        q_stored = bfloat16_bits(q)
        q = widened(q_stored)
    named = rng.permutation(num_slots)[: num_slots - num_slots // 8]
    chosen = [np.sort(rng.choice(named, n, replace=False)).tolist() for n in counts]
    slots = np.array([c + [-1] * (topk - len(c)) for c in chosen], np.int32)
    unnamed = np.setdiff1d(np.arange(num_slots), slots)
    if cache_dtype == "fp8_ds_mla":
        cache, latents = records(rng, num_slots, rank, rope)
        cache[unnamed] = 0xFF
        if q_dtype == "bfloat16":
            # as the kernel's contract says: the latents are rounded, too
            latents = widened(bfloat16_bits(latents.astype(np.float32)))
    else:
        latents = rng.standard_normal((num_slots, rank + rope)).astype(np.float32)
        cache = latents.copy()
        if cache_dtype != "float32":
            cache = bfloat16_bits(latents)
            latents = widened(cache)
        cache[unnamed] = np.nan if cache_dtype == "float32" else 0x7FC0
    return Case(
        q_dtype, cache_dtype, q_stored, cache, slots, q.astype(float), latents.astype(float), rank
    )


def check(case: Case, m: KernelMemory, times: int = 1) -> None:
    """Check outputs within `times` the tolerance, and zeros for tokens without keys."""
    found, tolerance = case.run(m), times * TOLERANCE[case.q_dtype, case.cache_dtype]
    if case.q_dtype == "bfloat16" and not m.on_gpu:
        # Triton's interpreter cuts off where a GPU rounds to the nearest bfloat16
        tolerance *= 4
    for token, line in enumerate(found):
        wanted = case.wanted(token)
        bound = tolerance * np.abs(wanted).max()
        assert (np.abs(line - wanted) <= bound).all(), f"token {token}"


@pytest.mark.parametrize(("q_dtype", "cache_dtype"), TOLERANCE)
def test_ragged_selections(kernel_memory: KernelMemory, q_dtype: str, cache_dtype: str) -> None:
    check(make(q_dtype, cache_dtype, [40, 1, 0, 33, 16, 17, 0], 40), kernel_memory)


@pytest.mark.parametrize(
    ("cache_dtype", "sizes"),
    [
        *((c, {"heads": heads}) for c in ("float32", "fp8_ds_mla") for heads in (1, 8, 16, 17)),
        *(("float32", {"rank": r, "rope": w}) for r, w in ((6, 2), (40, 24), (100, 64))),
    ],
)
def test_heads_and_widths(
    kernel_memory: KernelMemory, cache_dtype: str, sizes: dict[str, int]
) -> None:
    check(make("float32", cache_dtype, [9, 0, 20], 20, **sizes), kernel_memory)


@pytest.mark.parametrize(("q_dtype", "cache_dtype"), TOLERANCE)
def test_real_widths(kernel_memory: KernelMemory, q_dtype: str, cache_dtype: str) -> None:
    large = kernel_memory.large
    counts, topk = ([2048, 0, 1, 1999, 64], 2048) if large else ([20, 0], 24)
    case = make(
        q_dtype,
        cache_dtype,
        counts,
        topk,
        heads=24 if large else 2,
        rank=512,
        rope=64,
        num_slots=4096 if large else 64,
    )
    # 2,048 terms instead of a few dozen: their sums round more often
    check(case, kernel_memory, times=5 if large else 1)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_selected_key_that_is_not_finite_spoils_its_own_rows(
    kernel_memory: KernelMemory, value: float
) -> None:
    case = make("float32", "float32", [20, 20, 0, 20], 20)
    bad = case.slots[1][3]
    reached = (case.slots == bad).any(axis=1)
    # the token's other keys, and every token that does not name the slot, stay as they are
    case.cache_stored[bad] = value
    # the interpreter multiplies with NumPy, which would warn
    with np.errstate(invalid="ignore"):
        found = case.run(kernel_memory)
    assert not np.isfinite(found[reached]).all(axis=(1, 2)).any()
    for token in np.flatnonzero(~reached):
        np.testing.assert_allclose(found[token], case.wanted(token), rtol=0, atol=1e-5)


def test_keys_that_score_minus_infinity_weigh_nothing(kernel_memory: KernelMemory) -> None:
    # a whole tile of heads: in the empty lanes of another, 0 times infinity would warn
    case = make("float32", "float32", [20, 1], 20, heads=16)
    case.q_stored[:, :, -1] = case.q[:, :, -1] = 1.0
    # all keys of the second token, and a whole first tile of the first token's
    bad = np.union1d(case.slots[0, :16], case.slots[1, :1])
    case.slots[0, 16:] = np.setdiff1d(np.arange(len(case.latents)), bad)[:4]
    case.cache_stored[case.slots[0, 16:]] = case.latents[case.slots[0, 16:]] = 0.5
    case.cache_stored[bad, -1] = -np.inf
    found = case.run(kernel_memory)
    np.testing.assert_allclose(found[0], 0.5, rtol=1e-6)
    np.testing.assert_array_equal(found[1], 0.0)


def test_slots_without_a_place_are_skipped_anywhere_in_a_row(kernel_memory: KernelMemory) -> None:
    case = make("float32", "float32", [40, 40], 40)
    case.slots[0, [0, 1, 17, 39]] = -1
    case.slots[1, :16] = -1
    wanted = [case.wanted(token) for token in range(2)]
    case.slots[0, 17] = len(case.latents)
    for token, line in enumerate(case.run(kernel_memory)):
        np.testing.assert_allclose(line, wanted[token], rtol=0, atol=1e-5)


def test_scores_far_from_zero(kernel_memory: KernelMemory) -> None:
    case = make("float32", "float32", [40, 3], 40)
    case.q_stored *= 300
    case.q *= 300
    check(case, kernel_memory)


def test_the_result_of_the_cpu(kernel_memory: KernelMemory) -> None:
    pytest.importorskip("paddle", reason="the CPU's products are Paddle's")
    case = make("float32", "float32", [24, 0, 5], 24, rank=512, rope=64)
    cpu = attend_gathered(
        case.q_stored, case.cache_stored, case.slots, softmax_scale=SCALE, kv_lora_rank=512
    )
    np.testing.assert_allclose(case.run(kernel_memory), cpu, rtol=0, atol=1e-5)


def test_records_past_two_to_the_31_bytes(kernel_memory: KernelMemory) -> None:
    if kernel_memory.name != "torch":
        pytest.skip("torch alone writes into two gigabytes in place")
    from fd_dsa.ops.mla.triton_kernel import attend_slots

    m, case = kernel_memory, make("float32", "fp8_ds_mla", [40, 17], 40, rank=512, rope=64)
    first = (2**31 + 2**24) // 656
    cache = m.poisoned((first + len(case.latents), 656), "uint8")
    cache[first:] = m.put(case.cache_stored)
    out = m.poisoned((*case.q.shape[:2], 512), "float32")
    slots = np.where(case.slots < 0, -1, case.slots + first).astype(np.int32)
    options = {"softmax_scale": SCALE, "kv_lora_rank": 512}
    attend_slots(m.put(case.q_stored), cache, m.put(slots), out, **options)
    np.testing.assert_array_equal(m.get(out), case.run(m))
