"""Any legal step equals the naive loop, whatever step the buffers held before."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings

from tests.step.helpers import assert_matches_oracle, builder_for
from tests.strategies import BLOCK_SIZES, StepBatch, make_batch, step_batches, step_sequences


@settings(max_examples=1500, deadline=None)
@given(batch=step_batches())
def test_any_step_equals_the_oracle(batch: StepBatch) -> None:
    assert_matches_oracle(builder_for(batch).build(*batch.inputs(), batch.num_padded_tokens), batch)


@settings(max_examples=500, deadline=None)
@given(batch=step_batches(kinds=("idle", "idle_with_cache", "decode", "mtp_decode")))
def test_any_decode_only_step_equals_the_oracle(batch: StepBatch) -> None:
    meta = builder_for(batch).build(*batch.inputs(), batch.num_padded_tokens)
    assert meta.indexer_attn_mask_offsets is None
    assert meta.cu_seqlens_kg is None
    assert_matches_oracle(meta, batch)


@settings(max_examples=300, deadline=None)
@given(batch=step_batches(min_rows=1, max_rows=40, max_len=700))
def test_a_step_that_fills_the_capacity_equals_the_oracle(batch: StepBatch) -> None:
    tokens = max(1, batch.num_tokens, batch.num_padded_tokens or 0)
    builder = builder_for(batch, max_num_seqs=batch.num_rows, max_num_tokens=tokens)
    assert_matches_oracle(builder.build(*batch.inputs(), batch.num_padded_tokens), batch)


@settings(max_examples=200, deadline=None)
@given(steps=step_sequences())
def test_a_step_does_not_see_the_steps_before_it(steps: list[StepBatch]) -> None:
    tokens = max(max(b.num_tokens, b.num_padded_tokens or 0) for b in steps)
    rows = max(batch.num_rows for batch in steps)
    builder = builder_for(
        steps[0], max_num_seqs=max(1, rows), max_num_tokens=max(1, tokens), num_blocks=None
    )
    for number, batch in enumerate(steps, start=1):
        meta = builder.build(*batch.inputs(), batch.num_padded_tokens)
        assert_matches_oracle(meta, batch)
        assert builder.num_builds == number


@settings(max_examples=40, deadline=None)
@given(steps=step_sequences())
def test_paddle_tensors_hold_the_same_values(steps: list[StepBatch]) -> None:
    import paddle

    builder = builder_for(
        steps[0], device="cpu", max_num_seqs=8, max_num_tokens=4096, num_blocks=None
    )
    for batch in steps:
        tensors = [paddle.to_tensor(array) for array in batch.inputs()]
        meta = builder.build(*tensors, batch.num_padded_tokens)
        assert isinstance(meta.slot_mapping, paddle.Tensor)
        assert_matches_oracle(meta, batch)


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("new", [1, 63, 64, 65, 128, 129])
@pytest.mark.parametrize("cached", [0, 1, 63, 64, 65, 127, 128])
def test_chunks_at_block_edges(block_size: int, new: int, cached: int) -> None:
    rows = [(new, cached, new), (0, cached, 1), (0, cached, 3), (0, 0, 0), (1, new, 1)]
    batch = make_batch(rows, block_size, num_padded_tokens=2 * new + 64)
    assert_matches_oracle(builder_for(batch).build(*batch.inputs(), 2 * new + 64), batch)


def test_one_long_row_among_many_short_ones() -> None:
    rows = [(0, n % 70, 1) for n in range(63)]
    rows.insert(31, (5000, 12345, 5000))
    batch = make_batch(rows, 64)
    assert_matches_oracle(builder_for(batch).build(*batch.inputs()), batch)


@pytest.mark.parametrize("rows", [[], [(0, 0, 0)], [(0, 0, 0), (0, 7, 0)]])
@pytest.mark.parametrize("num_padded_tokens", [None, 0, 4])
@pytest.mark.parametrize("device", ["numpy", "cpu"])
def test_a_step_without_tokens_is_legal(
    rows: list[tuple[int, int, int]], num_padded_tokens: int | None, device: str
) -> None:
    batch = make_batch(rows, 16, num_padded_tokens=num_padded_tokens)
    meta = builder_for(batch, device=device).build(*batch.inputs(), num_padded_tokens)
    assert_matches_oracle(meta, batch)


def test_strided_inputs_are_read_as_they_look() -> None:
    batch = make_batch([(3, 20, 3), (0, 40, 2)], 16)
    encoder, decoder, this_time, tables = batch.inputs()
    lengths = np.stack([encoder, decoder, this_time], axis=1)
    wide = np.repeat(tables, 2, axis=1)
    meta = builder_for(batch).build(lengths[:, 0], lengths[:, 1], lengths[:, 2], wide[:, ::2])
    assert_matches_oracle(meta, batch)
