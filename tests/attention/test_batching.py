"""Selection and attention of a token do not depend on chunks, neighbours or their order."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.attention.harness import Sizes, World
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
