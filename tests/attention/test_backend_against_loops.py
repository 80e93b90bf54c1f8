"""Any step through the backend equals a loop over its tokens that selects and attends."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.attention.harness import FP8, Sizes, World, rows_of, world_of
from tests.strategies import StepBatch, make_batch, step_batches

DTYPES = ("float32", "bfloat16")
# every kind of row: first chunks below, at and past the selection, later chunks, decode with and
# without drafts around the edge of the selection, idle rows with and without history
EVERY_KIND = [
    (5, 0, 5),
    (0, 0, 0),
    (0, 40, 1),
    (20, 0, 20),
    (9, 23, 9),
    (0, 6, 4),
    (0, 33, 0),
    (1, 30, 1),
    (0, 3, 1),
    (0, 31, 3),
    (8, 0, 8),
]


def check_batch(batch: StepBatch, sizes: Sizes, seed: int = 0) -> None:
    """One step of a batch against the oracle."""
    world, rows = world_of(batch, sizes, seed), rows_of(batch)
    padded = batch.num_padded_tokens
    padding = 0 if padded is None else padded - batch.num_tokens
    world.check(rows, world.run(rows, padding), padding)


@pytest.mark.parametrize("dtype", DTYPES)
@given(
    batch=step_batches(min_rows=1, max_rows=6, max_len=36),
    topk=st.sampled_from([1, 4, 8, 30, 80]),
    seed=st.integers(0, 2**32 - 1),
    poison_first_block=st.booleans(),
)
@settings(max_examples=100)
def test_any_step(
    dtype: str, batch: StepBatch, topk: int, seed: int, poison_first_block: bool
) -> None:
    """Beside blocks of NaN that no row owns; the first one may hold NaN or huge numbers."""
    sizes = Sizes(topk, batch.block_size, dtype, poison_first_block=poison_first_block)
    check_batch(batch, sizes, seed)


@given(
    batch=step_batches(min_rows=1, max_rows=4, max_len=30, block_size=64),
    topk=st.sampled_from([1, 8, 80]),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=25)
def test_any_step_on_fp8(batch: StepBatch, topk: int, seed: int) -> None:
    check_batch(batch, Sizes(topk, 64, FP8), seed)


@pytest.mark.parametrize(
    ("dtype", "block_size", "padding"),
    [*zip(DTYPES * 3, (1, 1, 16, 16, 64, 64), (0, 5, 5, 0, 0, 5), strict=True), (FP8, 64, 5)],
)
def test_every_kind_of_row_in_two_layers(dtype: str, block_size: int, padding: int) -> None:
    num_tokens = sum(new for _, _, new in EVERY_KIND)
    batch = make_batch(EVERY_KIND, block_size, num_padded_tokens=num_tokens + padding)
    check_batch(batch, Sizes(8, block_size, dtype, layers=2))


@pytest.mark.parametrize("rows", [[(0, 30, 1)], [(0, 30, 1), (0, 4, 4), (0, 12, 2)]])
def test_decode_only(rows: list[tuple[int, int, int]]) -> None:
    check_batch(make_batch(rows, 16, num_padded_tokens=9), Sizes(layers=2))


@pytest.mark.parametrize("padding", [0, 4])
def test_a_step_without_tokens(padding: int) -> None:
    batch = make_batch([(0, 0, 0), (0, 9, 0)], 16)
    world = World(Sizes(), batch.block_tables, [0, 9], batch.num_blocks, max_tokens=4)
    rows = rows_of(batch)
    world.check(rows, world.run(rows, padding), padding)


def test_steps_of_different_sizes_share_the_buffers() -> None:
    num_tokens = sum(new for _, _, new in EVERY_KIND)
    batch = make_batch(EVERY_KIND, 16, num_padded_tokens=num_tokens + 5)
    world, rows = world_of(batch, Sizes()), rows_of(batch)
    decode = [(0, max(cached + new - 1, 0), min(new, 1)) for _, cached, new in rows]
    idle = [(0, 0, 0)] * 3 + rows[3:4]
    for step, padding in (
        (rows, 0),
        (decode, 20),
        (rows[:4], 3),
        (decode, 0),
        (idle, 9),
        (rows, 5),
    ):
        world.check(step, world.run(step, padding), padding)


@pytest.mark.parametrize(("dtype", "block_size"), [("float32", 16), (FP8, 64)])
def test_rejected_drafts_are_not_seen(dtype: str, block_size: int) -> None:
    batch = make_batch([(0, 20, 4), (0, 33, 4)], block_size)
    world = world_of(batch, Sizes(block_size=block_size, dtype=dtype))
    world.check(rows_of(batch), world.run(rows_of(batch)))
    # the first draft was accepted in row 0, none in row 1; what the others wrote is stale
    for row, kept in ((0, 22), (1, 34)):
        world.remember(row, kept, kept + 2, poison=True)
    after = [(0, 22, 1), (0, 34, 2)]
    world.check(after, world.run(after))


def test_block_table_with_junk_past_the_row() -> None:
    batch = make_batch([(0, 17, 1), (20, 0, 20)], 16, spare_columns=3)
    world = world_of(batch, Sizes())
    used = -(-(batch.seq_lens_decoder + batch.seq_lens_this_time) // 16)
    for row, count in enumerate(used):
        world.tables[row, count:] = [2**31 - 1, -7, -1][: world.tables.shape[1] - count]
    world.check(rows_of(batch), world.run(rows_of(batch)))


def test_rows_may_share_prefix_blocks() -> None:
    """Two rows whose first block is one: both see its keys, each attends to its own tail."""
    batch = make_batch([(4, 16, 4), (6, 16, 6), (0, 30, 1)], 16)
    world = world_of(batch, Sizes())
    world.tables[1, 0] = world.tables[0, 0]
    for name in ("latent", "k_pe", "index_k"):
        shared = getattr(world.data[0][0], name)[:16]
        getattr(world.data[0][1], name)[:16] = shared
    world.check(rows_of(batch), world.run(rows_of(batch)))


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
