"""The indexer logits kernel against sums in doubles, on all memories."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from fd_dsa.ops.cache_write.paddle_impl import bfloat16_bits
from fd_dsa.ops.logits.paddle_impl import score_gathered
from fd_dsa.ops.topk.paddle_impl import positions_to_slots, select_positions
from tests.kernel_memory import POISON, KernelMemory
from tests.ops.e4m3 import E4M3_VALUES
from tests.ops.fp8_pages import fp8_cache, random_codes
from tests.ops.paged_rows import LARGE_ROWS, SMALL_ROWS, PagedRows, paged_rows

POISONED = np.full(4, POISON, np.uint8).view(np.float32)[0]
# (query, cache) -> largest error as a share of sum_h |w| |q| |k|
TOLERANCE = {
    ("float32", "float32"): 1e-6,
    ("float32", "bfloat16"): 1e-6,
    ("float32", "int16"): 1e-6,
    ("bfloat16", "bfloat16"): 1e-6,
    ("bfloat16", "float32"): 1e-6,
    ("uint8", "fp8_ds_mla"): 1e-6,
    ("float8_e4m3fn", "fp8_ds_mla"): 1e-6,
}
NAN_BITS = {"float32": np.nan, "bfloat16": 0x7FC0, "int16": 0x7FC0}


def widened(bits: np.ndarray) -> np.ndarray:
    """float32 values of bfloat16 bits."""
    return (bits.view(np.uint16).astype(np.uint32) << 16).view(np.float32)


@dataclass
class Case:
    """One step's queries and cache: as stored, and as float64 values.

    Attributes:
        q_stored, weights, cache_stored: what the kernel gets.
        q, keys: values; keys is [num_slots, dim].
    """

    step: PagedRows
    q_dtype: str
    cache_dtype: str
    q_stored: np.ndarray
    weights: np.ndarray
    cache_stored: np.ndarray
    q: np.ndarray
    keys: np.ndarray

    def run(self, m: KernelMemory, first_token: int = 0, end: int | None = None) -> np.ndarray:
        """Scores of the tokens [first_token, end); poison where nothing was written."""
        step = self.step
        rows = (step.num_tokens if end is None else end) - first_token
        logits = m.poisoned((rows, int(step.window.max()) + 3), "float32")
        self.score(m, logits, first_token=first_token)
        return m.get(logits)

    def score(self, m: KernelMemory, logits: Any, *, queries: Any = None, **options: int) -> None:
        """Launch the kernel; `queries` stand for the case's own."""
        from fd_dsa.ops.logits.triton_kernel import score_pages

        step = self.step
        narrow = {"bfloat16": np.uint16, "float8_e4m3fn": np.uint8}
        q = self.q_stored.view(narrow.get(self.q_dtype, self.q_stored.dtype))
        cache: Any = self.cache_stored
        if self.cache_dtype == "bfloat16":
            cache = m.put(cache.view(np.uint16), "bfloat16")
        else:
            cache = m.put(cache)
        score_pages(
            m.put(q, self.q_dtype if self.q_dtype in narrow else None)
            if queries is None
            else queries,
            m.put(self.weights),
            cache,
            m.put(step.position_ids),
            m.put(step.batch_ids),
            m.put(step.block_tables),
            logits,
            block_size=step.block_size,
            **options,
        )

    def wanted(self, token: int) -> np.ndarray:
        """float64 [window]; the oracle's scores of a token."""
        dots = self.q[token] @ self.keys[self.step.key_slots(token)].T
        return self.weights[token].astype(np.float64) @ np.maximum(dots, 0.0)

    def bound(self, token: int) -> np.ndarray:
        """float64 [window]; what an error is a share of."""
        dots = np.abs(self.q[token]) @ np.abs(self.keys[self.step.key_slots(token)]).T
        return np.abs(self.weights[token].astype(np.float64)) @ dots


def make(
    step: PagedRows, q_dtype: str, cache_dtype: str, *, heads: int = 5, dim: int = 24, seed: int = 0
) -> Case:
    """Random queries and keys; NaN in every slot that no token sees."""
    rng = np.random.default_rng(seed)
    shape = (step.num_tokens, heads, dim)
    weights = rng.standard_normal(shape[:2]).astype(np.float32)
    if q_dtype in ("uint8", "float8_e4m3fn"):
        stored = random_codes(rng, shape)
        q = E4M3_VALUES[stored]
    else:
        q = stored = rng.standard_normal(shape).astype(np.float32)
        if q_dtype == "bfloat16":
            stored = bfloat16_bits(q)
            q = widened(stored)
    if cache_dtype == "fp8_ds_mla":
        cache, keys = fp8_cache(rng, step, dim)
        return Case(step, q_dtype, cache_dtype, stored, weights, cache, q.astype(float), keys)
    keys = rng.standard_normal((step.num_blocks * step.block_size, dim)).astype(np.float32)
    cache = keys if cache_dtype == "float32" else bfloat16_bits(keys)
    keys = keys.copy() if cache_dtype == "float32" else widened(cache)
    unseen = np.setdiff1d(np.arange(len(keys)), step.seen_slots())
    cache[unseen] = NAN_BITS[cache_dtype]
    cache = cache.reshape(step.num_blocks, step.block_size, dim)
    return Case(step, q_dtype, cache_dtype, stored, weights, cache, q.astype(float), keys)


def check(case: Case, found: np.ndarray, first_token: int = 0) -> None:
    """Every seen score within the tolerance, every other entry as it was."""
    tolerance = TOLERANCE[case.q_dtype, case.cache_dtype]
    for i, line in enumerate(found):
        token = first_token + i
        window = case.step.window[token]
        assert (line[window:] == POISONED).all(), f"token {token} wrote past its window"
        if window:
            error = np.abs(line[:window] - case.wanted(token))
            assert (error <= tolerance * case.bound(token) + 1e-30).all(), f"token {token}"


@pytest.mark.parametrize(("q_dtype", "cache_dtype"), TOLERANCE)
def test_scores_of_a_mixed_step(
    kernel_memory: KernelMemory, q_dtype: str, cache_dtype: str
) -> None:
    case = make(paged_rows(SMALL_ROWS, 16), q_dtype, cache_dtype)
    check(case, case.run(kernel_memory))


@pytest.mark.parametrize("cache_dtype", ["float32", "fp8_ds_mla"])
@pytest.mark.parametrize(
    ("heads", "dim", "block_size"), [(64, 128, 64), (32, 128, 64), (17, 40, 7), (1, 4, 1)]
)
def test_sizes(
    kernel_memory: KernelMemory, cache_dtype: str, heads: int, dim: int, block_size: int
) -> None:
    step = paged_rows(((65, 1), (0, 2)), block_size)
    q_dtype = "float32" if cache_dtype == "float32" else "uint8"
    case = make(step, q_dtype, cache_dtype, heads=heads, dim=dim)
    check(case, case.run(kernel_memory))


@pytest.mark.parametrize(("q_dtype", "cache_dtype"), TOLERANCE)
def test_real_sizes(kernel_memory: KernelMemory, q_dtype: str, cache_dtype: str) -> None:
    if not kernel_memory.large:
        pytest.skip("small sizes alone in the interpreter")
    case = make(paged_rows(LARGE_ROWS, 64), q_dtype, cache_dtype, heads=64, dim=128)
    check(case, case.run(kernel_memory))


def test_a_chunk_of_tokens(kernel_memory: KernelMemory) -> None:
    case = make(paged_rows(SMALL_ROWS, 16), "float32", "float32")
    check(case, case.run(kernel_memory, 6, 9), first_token=6)


def test_a_position_past_the_scores_writes_no_other_row(kernel_memory: KernelMemory) -> None:
    m, case = kernel_memory, make(paged_rows(((40, 3),), 16, num_padded=0), "float32", "float32")
    # positions are read when the kernel runs, and may be more than the host believes
    buffer = m.poisoned((4, 20), "float32")
    case.score(m, buffer[:2])
    found = m.get(buffer)
    for token in range(2):
        np.testing.assert_allclose(found[token], case.wanted(token)[:20], rtol=0, atol=1e-4)
    assert (found[2:] == POISONED).all()


def test_keys_that_no_row_has_are_not_looked_at(kernel_memory: KernelMemory) -> None:
    m, case = kernel_memory, make(paged_rows(((140, 1),), 16, num_padded=0), "float32", "float32")
    logits = m.poisoned((1, 141), "float32")
    case.score(m, logits, max_seqlen_k=64)
    found = m.get(logits)[0]
    np.testing.assert_allclose(found[:64], case.wanted(0)[:64], rtol=0, atol=1e-4)
    assert (found[64:] == POISONED).all()


def test_a_position_past_the_table_scores_lowest(kernel_memory: KernelMemory) -> None:
    step = paged_rows(((3, 1), (5, 1)), 4, num_padded=0)
    case = make(step, "float32", "float32")
    end = 4 * step.block_tables.shape[1]
    step.position_ids[0] = step.window[0] = end + 2
    logits = kernel_memory.poisoned((2, end + 3), "float32")
    case.score(kernel_memory, logits)
    # the entry after the row's table is the first of the next row's
    assert np.isneginf(kernel_memory.get(logits)[0, end:]).all()


def test_nothing_behind_the_queries_is_read(kernel_memory: KernelMemory) -> None:
    m, case = kernel_memory, make(paged_rows(((40, 1),), 16, num_padded=0), "float32", "float32")
    behind = np.full((4, *case.q_stored.shape[1:]), np.nan, np.float32)
    queries = m.put(np.concatenate([case.q_stored, behind]))[:1]
    logits = m.poisoned((1, 41), "float32")
    case.score(m, logits, queries=queries)
    np.testing.assert_allclose(m.get(logits)[0], case.wanted(0), rtol=0, atol=1e-4)


def test_a_key_without_a_block_scores_lowest(kernel_memory: KernelMemory) -> None:
    case = make(paged_rows(((40, 1),), 16, num_padded=0), "float32", "float32")
    wanted = case.wanted(0)
    case.step.block_tables[0, 0] = -1
    case.step.block_tables[0, 1] = case.step.num_blocks
    found = case.run(kernel_memory)[0]
    assert np.isneginf(found[:32]).all()
    np.testing.assert_allclose(found[32:41], wanted[32:], rtol=0, atol=1e-4)


def test_a_nan_key_scores_nan_and_spoils_no_other(kernel_memory: KernelMemory) -> None:
    case = make(paged_rows(((40, 1),), 16, num_padded=0), "float32", "float32")
    case.cache_stored.reshape(-1, 24)[case.step.key_slots(0)[7]] = np.nan
    found = case.run(kernel_memory)[0, :41]
    wanted = np.where(np.arange(41) == 7, np.nan, case.wanted(0))
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-4, equal_nan=True)


def test_the_choice_of_the_cpu(kernel_memory: KernelMemory) -> None:
    pytest.importorskip("paddle", reason="the CPU's products are Paddle's")
    m = kernel_memory
    step = paged_rows(LARGE_ROWS if m.large else SMALL_ROWS, 64, num_padded=0)
    case = make(step, "float32", "float32", heads=64 if m.large else 16, dim=128)
    k = 2048 if m.large else 12
    found = case.run(m)
    for token in range(step.num_tokens):
        one, window = slice(token, token + 1), step.window[token : token + 1]
        slots = step.key_slots(token)
        scores = score_gathered(case.q_stored[one], case.weights[one], case.cache_stored, slots)
        table, batch = step.block_tables, step.batch_ids[one]
        wanted = positions_to_slots(select_positions(scores, window, k), batch, table, 64)
        chosen = positions_to_slots(select_positions(found[one], window, k), batch, table, 64)
        np.testing.assert_array_equal(chosen, wanted)


def test_blocks_past_two_to_the_31_bytes(kernel_memory: KernelMemory) -> None:
    if kernel_memory.name != "torch":
        pytest.skip("torch alone writes into two gigabytes in place")
    from fd_dsa.ops.logits.triton_kernel import score_pages

    m = kernel_memory
    case = make(paged_rows(SMALL_ROWS, 64), "uint8", "fp8_ds_mla", dim=128)
    step, first = case.step, (2**31 + 2**24) // 8448
    cache = m.poisoned((first + step.num_blocks, 64, 132), "uint8")
    cache[first:] = m.put(case.cache_stored)
    logits = m.poisoned((step.num_tokens, int(step.window.max()) + 3), "float32")
    tables = np.where(step.block_tables < 0, -1, step.block_tables + first).astype(np.int32)
    score_pages(
        m.put(case.q_stored),
        m.put(case.weights),
        cache,
        m.put(step.position_ids),
        m.put(step.batch_ids),
        m.put(tables),
        logits,
        block_size=64,
    )
    np.testing.assert_array_equal(m.get(logits), case.run(m))
