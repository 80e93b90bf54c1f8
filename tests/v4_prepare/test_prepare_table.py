"""The block table between the host and the device: what is sent is what every step needs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fd_dsa.v4_prepare import OUTPUT_SHAPES, V4Prepare, V4PrepareConfig, V4PrepareError
from fd_dsa.v4_prepare.slab import NUM_ROWS, NUM_TOKENS, NUM_VALUES, SlabLayout
from tests.reference.v4_prepare import naive
from tests.v4_prepare.places import assert_step

CFG = V4PrepareConfig(
    window_size=3,
    spec_tokens=1,
    block_size=4,
    csa_ratio=2,
    hca_ratio=4,
    index_topk=2,
    num_slots=4,
    num_blocks=30,
    max_blocks_per_seq=6,
    max_num_seqs=3,
    max_num_tokens=12,
    max_tokens_per_seq=6,
    max_model_len=22,
)


def lengths(draw: st.DrawFn, num_rows: int) -> tuple[np.ndarray, np.ndarray]:
    """ctx and q of a step; any row may grow, shrink, change hands or idle."""
    q = [draw(st.sampled_from([0, 1, 1, 2, 4])) for _ in range(num_rows)]
    ctx = [draw(st.integers(n, CFG.max_model_len)) for n in q]
    return np.array(ctx, np.int32), np.array(q, np.int32)


@st.composite
def histories(draw: st.DrawFn) -> list[tuple[Any, ...]]:
    """Steps with whole tables, in which some cells are those of the step before."""
    found, table = [], np.full((3, 6), -1, np.int64)
    for _ in range(draw(st.integers(1, 8))):
        num_rows = draw(st.integers(0, 3))
        ctx, q = lengths(draw, num_rows)
        rng = np.random.default_rng(draw(st.integers(0, 99)))
        changed = rng.random(table.shape) < draw(st.sampled_from([0, 0.1, 1]))
        needed = np.zeros(3, np.int64)
        needed[:num_rows] = -(-ctx // 4) * (q > 0)
        is_needed = np.arange(6) < needed[:, None]
        is_bad = is_needed & ((table < 0) | (table >= 30))
        table = np.where(changed | is_bad, rng.integers(0, 30, (3, 6)), table)
        # what no token needs may be no block at all
        garbage = ~is_needed & (rng.random(table.shape) < 0.3)
        table[garbage] = rng.choice([-1, 77, -(2**31)], garbage.sum())
        dtype = draw(st.sampled_from(["int32", "int64"]))
        slot = rng.permutation(4)[:num_rows]
        found.append((ctx, q, slot.astype(np.int32), table[:num_rows].astype(dtype)))
    return found


def outputs(prepare: V4Prepare) -> dict[str, np.ndarray]:
    """The outputs of the step that was expanded last."""
    found = {name: getattr(prepare.buffers, name) for name in OUTPUT_SHAPES(prepare.cfg)}
    return found | {"hca_idx": found["hca_idx"][: found["counts"][2]]}


@settings(max_examples=80)
@given(history=histories(), ahead=st.integers(1, 3))
def test_whole_tables(history: list[tuple[Any, ...]], ahead: int) -> None:
    prepare = V4Prepare(CFG, "numpy")
    for number, step in enumerate(history):
        prepare.stage(*step)
        if number + 1 >= ahead:
            prepare.expand()
            assert_step(outputs(prepare), naive(CFG, *history[number + 1 - ahead]))


@settings(max_examples=80)
@given(history=histories(), data=st.data())
def test_rows_that_are_set(history: list[tuple[Any, ...]], data: st.DataObject) -> None:
    """A scheduler that says what changed, in one or several calls, in rows of this step or not."""
    prepare = V4Prepare(CFG, "numpy")
    known: list[list[int]] = [[], [], []]
    for step in history:
        ctx, q, slot, table = step
        for row in range(len(q)):
            blocks = table[row, : -(-int(ctx[row]) // 4)].tolist() if q[row] else []
            same = 0
            while same < min(len(blocks), len(known[row])) and blocks[same] == known[row][same]:
                same += 1
            start = data.draw(st.integers(0, same))
            middle = data.draw(st.integers(start, len(blocks)))
            prepare.set_blocks(row, blocks[start:middle], start)
            prepare.set_blocks(row, blocks[middle:], middle)
            known[row] = blocks
        prepare.stage(ctx, q, slot)
        prepare.expand()
        assert_step(outputs(prepare), naive(CFG, *step))


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        ((1, [3, 30]), "E_BLOCK", "row 1: block_table[1]=30 not in [0, 30)"),
        ((1, [-1], 2), "E_BLOCK", "row 1: block_table[2]=-1 not in [0, 30)"),
        ((1, np.array([2**40])), "E_BLOCK", "block_table[0]=1099511627776 not in"),
        ((2, [5] * 7), "E_TABLE", "row 2: needs 7 blocks, table has 6 columns"),
        ((1, [5] * 5, 2), "E_TABLE", "row 1: needs 7 blocks, table has 6 columns"),
        ((0, [1.5]), "E_DTYPE", "row 0: block_ids of shape [1] and dtype float64"),
        ((0, [[1]]), "E_DTYPE", "row 0: block_ids of shape [1, 1] and dtype int"),
        ((0, 5), "E_DTYPE", "row 0: block_ids of shape [] and dtype int"),
    ],
)
def test_blocks_that_cannot_be_set(arguments: Any, code: str, text: str) -> None:
    prepare = V4Prepare(CFG, "numpy")
    prepare.set_blocks(1, [8, 9])
    with pytest.raises(V4PrepareError) as caught:
        prepare.set_blocks(*arguments)
    assert caught.value.code == code
    assert text in str(caught.value)
    # the row is as it was
    prepare.stage([0, 8], [0, 1], [0, 1])
    prepare.expand()
    expected = naive(CFG, [0, 8], [0, 1], [0, 1], [[-1, -1], [8, 9]])
    assert_step(outputs(prepare), expected)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ((3, [1]), "row: got 3, allowed is 0..2"),
        ((-1, [1]), "row: got -1, allowed is 0..2"),
        ((1, [1], 3), "start: got 3, row 1 has 2 blocks, allowed is 0..2"),
        ((1, [1], -1), "start: got -1, row 1 has 2 blocks"),
    ],
)
def test_rows_that_cannot_be_set(arguments: Any, text: str) -> None:
    prepare = V4Prepare(CFG, "numpy")
    prepare.set_blocks(1, [8, 9])
    with pytest.raises(ValueError, match="got") as caught:
        prepare.set_blocks(*arguments)
    assert text in str(caught.value)


def test_a_row_must_have_its_blocks() -> None:
    prepare = V4Prepare(CFG, "numpy")
    prepare.set_blocks(0, [1, 2])
    prepare.set_blocks(1, [3])
    step = np.array([8, 5], np.int32), np.array([1, 1], np.int32), np.array([0, 1], np.int32)
    with pytest.raises(V4PrepareError) as caught:
        prepare.stage(*step)
    assert str(caught.value) == "v4_prepare: E_BLOCK: row 1: block_table[1]=-1 not in [0, 30)"
    prepare.set_blocks(1, [4], 1)
    prepare.stage(*step)
    # a new request of the row has the blocks that were set for it, not those behind them
    prepare.set_blocks(1, [6])
    with pytest.raises(V4PrepareError, match=r"row 1: block_table\[1\]=-1"):
        prepare.stage(*step)


def test_a_table_says_how_many_blocks_a_row_has() -> None:
    prepare = V4Prepare(CFG, "numpy")
    prepare.stage([8], [1], [0], [[1, 2]])
    prepare.stage([4], [1], [0], [[1, 2]])
    with pytest.raises(V4PrepareError, match=r"row 0: block_table\[1\]=-1"):
        prepare.stage([5], [1], [0])
    prepare.set_blocks(0, [9], 1)
    prepare.stage([5], [1], [0])
    for expected in (([8], [[1, 2]]), ([4], [[1, 2]]), ([5], [[1, 9]])):
        prepare.expand()
        assert_step(outputs(prepare), naive(CFG, expected[0], [1], [0], expected[1]))


@pytest.mark.parametrize("cell", [-1, 30, 2**31 - 1])
def test_a_cell_that_was_garbage_when_nobody_needed_it(cell: int) -> None:
    prepare = V4Prepare(CFG, "numpy")
    prepare.stage([4], [1], [0], [[1, cell]])
    with pytest.raises(V4PrepareError, match=r"row 0: block_table\[1\]="):
        prepare.stage([5], [1], [0], [[1, cell]])


def test_cells_that_were_set_and_never_sent() -> None:
    prepare = V4Prepare(CFG, "numpy")
    # the mirror has what the table says; the device has nothing of it
    prepare.set_blocks(0, [5, 6])
    prepare.set_blocks(0, [5])
    step = [8], [1], [0], [[5, 6]]
    prepare.stage(*step)
    prepare.expand()
    assert_step(outputs(prepare), naive(CFG, *step))


class Slabs:
    """Looks at the slabs that a builder fills."""

    def __init__(self, prepare: V4Prepare) -> None:
        self.layout = SlabLayout(prepare.cfg)
        self.words = np.empty(0, np.int32)
        self._steps = prepare._steps
        self._upload = prepare._steps.upload
        prepare._steps.upload = self._look  # type: ignore[method-assign]

    def _look(self, num_words: int) -> int:
        self.words = self._steps.next_slab()[:num_words].copy()
        return self._upload(num_words)

    def section(self, name: str, length: int = 3) -> list[int]:
        """The rows of one section of the slab that was filled last."""
        return self.words[getattr(self.layout, name) :][:length].tolist()

    def values(self) -> list[int]:
        """The cells that travel."""
        return self.words[self.layout.values :].tolist()


def test_only_changed_cells_travel() -> None:
    prepare = V4Prepare(CFG, "numpy")
    slabs, sent = Slabs(prepare), []
    table = np.array([[1, 2, 3], [4, 5, 6], [7, 8, 9]])
    steps = [[8, 8, 8], [8, 8, 8], [9, 8, 8], [9, 12, 8]]
    for number, ctx in enumerate(steps):
        # an idle row keeps its cells
        prepare.stage(ctx, [1, 1, number != 1], [0, 1, 2], table)
        prepare.expand()
        sent.append(slabs.values())
    table[2, 0] = 11
    prepare.stage([9, 12, 8], [1, 1, 1], [0, 1, 2], table)
    # one run a row, from the first changed cell on
    assert [*sent, slabs.values()] == [[1, 2, 4, 5, 7, 8], [], [3], [6], [11, 8]]
    assert slabs.section("run_start", 4) == [0, 0, 0, 2]
    assert slabs.section("run_column")[2] == 0


def test_a_slab_says_nothing_of_rows_that_its_step_lacks() -> None:
    prepare = V4Prepare(CFG, "numpy")
    slabs = Slabs(prepare)
    prepare.stage([8, 8, 8], [1, 2, 1], [3, 1, 2], [[1, 2], [4, 5], [7, 8]])
    prepare.stage([9], [2], [0], [[1, 2, 3]])
    assert slabs.words[[NUM_ROWS, NUM_TOKENS, NUM_VALUES]].tolist() == [1, 2, 1]
    assert slabs.section("ctx") == [9, 0, 0]
    assert slabs.section("q") == [2, 0, 0]
    assert slabs.section("slot") == [0, -1, -1]
    assert slabs.section("run_start", 4) == [0, 1, 1, 1]
    assert slabs.section("run_column")[0] == 2
    assert slabs.values() == [3]
    prepare.stage([9, 8], [1, 1], [0, 1])
    assert slabs.section("q") == [1, 1, 0]
    assert slabs.section("run_start", 4) == [0, 0, 0, 0]


@settings(max_examples=60)
@given(seed=st.integers(0, 1 << 30))
def test_appended_blocks_travel_as_those_that_are_set(seed: int) -> None:
    rng = np.random.default_rng(seed)
    ours, other = V4Prepare(CFG, "numpy"), V4Prepare(CFG, "numpy")
    slabs = [Slabs(ours), Slabs(other)]
    num_blocks = [0, 0, 0]
    for _ in range(12):
        for _ in range(rng.integers(0, 3)):
            rows = rng.permutation(3)[: rng.integers(0, 4)]
            rows = rows[[num_blocks[row] < CFG.max_blocks_per_seq for row in rows]]
            ids = rng.integers(0, 30, len(rows))
            if rng.random() < 0.7:
                kind = rng.choice(["i4", "u1", "i8"])
                given = rows.astype(kind), ids.astype(kind)
                ours.append_blocks(*given)
                for array in given:
                    array.fill(99)
            else:
                ours.append_blocks(rows.tolist(), ids.tolist())
            for row, block in zip(rows.tolist(), ids.tolist(), strict=True):
                other.set_blocks(row, [block], num_blocks[row])
                num_blocks[row] += 1
            if rng.random() < 0.3:
                row = int(rng.integers(3))
                num_blocks[row] = int(rng.integers(0, num_blocks[row] + 1))
                for prepare in (ours, other):
                    prepare.set_blocks(row, [], num_blocks[row])
        count = int(rng.integers(0, 4))
        q = np.array([n > 0 for n in num_blocks[:count]], np.int32)
        ctx = q * rng.integers(1, 5, count).astype(np.int32)
        for prepare in (ours, other):
            prepare.stage(ctx, q, np.arange(count, dtype=np.int32))
            prepare.expand()
        assert slabs[0].values() == slabs[1].values()
        assert slabs[0].section("run_start", 4) == slabs[1].section("run_start", 4)
        for b in np.flatnonzero(np.diff(slabs[0].section("run_start", 4))):
            assert slabs[0].section("run_column")[b] == slabs[1].section("run_column")[b]
        assert np.array_equal(ours.buffers.block_table, other.buffers.block_table)


@pytest.mark.parametrize(
    ("rows", "ids", "text"),
    [
        ([0, 3], [1, 2], "row: got 3, allowed is 0..2 = max_num_seqs - 1; name a row"),
        ([-1], [1], "row: got -1, allowed is 0..2"),
        ([0, 1, 0], [1, 2, 3], "rows: got row 0 twice"),
        ([0, 1], [1, 30], "E_BLOCK: row 1: block_table[2]=30 not in [0, 30)"),
        ([1, 0], [-1, 30], "E_BLOCK: row 1: block_table[2]=-1 not in [0, 30)"),
        ([0, 1], np.array([3, 2**63], np.uint64), "row 1: block_table[2]=9223372036854775808"),
        ([0, 2], [1, 2], "E_TABLE: row 2: needs 7 blocks, table has 6 columns"),
        ([0, 1], [1], "E_SHAPE: batch: got 2 rows and 1 block_ids"),
        (
            [0],
            [1.0],
            "E_DTYPE: batch: block_ids of shape [1] and dtype float64, must be [n] integers",
        ),
        ([True], [1], "E_DTYPE: batch: rows of shape [1] and dtype bool"),
        (0, 1, "E_DTYPE: batch: rows of shape [] and dtype int"),
        ([[0]], [[1]], "E_DTYPE: batch: rows of shape [1, 1] and dtype int"),
    ],
)
def test_blocks_that_cannot_be_appended(rows: Any, ids: Any, text: str) -> None:
    prepare = V4Prepare(CFG, "numpy")
    prepare.set_blocks(1, [8, 9])
    prepare.set_blocks(2, [1] * 6)
    slabs = Slabs(prepare)
    with pytest.raises(ValueError, match=r"got|E_") as caught:
        prepare.append_blocks(rows, ids)
    assert text in str(caught.value)
    # all rows are as they were
    with pytest.raises(V4PrepareError, match=r"row 1: block_table\[2\]=-1"):
        prepare.stage([0, 9, 22], [0, 1, 1], [0, 1, 2])
    prepare.stage([0, 8, 22], [0, 1, 1], [0, 1, 2])
    assert slabs.values() == [8, 9] + [1] * 6
    prepare.append_blocks([], [])
    prepare.append_blocks([1, 0], [4, 5])
    prepare.stage([1, 9, 22], [1, 1, 1], [0, 1, 2])
    assert slabs.values() == [5, 4]
