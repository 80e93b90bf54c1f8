"""Values of the FP8 records that prompts of DeepSeek-V4 read: which, where, and their bits."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytest.importorskip("paddle", reason="the launches take Paddle's tensors")

from fd_dsa.ops.v4_places import Entries, Windows
from fd_dsa.ops.v4_plain import PlainRows, PlainSizes
from tests.kernel_memory import POISON, KernelMemory
from tests.ops import v4_records
from tests.ops.v4_records import ROPE

pytestmark = pytest.mark.triton

WIDTH, BLOCK, RATIO, WINDOW, DRAFTS = 32, 8, 2, 5, 1
PER_BLOCK, RING = BLOCK // RATIO, WINDOW + DRAFTS
ROWS, TOKENS = 9, 64
# tokens of each row before the step and in it
Rows = list[tuple[int, int]]


class Wanted(NamedTuple):
    """Places by definition."""

    plain: list[int]
    table: np.ndarray
    blocks: list[tuple[int, int]]


class World:
    """Rows of a step, and a memory for the values of some blocks."""

    def __init__(self, m: KernelMemory, rows: Rows, capacity: int, columns: int = 20) -> None:
        self.m, self.rows, rng = m, rows, np.random.default_rng(len(rows))
        self.sizes = PlainSizes(
            TOKENS, ROWS, columns, DRAFTS, WINDOW, RING, BLOCK, RATIO, WIDTH, ROPE
        )
        keys = self.sizes.first_entry + capacity * PER_BLOCK
        memory = m.poisoned((keys * WIDTH // 2,), "float32")
        self.plain = PlainRows(self.sizes, memory, m.poisoned)
        self.memory, self.num_blocks = memory, 40
        # rows may share blocks, and a few numbers are of no block
        self.table = rng.integers(0, 40, (len(rows), columns)).astype(np.int32)
        odd = rng.random(self.table.shape) < 0.1
        self.table[odd] = rng.choice([-1, 40, 1000], odd.sum())
        self.capacity = self.sizes.capacity(keys * WIDTH // 2)

    def place(self) -> Any:
        before, new = (np.array(x, np.int32) for x in zip(*self.rows, strict=True))
        given = self.m.put(before), self.m.put(new), self.m.put(self.table)
        return self.plain.place(*given, self.num_blocks)

    def wanted(self) -> Wanted:
        plain, blocks, used = [0] * len(self.rows), list[tuple[int, int]](), 0
        table = np.full_like(self.table, -2)
        for row, (before, new) in enumerate(self.rows):
            entries = (before + new) // RATIO
            count = -(-entries // PER_BLOCK)
            worth = new > DRAFTS + 1 and entries <= 16 * new
            worth = worth and count <= min(self.capacity, self.table.shape[1])
            used += count if worth else 0
            is_plain = worth and used <= self.capacity
            plain[row] = before + 1 if is_plain else 0
            used_columns = min(-(-(before + new) // BLOCK), self.table.shape[1])
            for column in range(used_columns if new else 0):
                block = int(self.table[row, column])
                block = block if 0 <= block < self.num_blocks else -1
                table[row, column] = block
                if is_plain:
                    table[row, column] = -1
                    if column < count:
                        table[row, column] = len(blocks) if block >= 0 else -1
                        blocks.append((block, min(before + new - column * BLOCK, BLOCK)))
        return Wanted(plain, table, blocks)

    def check_places(self, found: Any) -> Wanted:
        m, wanted = self.m, self.wanted()
        assert m.get(found.is_plain)[: len(self.rows)].tolist() == wanted.plain
        table, poison = m.get(found.block_table), np.int32(POISON * 0x01010101 - 2**32)
        written = np.full_like(table, poison)
        written[: len(self.rows)] = np.where(wanted.table == -2, poison, wanted.table)
        np.testing.assert_array_equal(table, written)
        assert m.get(found.total).tolist() == [len(wanted.blocks)] and found.capacity > 0
        blocks = m.get(found.blocks)
        assert list(map(tuple, blocks[: len(wanted.blocks)].tolist())) == wanted.blocks
        assert (blocks[len(wanted.blocks) :] == poison).all()
        return wanted


a_row = st.tuples(st.integers(0, 90), st.sampled_from([0, 1, 2, 3, 4, 7, 30, 60]))


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(rows=st.lists(a_row, min_size=1, max_size=ROWS), capacity=st.integers(1, 30))
def test_places_of_any_rows(paddle_memory: KernelMemory, rows: Rows, capacity: int) -> None:
    world = World(paddle_memory, rows, capacity)
    world.check_places(world.place())


def test_more_rows_than_a_tile(
    paddle_memory: KernelMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And more columns than a program writes at once."""
    monkeypatch.setattr("fd_dsa.ops.v4_plain.MAX_ROWS", 2)
    monkeypatch.setattr("fd_dsa.ops.v4_plain.COLUMNS", 2)
    world = World(paddle_memory, [(3, 9), (80, 1), (8, 40), (0, 0), (16, 16), (20, 30)], 16)
    wanted = world.check_places(world.place())
    assert [*map(bool, wanted.plain)] == [True, False, True, False, True, False]


def test_few_tokens_of_a_long_row_are_not_worth_it(paddle_memory: KernelMemory) -> None:
    world = World(paddle_memory, [(93, 3), (95, 3), (94, 3)], 30)
    wanted = world.check_places(world.place())
    assert [*map(bool, wanted.plain)] == [True, False, True]


def test_rows_past_their_table_are_not_plain(paddle_memory: KernelMemory) -> None:
    """Drafts may be past the longest row."""
    world = World(paddle_memory, [(10, 20), (4, 9), (16, 3)], 30, columns=2)
    wanted = world.check_places(world.place())
    assert [*map(bool, wanted.plain)] == [False, True, False]


def test_the_memory_holds_the_longest_row(paddle_memory: KernelMemory) -> None:
    """And as many entries as prompts may be worth, but no more."""
    for columns, most in ((20, 28), (1000, 265)):
        sizes = World(paddle_memory, [(0, 1)], 1, columns).sizes
        assert sizes.capacity(sizes.least_words) == min(columns + TOKENS // BLOCK, most)
        assert sizes.capacity(1 << 30) == 16 * TOKENS // PER_BLOCK + ROWS
        assert sizes.capacity(sizes.first_entry * WIDTH // 2) == sizes.capacity(0) == 0


@pytest.mark.parametrize("ratio", [RATIO, BLOCK, 0])
@pytest.mark.parametrize("before", range(0, 2 * RING + 1, 3))
def test_values_of_plain_rows(paddle_memory: KernelMemory, before: int, ratio: int) -> None:
    """All keys that tokens of plain rows may read, and nothing else.

    Entries of the layer may be fewer than those that the places are for.
    """
    m, rng = paddle_memory, np.random.default_rng(before)
    rows = [(9, 1), (before, 13), (40, 5), (before + 1, 4), (0, 0), (60, 30)]
    world, numbers = World(m, rows, 11), np.arange(ROWS, dtype=np.int32)
    # a step with more rows, all of them plain
    world.plain.place(*map(m.put, (numbers, numbers + 3)), m.put(world.table[numbers % 6]), 40)
    places = world.place()
    wanted = world.wanted()
    assert [*map(bool, wanted.plain)] == [False, True, True, True, False, False]
    ids = np.repeat(np.arange(len(rows), dtype=np.int32), [new for _, new in rows])
    # rows of snapshots follow; records that are not read have codes of NaN
    keys = drawn_records(rng, len(ids) + 2)
    ring = drawn_records(rng, (ROWS + 2) * RING)
    read = np.zeros(len(ring), bool)
    for row, (kept, _) in enumerate(rows):
        if wanted.plain[row]:
            for position in range(max(0, kept - WINDOW + 1), kept):
                read[row * RING + position % RING] = True
    ring[~read] = 0xFF
    per_block = BLOCK // ratio if ratio else 1
    pool = drawn_records(rng, world.num_blocks * per_block).reshape(world.num_blocks, per_block, -1)
    seen, source = np.zeros(len(world.memory) * 2 // WIDTH, bool), {}
    for token, row in enumerate(ids):
        if wanted.plain[row]:
            source[token] = keys[token]
    for place in np.flatnonzero(read):
        source[TOKENS + place] = ring[place]
    for number, (block, tokens) in enumerate(wanted.blocks if ratio else ()):
        for entry in range(tokens // ratio if block >= 0 else 0):
            place = world.sizes.first_entry + number * per_block + entry
            source[place] = pool[block, entry]
    found = world.plain.fill(
        Windows(m.put(keys), m.put(ring), RING, WINDOW),
        Entries(m.put(pool), ratio) if ratio else None,
        m.put(np.concatenate((ids, [-1, -1])).astype(np.int32)),
        len(rows),
    )
    assert found.num_slots == (places.capacity * per_block if ratio else 0)
    bits = m.get(world.memory).view(np.uint16).reshape(-1, WIDTH)
    exact = v4_records.values(np.stack([*source.values()])).astype(np.float32)
    np.testing.assert_array_equal(bits[[*source]], exact.view(np.uint32) >> 16)
    seen[[*source]] = True
    assert (bits[~seen] == POISON * 0x0101).all()


def drawn_records(rng: np.random.Generator, count: int) -> np.ndarray:
    return v4_records.records(rng.standard_normal((count, WIDTH)).astype(np.float32))
