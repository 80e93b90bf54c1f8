"""Blocks and lengths between the host and the device: what is sent is what every step needs.

The builders here get their steps out of slabs, as a device does, and build them in NumPy.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fd_dsa.v4_prepare import V4Prepare, V4PrepareConfig, V4PrepareError
from fd_dsa.v4_prepare.checks import StepChecks, rows_have_room
from fd_dsa.v4_prepare.table import TableMirror
from tests.reference.v4_prepare import naive
from tests.v4_prepare.golden import ERRORS, error_config, inputs_of
from tests.v4_prepare.kernel_case import assert_same, outputs_of
from tests.v4_prepare.slab_steps import by_slabs

SIZES: dict[str, Any] = dict(
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
CFG = V4PrepareConfig(**SIZES)
INT32 = 2**31
EXTREMES = [-INT32, -INT32 + 1, -INT32 + 4, -4, -1, INT32 - 5, INT32 - 4, INT32 - 1]


def assert_step(prepare: V4Prepare, *step: Any) -> None:
    """Expand the earliest staged step and compare it with the oracle's."""
    assert_same(outputs_of(prepare.expand()), naive(prepare.cfg, *step))


@st.composite
def histories(draw: st.DrawFn) -> list[tuple[Any, ...]]:
    """Steps with whole tables, in which some cells are those of the step before."""
    steps, table = [], np.full((3, 6), -1, np.int64)
    for _ in range(draw(st.integers(1, 8))):
        num_rows = draw(st.integers(0, 3))
        q = np.array([draw(st.sampled_from([0, 1, 1, 2, 4])) for _ in range(num_rows)], np.int32)
        # any row may grow, shrink, change hands or idle
        ctx = np.array([draw(st.integers(n, CFG.max_model_len)) for n in q.tolist()], np.int32)
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
        steps.append((ctx, q, slot.astype(np.int32), table[:num_rows].astype(dtype)))
    return steps


@settings(max_examples=80)
@given(history=histories(), ahead=st.integers(1, 3))
def test_whole_tables(history: list[tuple[Any, ...]], ahead: int) -> None:
    prepare = by_slabs(CFG)
    for number, step in enumerate(history):
        prepare.stage(*step)
        if number + 1 >= ahead:
            assert_step(prepare, *history[number + 1 - ahead])


@settings(max_examples=80)
@given(history=histories(), data=st.data())
def test_rows_that_are_set(history: list[tuple[Any, ...]], data: st.DataObject) -> None:
    """A scheduler that says what changed, in one or several calls, in rows of this step or not."""
    prepare = by_slabs(CFG)
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
        assert_step(prepare, *step)


REFUSED = [
    ((1, [3, 30]), "E_BLOCK: row 1: block_table[1]=30 not in [0, 30)"),
    ((1, [-1], 2), "E_BLOCK: row 1: block_table[2]=-1 not in [0, 30)"),
    ((1, np.array([2**40])), "E_BLOCK: row 1: block_table[0]=1099511627776 not in"),
    ((2, [5] * 7), "E_TABLE: row 2: needs 7 blocks, table has 6 columns"),
    ((1, [5] * 5, 2), "E_TABLE: row 1: needs 7 blocks, table has 6 columns"),
    ((0, [1.5]), "E_DTYPE: row 0: block_ids of shape [1] and dtype float64, must be [n] integers"),
    ((0, [[1]]), "E_DTYPE: row 0: block_ids of shape [1, 1] and dtype int"),
    ((0, 5), "E_DTYPE: row 0: block_ids of shape [] and dtype int"),
    ((3, [1]), "row: got 3, allowed is 0..2 = max_num_seqs - 1; name a row"),
    ((-1, [1]), "row: got -1, allowed is 0..2"),
    ((1, [1], 3), "start: got 3, row 1 has 2 blocks, allowed is 0..2"),
    ((1, [1], -1), "start: got -1, row 1 has 2 blocks"),
    (([0, 3], [1, 2]), "row: got 3, allowed is 0..2 = max_num_seqs - 1; name a row"),
    (([-1], [1]), "row: got -1, allowed is 0..2"),
    (([0, 1, 0], [1, 2, 3]), "rows: got row 0 twice"),
    (([0, 1], [1, 30]), "E_BLOCK: row 1: block_table[2]=30 not in [0, 30)"),
    (([1, 0], [-1, 30]), "E_BLOCK: row 1: block_table[2]=-1 not in [0, 30)"),
    (([0, 1], np.array([3, 2**63], np.uint64)), "row 1: block_table[2]=9223372036854775808"),
    (([0, 2], [1, 2]), "E_TABLE: row 2: needs 7 blocks, table has 6 columns"),
    (([0, 1], [1]), "E_SHAPE: batch: got 2 rows and 1 block_ids"),
    (([0], [1.0]), "E_DTYPE: batch: block_ids of shape [1] and dtype float64, must be [n] int"),
    (([True], [1]), "E_DTYPE: batch: rows of shape [1] and dtype bool"),
    (([[0]], [[1]]), "E_DTYPE: batch: rows of shape [1, 1] and dtype int"),
]


@pytest.mark.parametrize(("arguments", "text"), REFUSED)
def test_blocks_that_cannot_be_set_or_appended(arguments: Any, text: str) -> None:
    prepare = by_slabs(CFG)
    prepare.set_blocks(1, [8, 9])
    prepare.set_blocks(2, [1] * 6)
    call = prepare.set_blocks if isinstance(arguments[0], int) else prepare.append_blocks
    with pytest.raises(ValueError, match=r"got|E_") as caught:
        call(*arguments)
    assert text in str(caught.value)
    # all rows are as they were
    with pytest.raises(V4PrepareError, match=r"row 1: block_table\[2\]=-1"):
        prepare.stage([0, 9, 22], [0, 1, 1], [0, 1, 2])
    prepare.stage([0, 8, 22], [0, 1, 1], [0, 1, 2])
    assert prepare._steps.values() == [8, 9] + [1] * 6
    prepare.append_blocks([], [])
    prepare.append_blocks([1, 0], [4, 5])
    prepare.stage([1, 9, 22], [1, 1, 1], [0, 1, 2])
    assert prepare._steps.values() == [5, 4]


def test_a_row_has_the_blocks_that_were_said_last() -> None:
    prepare = by_slabs(CFG)
    prepare.set_blocks(0, [1, 2])
    prepare.set_blocks(1, [3])
    step = np.array([8, 5], np.int32), np.array([1, 1], np.int32), np.array([0, 1], np.int32)
    with pytest.raises(V4PrepareError) as caught:
        prepare.stage(*step)
    assert str(caught.value) == "v4_prepare: E_BLOCK: row 1: block_table[1]=-1 not in [0, 30)"
    prepare.set_blocks(1, [4], 1)
    prepare.stage(*step)
    # a new request of the row has the blocks that were set for it, not those after them
    prepare.set_blocks(1, [6])
    with pytest.raises(V4PrepareError, match=r"row 1: block_table\[1\]=-1"):
        prepare.stage(*step)
    # cells that no token needed may have been garbage, and are not the row's
    for cell in (-1, 30, 2**31 - 1, 2):
        prepare = by_slabs(CFG)
        prepare.stage([8], [1], [0], [[1, 2]])
        prepare.stage([4], [1], [0], [[1, cell]])
        with pytest.raises(V4PrepareError, match=r"row 0: block_table\[1\]=-1"):
            prepare.stage([5], [1], [0])
        if cell != 2:
            with pytest.raises(V4PrepareError, match=rf"row 0: block_table\[1\]={cell} "):
                prepare.stage([5], [1], [0], [[1, cell]])
        prepare.set_blocks(0, [9], 1)
        prepare.stage([5], [1], [0])
        for ctx, table in (([8], [[1, 2]]), ([4], [[1, 2]]), ([5], [[1, 9]])):
            assert_step(prepare, ctx, [1], [0], table)


def test_cells_that_were_set_and_never_sent() -> None:
    prepare = by_slabs(CFG)
    # the mirror has what the table says; the device has nothing of it
    prepare.set_blocks(0, [5, 6])
    prepare.set_blocks(0, [5])
    prepare.stage([8], [1], [0], [[5, 6]])
    assert_step(prepare, [8], [1], [0], [[5, 6]])


def test_only_changed_cells_travel() -> None:
    prepare, sent = by_slabs(CFG), []
    table = np.array([[1, 2, 3], [4, 5, 6], [7, 8, 9]])
    for number, ctx in enumerate([[8, 8, 8], [8, 8, 8], [9, 8, 8], [9, 12, 8]]):
        # an idle row keeps its cells
        prepare.stage(ctx, [1, 1, number != 1], [0, 1, 2], table)
        prepare.expand()
        sent.append(prepare._steps.values())
    table[2, 0] = 11
    prepare.stage([9, 12, 8], [1, 1, 1], [0, 1, 2], table)
    # one run a row, from the first changed cell on
    assert [*sent, prepare._steps.values()] == [[1, 2, 4, 5, 7, 8], [], [3], [6], [11, 8]]
    # rows that a step lacks keep their news for a later one
    prepare.expand()
    prepare.append_blocks([0, 2], [20, 21])
    for ctx, cells in (([10], [20]), ([10, 12], []), ([10, 12, 9], [21])):
        prepare.stage(ctx, [1] * len(ctx), [0, 1, 2][: len(ctx)])
        assert prepare._steps.values() == cells
        prepare.expand()


@settings(max_examples=60)
@given(seed=st.integers(0, 1 << 30))
def test_appended_blocks_are_those_set_one_by_one(seed: int) -> None:
    """One call for several rows says what one call of `set_blocks` for each of them says."""
    rng, (ours, other), lengths = (
        np.random.default_rng(seed),
        (by_slabs(CFG), by_slabs(CFG)),
        [0, 0, 0],
    )
    for _ in range(12):
        rows = rng.permutation([row for row in range(3) if lengths[row] < 6])
        rows = rows[: rng.integers(0, len(rows) + 1)].astype(rng.choice(["i4", "u1", "i8"]))
        ids = rng.integers(0, 30, len(rows))
        given_rows, given_ids = rows.copy(), ids.astype("u1")
        ours.append_blocks(given_rows, given_ids)
        # the arrays are the caller's again
        given_rows.fill(99)
        given_ids.fill(99)
        for row, block in zip(rows.tolist(), ids.tolist(), strict=True):
            other.set_blocks(row, [block], lengths[row])
            lengths[row] += 1
        if rng.random() < 0.3:
            row = int(rng.integers(3))
            lengths[row] = int(rng.integers(0, lengths[row] + 1))
            for prepare in (ours, other):
                prepare.set_blocks(row, [], lengths[row])
        count = int(rng.integers(0, 4))
        q = np.array([n > 0 for n in lengths[:count]], np.int32)
        ctx = q * rng.integers(1, 5, count).astype(np.int32)
        for prepare in (ours, other):
            prepare.stage(ctx, q, np.arange(count, dtype=np.int32))
            prepare.expand()
        assert ours._steps.values() == other._steps.values()
        np.testing.assert_array_equal(ours.buffers.block_table, other.buffers.block_table)


# steps that differ from the last one in `ctx` alone: the short check says what the full one does


def some_rows(rng: np.random.Generator, num_rows: int) -> tuple[np.ndarray, np.ndarray]:
    """q and slot, mostly good ones."""
    q, slot = rng.choice([0, 1, 1, 2, 4], num_rows), rng.permutation(4)[:num_rows]
    if num_rows and rng.random() < 0.3:
        q[rng.integers(num_rows)] = rng.choice([-1, 7, INT32 - 1])
    if num_rows and rng.random() < 0.3:
        slot[rng.integers(num_rows)] = rng.choice([-1, 4, slot[0], INT32 - 1])
    return q.astype(np.int32), slot.astype(np.int32)


def contexts(rng: np.random.Generator, q: np.ndarray) -> np.ndarray:
    """Contexts around the bounds of rows, and some from the ends of int32."""
    ctx = np.maximum(q, 0) + rng.integers(0, rng.choice([2, 12, 24]), len(q))
    if len(q) and rng.random() < 0.4:
        row = rng.integers(len(q))
        ctx[row] = rng.choice([q[row] - 1, 22, 23, *EXTREMES])
    return ctx.astype(np.int32)


def verdict(call: Any, *arguments: Any) -> str:
    """The text of the error that a call raises, or ""."""
    try:
        call(*arguments)
    except (V4PrepareError, ValueError) as error:
        return str(error)
    return ""


@settings(max_examples=150)
@given(seed=st.integers(0, 1 << 30), dtype=st.sampled_from(["int32"] * 3 + ["int64", "uint32"]))
def test_arrays_are_checked_as_lists_are(seed: int, dtype: str) -> None:
    """A builder that gets arrays agrees on everything with one that gets lists."""
    rng, ours, full = np.random.default_rng(seed), by_slabs(CFG), by_slabs(CFG)
    known = [some_rows(rng, n) for n in (3, 3, rng.integers(0, 3))]
    q, slot = known[0]
    for number in range(20):
        kind = rng.choice(["again", "rows", "set", "table"], p=[0.5, 0.1, 0.3, 0.1])
        if kind == "set" or number < 3:
            row, start = int(rng.integers(3)), int(rng.integers(0, 3)) if number > 2 else 0
            ids = rng.integers(-1 if rng.random() < 0.2 else 0, 30, rng.integers(0, 4)).tolist()
            said = [verdict(each.set_blocks, row, ids, start) for each in (ours, full)]
            assert said[0] == said[1]
            continue
        if kind == "rows":
            q, slot = known[rng.integers(3)]
        arrays = [contexts(rng, q), q, slot]
        if kind == "table":
            arrays.append(rng.integers(0, 31, (len(q), 6)))
        elif dtype != "int32" and rng.random() < 0.5:
            arrays = [array.astype(dtype) for array in arrays]
        fault = verdict(ours.stage, *arrays)
        assert fault == verdict(full.stage, *(array.tolist() for array in arrays))
        if not fault:
            assert_same(outputs_of(ours.expand()), outputs_of(full.expand()))


@pytest.mark.parametrize("name", sorted(set(ERRORS) - {"X5", "X6"}))
def test_arrays_without_a_table_are_refused_with_the_same_words(name: str) -> None:
    prepare, case = by_slabs(error_config()), ERRORS[name]
    for row in range(3):
        prepare.set_blocks(row, [1, 2, 3])
    with pytest.raises(V4PrepareError) as caught:
        prepare.stage(*(np.array(values, np.int32) for values in inputs_of(case)[:3]))
    assert str(caught.value) == case["text"]
    with pytest.raises(V4PrepareError, match="E_SHAPE"):
        prepare.stage(*np.ones((3, 2, 2), np.int32))


@settings(max_examples=150)
@given(seed=st.integers(0, 1 << 30), is_long=st.booleans())
def test_the_short_check_knows_every_good_step(seed: int, is_long: bool) -> None:
    long = dict(block_size=1 << 29, hca_ratio=1 << 29, csa_ratio=1 << 28, max_model_len=INT32 - 1)
    cfg = V4PrepareConfig(**SIZES | dict(max_num_tokens=3, index_topk=1) | long) if is_long else CFG
    rng, table = np.random.default_rng(seed), TableMirror(cfg)
    checks, (q, slot) = StepChecks(cfg), some_rows(rng, 3)
    q = np.clip(q, 0, 1)
    checks.remember(q, slot)
    for _ in range(12):
        if rng.random() < 0.4:
            table.set_blocks(int(rng.integers(3)), [0] * int(rng.integers(0, 5)))
        ctx, room = contexts(rng, q), table.room(3)
        if rng.random() < 0.5:
            ctx[0] = min(int(room[0]) + int(rng.integers(-2, 3)), INT32 - 1)
        is_good = bool((ctx >= q).all() and (ctx <= cfg.max_model_len).all())
        assert checks.is_repeat(ctx, q, slot, table) == (is_good and rows_have_room(ctx, q, room))


def test_a_step_like_the_last_one_is_not_checked_in_full(monkeypatch: pytest.MonkeyPatch) -> None:
    prepare = V4Prepare(CFG, "numpy")
    prepare.set_blocks(0, [3, 4])
    step = [np.array([value], np.int32) for value in (4, 1, 2)]
    prepare.stage(*step)
    monkeypatch.delattr(StepChecks, "num_tokens")
    step[0][0] = 8
    prepare.stage(*step)
    with pytest.raises(AttributeError):
        prepare.stage(step[0], step[1], step[2] + 1)


def test_what_is_no_array_like_the_last_ones_goes_the_long_way() -> None:
    checks, table = StepChecks(CFG), TableMirror(CFG)
    ctx, q, slot = np.ones(3, np.int32), np.zeros(3, np.int32), np.arange(3, dtype=np.int32)
    assert not checks.is_repeat(ctx, q, slot, table)
    checks.remember(q.astype(np.int64), slot.astype(np.int64))
    assert checks.is_repeat(ctx, q, slot, table)
    assert checks.is_repeat(ctx[::-1], q[::-1], slot, table)
    for others in (
        (ctx.tolist(), q, slot),
        (ctx.view(np.uint32), q, slot),
        (ctx[:, None], q[:, None], slot[:, None]),
        (ctx, q, slot[::-1]),
        (ctx[:1], q, slot),
        (ctx[:2], q[:2], slot[:2]),
        (ctx, np.int32(0), slot),
        (None, q, slot),
    ):
        assert not checks.is_repeat(*others, table)
