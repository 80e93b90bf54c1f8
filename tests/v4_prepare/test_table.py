"""Blocks and lengths between the host and the device: what is sent is what every step needs.

The steps here travel through slabs, as on a device, and are built in NumPy at the end.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fd_dsa.v4_prepare import V4Prepare, V4PrepareConfig, V4PrepareError, v4_prepare_np
from tests.reference.v4_prepare import naive
from tests.strategies import examples
from tests.v4_prepare.cases import POISON_WORD, Place, assert_same, outputs_of
from tests.v4_prepare.golden import ERRORS, error_config, inputs_of

pytestmark = pytest.mark.triton

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
EXAMPLES = examples(25, in_soak=80)


@pytest.fixture
def by_slabs(monkeypatch: pytest.MonkeyPatch) -> Callable[..., V4Prepare]:
    """Makes builders whose launch is a NumPy reader of slabs, over a table that only slabs fill."""
    from fd_dsa.v4_prepare import launch

    class SlabSteps(launch.DeviceSteps):
        """Attributes: `cells`, the table's cells that came with the last step."""

        def launch(self, slab: int, rollback: Any = None) -> None:
            cfg, words = self.cfg, np.array(self.staging.slabs[slab].numpy())
            _, num_rows, num_tokens, num_cells = words[:4]
            sections = words[launch.HEADER_WORDS : self.first_value].reshape(5, -1)
            ctx, q, slot, columns, starts = sections[:, : cfg.max_num_seqs + 1]
            self.cells = words[self.first_value :][:num_cells].tolist()
            assert q[:num_rows].sum() == num_tokens and not ctx[num_rows:].any()
            assert starts[0] == 0 and not q[num_rows:].any()
            assert (starts[num_rows:] == num_cells).all()
            table = self.buffers.block_table.numpy()
            for row, (begin, end) in enumerate(pairwise(starts)):
                table[row, columns[row] : columns[row] + end - begin] = self.cells[begin:end]
            self.buffers.block_table.copy_(paddle_of(table), False)
            lengths = ctx[:num_rows], q[:num_rows], slot[:num_rows]
            self.built = v4_prepare_np(cfg, *lengths, table[:num_rows])

    import paddle

    paddle_of = paddle.to_tensor
    monkeypatch.setattr(launch, "DeviceSteps", SlabSteps)
    place = Place("interpreter")
    return lambda cfg=CFG: place.prepare(cfg)


def assert_step(prepare: V4Prepare, *step: Any) -> None:
    """Expand the earliest staged step and compare it with the oracle's."""
    prepare.expand()
    assert_same(outputs_of(prepare.steps.built), naive(prepare.cfg, *step))


# a strategy is made once, since Hypothesis checks each
NEW = st.sampled_from([0, 1, 1, 2, 4])
SHARES = st.sampled_from([0, 0.1, 1])
TABLE_DTYPES = st.sampled_from(["int32", "int64"])


@st.composite
def histories(draw: st.DrawFn) -> list[tuple[Any, ...]]:
    """Steps with whole tables, in which some cells are those of the step before."""
    steps, table = [], np.full((3, 6), -1, np.int64)
    for _ in range(draw(st.integers(1, 8))):
        num_rows = draw(st.integers(0, 3))
        q = np.array([draw(NEW) for _ in range(num_rows)], np.int32)
        # any row may grow, shrink, change hands or idle
        ctx = np.array([draw(st.integers(n, CFG.max_model_len)) for n in q.tolist()], np.int32)
        rng = np.random.default_rng(draw(st.integers(0, 99)))
        changed = rng.random(table.shape) < draw(SHARES)
        needed = np.zeros(3, np.int64)
        needed[:num_rows] = -(-ctx // 4) * (q > 0)
        is_needed = np.arange(6) < needed[:, None]
        is_bad = is_needed & ((table < 0) | (table >= 30))
        table = np.where(changed | is_bad, rng.integers(0, 30, (3, 6)), table)
        # what no token needs may be no block at all
        garbage = ~is_needed & (rng.random(table.shape) < 0.3)
        table[garbage] = rng.choice([-1, 77, -(2**31)], garbage.sum())
        dtype = draw(TABLE_DTYPES)
        slot = rng.permutation(4)[:num_rows]
        steps.append((ctx, q, slot.astype(np.int32), table[:num_rows].astype(dtype)))
    return steps


@EXAMPLES
@given(history=histories(), ahead=st.integers(1, 3))
def test_whole_tables(
    by_slabs: Callable[..., V4Prepare], history: list[tuple[Any, ...]], ahead: int
) -> None:
    prepare = by_slabs()
    for number, step in enumerate(history):
        prepare.stage(*step)
        if number + 1 >= ahead:
            assert_step(prepare, *history[number + 1 - ahead])


@EXAMPLES
@given(history=histories(), data=st.data())
def test_rows_that_are_set(
    by_slabs: Callable[..., V4Prepare], history: list[tuple[Any, ...]], data: st.DataObject
) -> None:
    """A scheduler sets what changed, in one or several calls, in rows of this step or not."""
    prepare = by_slabs()
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
]


@pytest.mark.parametrize(("arguments", "text"), REFUSED)
def test_blocks_that_cannot_be_set(
    by_slabs: Callable[..., V4Prepare], arguments: Any, text: str
) -> None:
    prepare = by_slabs()
    prepare.set_blocks(1, [8, 9])
    prepare.set_blocks(2, [1] * 6)
    with pytest.raises(ValueError, match=r"got|E_") as caught:
        prepare.set_blocks(*arguments)
    assert text in str(caught.value)
    # all rows are as they were
    with pytest.raises(V4PrepareError, match=r"row 1: block_table\[2\]=-1"):
        prepare.stage([0, 9, 22], [0, 1, 1], [0, 1, 2])
    prepare.stage([0, 8, 22], [0, 1, 1], [0, 1, 2])
    prepare.expand()
    assert prepare.steps.cells == [8, 9] + [1] * 6


def test_a_row_has_the_blocks_that_were_set_last(by_slabs: Callable[..., V4Prepare]) -> None:
    prepare = by_slabs()
    prepare.set_blocks(0, [1, 2])
    prepare.set_blocks(1, [3])
    step = [8, 5], [1, 1], [0, 1]
    with pytest.raises(V4PrepareError) as caught:
        prepare.stage(*step)
    assert str(caught.value) == "v4_prepare: E_BLOCK: row 1: block_table[1]=-1 not in [0, 30)"
    prepare.set_blocks(1, [4], 1)
    prepare.stage(*step)
    # a new request of the row has the blocks that were set for it, not those after them
    prepare.set_blocks(1, [6])
    with pytest.raises(V4PrepareError, match=r"row 1: block_table\[1\]=-1"):
        prepare.stage(*step)
    # cells that no token needed may be garbage, and are not the row's, beside longer rows too
    prepare = by_slabs()
    for ctx in ([8, 12], [4, 12]):
        prepare.stage(ctx, [1, 1], [0, 1], [[1, 2, 9], [3, 4, 5]])
    with pytest.raises(V4PrepareError, match=r"row 0: block_table\[1\]=-1"):
        prepare.stage([8, 12], [1, 1], [0, 1])
    for cell in (-1, 30, 2**31 - 1, 2):
        prepare = by_slabs()
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


def test_only_changed_cells_travel(by_slabs: Callable[..., V4Prepare]) -> None:
    prepare, sent = by_slabs(), []
    # cells that were set and never sent; and one that the row no longer has
    prepare.set_blocks(0, [1, 5])
    prepare.set_blocks(0, [1])
    table = np.array([[1, 2, 3], [4, 5, 6], [7, 8, 9]])
    contexts = [[8, 8, 8], [8, 8, 8], [9, 8, 8], [9, 12, 8]]
    for number, ctx in enumerate([*contexts, contexts[-1]]):
        table[2, 0] = 11 if number == 4 else 7
        # an idle row keeps its cells
        prepare.stage(ctx, [1, 1, number != 1], [0, 1, 2], table)
        prepare.expand()
        sent.append(prepare.steps.cells)
    # one run a row, from the first changed cell on
    assert sent == [[1, 2, 4, 5, 7, 8], [], [3], [6], [11, 8]]
    np.testing.assert_array_equal(
        prepare.buffers.block_table.numpy(),
        [[1, 2, 3] + [POISON_WORD] * 3, [4, 5, 6] + [POISON_WORD] * 3, [11, 8] + [POISON_WORD] * 4],
    )
    # rows that a step lacks keep their news for a later one
    prepare.set_blocks(2, [21], 2)
    for ctx, cells in (([10], []), ([10, 12], []), ([10, 12, 9], [21])):
        prepare.stage(ctx, [1] * len(ctx), [0, 1, 2][: len(ctx)])
        prepare.expand()
        assert prepare.steps.cells == cells


@pytest.mark.parametrize("name", sorted(set(ERRORS) - {"X5", "X6"}))
def test_steps_without_a_table_are_refused_with_the_same_words(
    by_slabs: Callable[..., V4Prepare], name: str
) -> None:
    prepare, case = by_slabs(error_config()), ERRORS[name]
    for row in range(3):
        prepare.set_blocks(row, [1, 2, 3])
    with pytest.raises(V4PrepareError) as caught:
        prepare.stage(*(np.array(values, np.int32) for values in inputs_of(case)[:3]))
    assert str(caught.value) == case["text"]
    with pytest.raises(V4PrepareError, match="E_SHAPE"):
        prepare.stage(*np.ones((3, 2, 2), np.int32))


EXTREMES = [-(2**31), -(2**31) + 1, -(2**31) + 4, -4, -1, 2**31 - 5, 2**31 - 4, 2**31 - 1]


def verdict(call: Callable[..., Any], *arguments: Any) -> str:
    """The text of the error that a call raises, or ""."""
    try:
        call(*arguments)
    except V4PrepareError as error:
        return str(error)
    return ""


@EXAMPLES
@given(seed=st.integers(0, 1 << 30), dtype=st.sampled_from(["int32", "int32", "int64", "uint32"]))
def test_steps_that_repeat_are_checked_as_others_are(
    by_slabs: Callable[..., V4Prepare], seed: int, dtype: str
) -> None:
    """Arrays that differ from the last ones in `ctx` alone get the verdict that lists get."""
    rng, (short, full) = np.random.default_rng(seed), (by_slabs(), by_slabs())
    for number in range(20):
        if number % 7 == 0:
            num_rows = 3 if number < 7 else int(rng.integers(0, 4))
            q, slot = rng.choice([0, 1, 1, 2, 4], num_rows), rng.permutation(4)[:num_rows]
        if rng.random() < 0.2:
            # alone, and any numbers
            slot = rng.integers(-1, 5, num_rows)
        if number < 3 or rng.random() < 0.3:
            row, blocks = int(rng.integers(3)), rng.integers(0, 30, rng.integers(0, 6)).tolist()
            for prepare in (short, full):
                prepare.set_blocks(row, blocks)
        ctx = q + rng.integers(0, rng.choice([2, 12, 24]), num_rows)
        if num_rows and rng.random() < 0.4:
            row = rng.integers(num_rows)
            ctx[row] = rng.choice([q[row] - 1, 22, 23, *EXTREMES])
        arrays = [array.astype(dtype) for array in (ctx, q, slot)]
        fault = verdict(short.stage, *arrays)
        assert fault == verdict(full.stage, *(array.tolist() for array in arrays))
        if not fault:
            lengths = arrays[0].tolist(), arrays[1].tolist(), slot.tolist()
            table = short.table.table_of(num_rows)
            for prepare in (short, full):
                assert_step(prepare, *lengths, table)


def test_rows_at_the_end_of_int32(by_slabs: Callable[..., V4Prepare]) -> None:
    """A row of several blocks of 2^29 tokens: what its blocks hold passes int32."""
    sizes = {"block_size": 1 << 29, "hca_ratio": 1 << 29, "csa_ratio": 1 << 28, "index_topk": 1}
    longest, sizes = 2**31 - 1, {**vars(CFG), **sizes, "max_num_tokens": 3}
    prepare = by_slabs(V4PrepareConfig(**sizes | {"max_model_len": longest, "hca_mode": None}))
    q, slot = np.ones(1, np.int32), np.zeros(1, np.int32)
    prepare.set_blocks(0, [3] * 3)
    # the first step is checked in full, the others as its repeats
    for ctx in (3 << 29, (3 << 29) - 1):
        prepare.stage(np.array([ctx], np.int32), q, slot)
    with pytest.raises(V4PrepareError, match=r"block_table\[3\]=-1"):
        prepare.stage(np.array([(3 << 29) + 1], np.int32), q, slot)
    prepare.set_blocks(0, [3] * 6)
    prepare.stage(np.array([longest], np.int32), q, slot)
