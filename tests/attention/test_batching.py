"""What a token selects and attends to does not depend on chunks, neighbours or their order."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.attention.harness import Sizes, World
from tests.reference.topk import ref_slot
from tests.strategies import chunk_lengths, make_batch

LENGTH = 45
ROUNDING = 1e-5


def world(dtype: str, rows: int = 3, seed: int = 0) -> World:
    """Rows of `LENGTH` tokens with nothing in the caches."""
    batch = make_batch([(LENGTH, 0, LENGTH)] * rows, 16)
    sizes = Sizes(8, 16, dtype, layers=2)
    return World(sizes, batch.block_tables, [LENGTH] * rows, batch.num_blocks, 200, seed)


def run_chunks(
    target: World, chunks: list[list[int]], decode_from: int = LENGTH
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Every row in its own chunks, all rows in one batch; slots and outputs by row, layer 1."""
    done = [0] * len(chunks)
    slots: list[list[np.ndarray]] = [[] for _ in chunks]
    outputs: list[list[np.ndarray]] = [[] for _ in chunks]
    left = [list(c) for c in chunks]
    while any(left):
        new = [c.pop(0) if c else 0 for c in left]
        rows = [(n if d < decode_from else 0, d, n) for n, d in zip(new, done, strict=True)]
        step = target.run(rows)
        ends = np.cumsum(new)
        for row, n in enumerate(new):
            part = slice(ends[row] - n, ends[row])
            wide = np.full((n, 8), -1, np.int32)
            wide[:, : step.slots[1].shape[1]] = step.slots[1][part]
            slots[row].append(wide)
            outputs[row].append(step.outputs[1][part])
            done[row] += n
    return [np.concatenate(s) for s in slots], [np.concatenate(o) for o in outputs]


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def one_shot(request: pytest.FixtureRequest):
    """(dtype, slots, outputs) of three prompts, each in one chunk and alone in its step."""
    target = world(request.param)
    slots, outputs = [], []
    for row in range(3):
        alone = [[0]] * row + [[LENGTH]] + [[0]] * (2 - row)
        found = run_chunks(target, alone)
        slots.append(found[0][row])
        outputs.append(found[1][row])
    return request.param, slots, outputs


@given(
    chunks=st.lists(chunk_lengths(LENGTH), min_size=3, max_size=3),
    decode_from=st.sampled_from([LENGTH, 5, 30]),
)
@example(chunks=[[1] * LENGTH] * 3, decode_from=1)
@settings(max_examples=40)
def test_any_chunks_in_any_company(one_shot, chunks: list[list[int]], decode_from: int) -> None:
    dtype, slots, outputs = one_shot
    found = run_chunks(world(dtype), chunks, decode_from)
    for row in range(3):
        np.testing.assert_array_equal(found[0][row], slots[row])
        np.testing.assert_allclose(found[1][row], outputs[row], rtol=0, atol=ROUNDING)


def test_rows_in_another_order() -> None:
    rows = [(9, 11, 9), (0, 30, 2), (0, 0, 0), (12, 0, 12), (0, 5, 1)]
    batch = make_batch(rows, 16)
    lengths = [cached + new for _, cached, new in rows]
    first = World(Sizes(), batch.block_tables, lengths, batch.num_blocks, 64)
    order = [3, 1, 4, 0, 2]
    turned = World(
        Sizes(), batch.block_tables[order], [lengths[i] for i in order], batch.num_blocks, 64
    )
    turned.data = [[first.data[0][i] for i in order]]
    for target, wanted in ((first, range(5)), (turned, order)):
        for row, i in enumerate(wanted):
            target.remember(row, 0, rows[i][1])
    one, two = first.run(rows), turned.run([rows[i] for i in order])
    starts = np.cumsum([0] + [new for _, _, new in rows])
    tokens = [t for i in order for t in range(starts[i], starts[i + 1])]
    np.testing.assert_array_equal(two.slots[0], one.slots[0][tokens])
    np.testing.assert_allclose(two.outputs[0], one.outputs[0][tokens], rtol=0, atol=ROUNDING)


def test_physical_blocks_do_not_matter() -> None:
    """The same rows over other blocks: the same positions and, bit by bit, the same outputs."""
    rows = [(9, 31, 9), (0, 40, 1)]
    found = []
    for seed in (1, 2):
        batch = make_batch(rows, 16, seed=seed)
        target = World(Sizes(), batch.block_tables, [40, 41], batch.num_blocks, 64)
        for row in (0, 1):
            target.remember(row, 0, rows[row][1])
        step = target.run(rows)
        place = [
            {ref_slot(p, table, 16): p for p in range(41) if table[p // 16] >= 0}
            for table in batch.block_tables
        ]
        positions = [
            [place[t >= 9][s] for s in line] for t, line in enumerate(step.slots[0].tolist())
        ]
        found.append((positions, step.outputs[0], batch.block_tables.tolist()))
    assert found[0][2] != found[1][2]
    assert found[0][0] == found[1][0]
    np.testing.assert_array_equal(found[0][1], found[1][1])
