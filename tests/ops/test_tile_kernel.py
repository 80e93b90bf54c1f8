"""The tensor-core kernel for indexer scores against sums in doubles, on all memories."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest

from tests.kernel_memory import POISON, KernelMemory
from tests.ops.e4m3 import E4M3_VALUES
from tests.ops.fp8_pages import fp8_cache, random_codes
from tests.ops.paged_rows import LARGE_ROWS, PagedRows, paged_rows

pytestmark = pytest.mark.triton

POISONED = np.full(4, POISON, np.uint8).view(np.float32)[0]
# of the sum of magnitudes: tensor cores sum FP8 products with fewer bits than float32 has
TOLERANCE = {False: 1e-6, True: 2e-4}
# a first chunk, a decode row, a chunk after a prefix, rows of 2 and 3 drafts, a lone token
ROWS = ((0, 5), (130, 1), (60, 6), (125, 3), (63, 2), (0, 1))
# first and other tokens of a tile
FORMS = [(1, 0), (2, 0), (2, 1), (2, 2), (4, 4)]
DIM, PAGE = 128, 64


@dataclass
class Case:
    """One step's queries and cache: as stored, and as float64 values.

    Attributes:
        q_codes, weights, cache: what the kernel gets.
        q, keys: values; keys is [num_slots, 128].
    """

    step: PagedRows
    q_codes: np.ndarray
    weights: np.ndarray
    cache: np.ndarray
    q: np.ndarray
    keys: np.ndarray

    def wanted(self, token: int) -> np.ndarray:
        """float64 [window]; the oracle's scores of a token."""
        dots = self.q[token] @ self.keys[self.step.key_slots(token)].T
        return self.weights[token].astype(np.float64) @ np.maximum(dots, 0.0)

    def magnitude(self, token: int) -> np.ndarray:
        """float64 [window]; what an error is a share of."""
        dots = np.abs(self.q[token]) @ np.abs(self.keys[self.step.key_slots(token)]).T
        return np.abs(self.weights[token].astype(np.float64)) @ dots


def make(step: PagedRows, heads: int = 5, seed: int = 0) -> Case:
    """Random queries and keys; NaN in every slot that no token sees."""
    rng = np.random.default_rng(seed)
    codes = random_codes(rng, (step.num_tokens, heads, DIM))
    weights = rng.standard_normal(codes.shape[:2]).astype(np.float32)
    cache, keys = fp8_cache(rng, step, DIM)
    return Case(step, codes, weights, cache, E4M3_VALUES[codes].astype(np.float64), keys)


class Scorer:
    """A case in a memory, with a schedule and poisoned scores of all its tokens.

    Args:
        form: first and other tokens of a tile.
        chunk_tokens: tokens scored in a launch; None = all.
        num_programs: that the pages are shared out to.
        least: as `least_keys` of the schedule.
        width: of the scores; None = three more than the longest window.
    """

    def __init__(
        self,
        m: KernelMemory,
        case: Case,
        form: tuple[int, int] = (2, 2),
        *,
        chunk_tokens: int | None = None,
        num_programs: int = 5,
        least: int = 0,
        width: int | None = None,
        q_dtype: str = "uint8",
    ) -> None:
        from fd_dsa.ops.logits.tile_forms import TileForm
        from fd_dsa.ops.logits.tile_schedule import TileSchedule

        step, self.m, self.least = case.step, m, least
        tokens = step.num_tokens
        self.case, self.form = case, TileForm(*form, num_stages=3)
        self.chunk_tokens = chunk_tokens or tokens
        num_chunks = -(-tokens // self.chunk_tokens)
        self.schedule = TileSchedule.allocate(tokens, num_chunks, num_programs, m.poisoned)
        self.logits = m.poisoned((tokens, width or int(step.window.max()) + 3), "float32")
        self.q = m.put(case.q_codes, q_dtype if q_dtype != "uint8" else None)
        self.weights, self.cache = m.put(case.weights), m.put(case.cache)
        self.positions, self.batch = m.put(step.position_ids), m.put(step.batch_ids)
        self.tables = m.put(step.block_tables)
        counts = np.bincount(step.batch_ids[step.batch_ids >= 0], minlength=len(step.block_tables))
        self.cu = m.put(np.cumsum([0, *counts]).astype(np.int32))

    def fill(self) -> None:
        """Make the schedule."""
        from fd_dsa.ops.logits.tile_schedule import fill_tile_schedule

        fill_tile_schedule(
            self.schedule,
            self.positions,
            self.batch,
            self.cu,
            form=self.form,
            max_keys=self.logits.shape[1],
            chunk_tokens=self.chunk_tokens,
            least_keys=self.least,
        )

    def score(self, index: int = 0, **changes: Any) -> None:
        """Launch for one chunk; `changes` stand for arguments."""
        from fd_dsa.ops.logits.tile_kernel import score_tiles

        first = index * self.chunk_tokens
        tensors = {
            "q": self.q,
            "weights": self.weights,
            "cache": self.cache,
            "position_ids": self.positions,
            "block_tables": self.tables,
            "schedule": self.schedule,
            "logits": self.logits[first : first + self.chunk_tokens],
        }
        numbers = {"form": self.form, "first_token": first, "chunk": index}
        score_tiles(**(tensors | numbers | changes))

    def run(self) -> np.ndarray:
        """Scores of all chunks; poison where nothing was written."""
        self.fill()
        for chunk in range(-(-self.case.step.num_tokens // self.chunk_tokens)):
            self.score(chunk)
        return self.m.get(self.logits)

    def check(self, found: np.ndarray | None = None, scored: Any = None) -> None:
        """Every seen score within the tolerance, every other entry as it was."""
        found = self.run() if found is None else found
        for token, line in enumerate(found):
            window = self.case.step.window[token]
            if scored is not None and not scored[token]:
                window = 0
            assert (line[window:] == POISONED).all(), f"token {token} wrote past its window"
            if window:
                error = self.error(line, token, slice(window))
                assert error <= TOLERANCE[self.m.on_gpu], f"token {token}: {error:.2e}"

    def error(self, line: np.ndarray, token: int, keys: Any) -> float:
        """Root mean square of a token's errors at some keys, as a share of the magnitudes."""
        difference = line[keys] - self.case.wanted(token)[keys]
        return np.linalg.norm(difference) / np.linalg.norm(self.case.magnitude(token)[keys])


@pytest.mark.parametrize("form", FORMS)
def test_scores_of_a_mixed_step(kernel_memory: KernelMemory, form: tuple[int, int]) -> None:
    Scorer(kernel_memory, make(paged_rows(ROWS, PAGE)), form).check()


@pytest.mark.parametrize("heads", [1, 16, 24, 64, 128])
def test_heads(kernel_memory: KernelMemory, heads: int) -> None:
    Scorer(kernel_memory, make(paged_rows(((65, 1), (0, 2)), PAGE), heads), (1, 1)).check()


def test_queries_of_their_own_type(kernel_memory: KernelMemory) -> None:
    case = make(paged_rows(((65, 2),), PAGE))
    Scorer(kernel_memory, case, q_dtype="float8_e4m3fn").check()


@pytest.mark.parametrize("num_programs", [1, 2, 7, 40])
def test_programs(kernel_memory: KernelMemory, num_programs: int) -> None:
    case = make(paged_rows(((300, 3), (10, 1), (500, 1)), PAGE))
    Scorer(kernel_memory, case, (2, 1), num_programs=num_programs).check()


@pytest.mark.parametrize("cached", [62, 63, 64, 65, 126, 127, 128])
def test_windows_at_the_edges_of_pages(kernel_memory: KernelMemory, cached: int) -> None:
    # the last page of a tile may be seen by its last token alone
    Scorer(kernel_memory, make(paged_rows(((cached, 4), (cached, 1)), PAGE))).check()


@pytest.mark.parametrize("chunk_tokens", [1, 4, 7])
def test_chunks(kernel_memory: KernelMemory, chunk_tokens: int) -> None:
    case = make(paged_rows(ROWS, PAGE))
    Scorer(kernel_memory, case, chunk_tokens=chunk_tokens).check()


def test_a_tile_without_a_long_window_is_left_out(kernel_memory: KernelMemory) -> None:
    # tiles of 2: those that end at the windows 98, 100, 102 and 103
    step = paged_rows(((96, 7), (40, 1)), PAGE)
    scored = [False] * 4 + [True] * 3 + [False] * 4
    Scorer(kernel_memory, make(step), (2, 0), least=100).check(scored=scored)


def test_windows_that_grow_behind_the_host(kernel_memory: KernelMemory) -> None:
    # launches of a graph: the same arguments, read again
    m = kernel_memory
    before = make(paged_rows(((70, 1), (3, 1), (200, 2)), PAGE))
    scorer = Scorer(m, before, (1, 1), width=300)
    scorer.check()
    step = before.step
    grown = replace(
        step,
        position_ids=step.position_ids - 60 * (step.window > 70),
        window=np.where(step.window > 70, step.window - 60, step.window),
    )
    case = replace(before, step=grown)
    shrunk = Scorer(m, case, (1, 1), width=300)
    shrunk.check()
    # the tables are those of the long rows
    shrunk.positions[:] = m.put(step.position_ids)
    shrunk.case = before
    shrunk.logits = m.poisoned(tuple(shrunk.logits.shape), "float32")
    shrunk.check()


def test_scores_at_a_distance(kernel_memory: KernelMemory) -> None:
    m = kernel_memory
    scorer = Scorer(m, make(paged_rows(((100, 3),), PAGE, num_padded=1)), (2, 1))
    wide = m.poisoned((4, 2 * 106), "float32")
    scorer.fill()
    scorer.score(logits=wide[:, :106])
    found = m.get(wide)
    scorer.check(found[:, :106])
    assert (found[:, 106:] == POISONED).all()


def test_a_position_past_the_scores_writes_no_other_row(kernel_memory: KernelMemory) -> None:
    m = kernel_memory
    scorer = Scorer(m, make(paged_rows(((140, 3),), PAGE, num_padded=0)), width=70)
    found = scorer.run()
    for token in range(3):
        assert scorer.error(found[token], token, slice(70)) <= TOLERANCE[m.on_gpu]


def test_rows_that_the_schedule_has_and_the_scores_have_not(kernel_memory: KernelMemory) -> None:
    m = kernel_memory
    scorer = Scorer(m, make(paged_rows(((100, 4),), PAGE, num_padded=0)), (2, 2))
    scorer.fill()
    scorer.score(logits=scorer.logits[1:3], first_token=1)
    assert (m.get(scorer.logits) == POISONED).all()
    scorer.score(logits=scorer.logits[:2])
    found = m.get(scorer.logits)
    assert (found[2:] == POISONED).all() and not (found[:2, :101] == POISONED).any()


def test_keys_without_a_block_score_lowest(kernel_memory: KernelMemory) -> None:
    m, case = kernel_memory, make(paged_rows(((200, 2),), PAGE, num_padded=0))
    scorer = Scorer(m, case)
    tables = case.step.block_tables.copy()
    tables[0, [0, 2]] = -1, case.step.num_blocks
    scorer.tables = m.put(tables)
    found = scorer.run()
    assert np.isneginf(found[:, :64]).all() and np.isneginf(found[:, 128:192]).all()
    assert scorer.error(found[1], 1, np.r_[64:128, 192:202]) <= TOLERANCE[m.on_gpu]


def test_a_position_past_the_table_scores_lowest(kernel_memory: KernelMemory) -> None:
    step = paged_rows(((3, 1), (5, 1)), PAGE, num_padded=0)
    end = PAGE * step.block_tables.shape[1]
    step.position_ids[0] = end + 2
    case = make(paged_rows(((3, 1), (5, 1)), PAGE, num_padded=0))
    scorer = Scorer(kernel_memory, replace(case, step=step), (1, 0), width=end + 3)
    # the entry after a row's table is the first of the next row's
    assert np.isneginf(scorer.run()[0, end:]).all()


def test_a_nan_key_scores_nan_and_spoils_no_other(kernel_memory: KernelMemory) -> None:
    m, case = kernel_memory, make(paged_rows(((100, 1),), PAGE, num_padded=0))
    scorer = Scorer(m, case)
    pages = case.cache.copy().reshape(len(case.cache), -1)
    block, offset = divmod(int(case.step.key_slots(0)[7]), PAGE)
    pages[block, PAGE * DIM + 4 * offset :][:4] = np.array([np.nan], np.float32).view(np.uint8)
    spoiled = [7]
    if m.on_gpu:
        # the interpreter takes the code of NaN for a number
        block, offset = divmod(int(case.step.key_slots(0)[70]), PAGE)
        pages[block, offset * DIM] = 0xFF
        spoiled.append(70)
    scorer.cache = m.put(pages.reshape(case.cache.shape))
    found = scorer.run()[0]
    assert np.flatnonzero(np.isnan(found[:101])).tolist() == spoiled
    clean = np.setdiff1d(np.arange(101), spoiled)
    assert scorer.error(found, 0, clean) <= TOLERANCE[m.on_gpu]


def test_a_table_for_a_million_keys(kernel_memory: KernelMemory) -> None:
    case = make(paged_rows(((70, 2), (130, 1)), PAGE))
    tables = np.full((2, (1 << 20) // PAGE), -1, np.int32)
    tables[:, : case.step.block_tables.shape[1]] = case.step.block_tables
    case = replace(case, step=replace(case.step, block_tables=tables))
    Scorer(kernel_memory, case, num_programs=9).check()


@pytest.mark.parametrize("form", FORMS[1:4])
@pytest.mark.parametrize("heads", [64, 32, 16])
def test_real_sizes(kernel_memory: KernelMemory, form: tuple[int, int], heads: int) -> None:
    if not kernel_memory.large:
        pytest.skip("small sizes alone in the interpreter")
    case = make(paged_rows(LARGE_ROWS, PAGE), heads)
    scorer = Scorer(kernel_memory, case, form, num_programs=132 * 4)
    found = scorer.run()
    scorer.check(found)
    scorer.score()
    np.testing.assert_array_equal(kernel_memory.get(scorer.logits), found)


def test_blocks_past_two_to_the_31_bytes(kernel_memory: KernelMemory) -> None:
    if kernel_memory.name != "torch":
        pytest.skip("torch alone writes into two gigabytes in place")
    m, case = kernel_memory, make(paged_rows(ROWS, PAGE))
    first = (2**31 + 2**24) // 8448
    cache = m.poisoned((first + case.step.num_blocks, 64, 132), "uint8")
    cache[first:] = m.put(case.cache)
    near, far = Scorer(m, case), Scorer(m, case)
    tables = case.step.block_tables
    far.tables = m.put(np.where(tables < 0, -1, tables + first).astype(np.int32))
    far.cache = cache
    np.testing.assert_array_equal(far.run(), near.run())


def test_no_rows_is_no_launch(kernel_memory: KernelMemory) -> None:
    scorer = Scorer(kernel_memory, make(paged_rows(((9, 5),), PAGE)))
    scorer.score(logits=scorer.logits[:0])
    assert (kernel_memory.get(scorer.logits) == POISONED).all()
