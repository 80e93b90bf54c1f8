"""NaN in a first block that no row owns, or in another row, reaches no result."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.attention.harness import Sizes, rows_of, world_of
from tests.strategies import StepBatch, make_batch, step_batches


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@given(
    batch=step_batches(min_rows=1, max_rows=6, max_len=36),
    topk=st.sampled_from([1, 8, 80]),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=60)
def test_any_step_beside_unused_nan(dtype: str, batch: StepBatch, topk: int, seed: int) -> None:
    sizes = Sizes(topk, batch.block_size, dtype, poison_first_block=True)
    world, rows = world_of(batch, sizes, seed), rows_of(batch)
    world.check(rows, world.run(rows))


@pytest.mark.parametrize(
    "rows",
    [
        [(12, 0, 12), (9, 3, 9), (6, 0, 6)],
        [(0, 20, 1), (0, 12, 1), (0, 3, 1)],
        [(0, 20, 1), (9, 3, 9), (0, 3, 1)],
    ],
    ids=["prefill", "decode", "mixed"],
)
@pytest.mark.parametrize("spoiled", [0, 1, 2])
def test_a_row_of_nan_spoils_no_other_row(rows: list[tuple[int, int, int]], spoiled: int) -> None:
    batch = make_batch(rows, 16)
    world = world_of(batch, Sizes())
    clean = world.run(rows)
    data = world.data[0][spoiled]
    for name in ("q", "latent", "k_pe", "index_q", "index_k"):
        getattr(data, name)[-1] = np.nan
    found = world.run(rows)
    row_of_token = np.repeat(np.arange(len(rows)), [new for _, _, new in rows])
    others = row_of_token != spoiled
    np.testing.assert_array_equal(found.slots[0][others], clean.slots[0][others])
    np.testing.assert_allclose(
        found.outputs[0][others], clean.outputs[0][others], rtol=0, atol=1e-5
    )
    assert np.isnan(found.outputs[0][np.flatnonzero(~others)[-1]]).any()


def test_a_token_of_nan_spoils_no_token_before_it() -> None:
    batch = make_batch([(12, 3, 12)], 16)
    world = world_of(batch, Sizes())
    clean = world.run(rows_of(batch))
    for name in ("q", "latent", "k_pe", "index_q", "index_k"):
        getattr(world.data[0][0], name)[-1] = np.nan
    found = world.run(rows_of(batch))
    np.testing.assert_allclose(found.outputs[0][:-1], clean.outputs[0][:-1], rtol=0, atol=1e-5)
