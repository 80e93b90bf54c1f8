"""What holds for every step, without an oracle."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from fd_dsa.step import ForwardMeta, StepMetadataBuilder
from tests.step.helpers import ROW_FIELDS, builder_for
from tests.strategies import StepBatch, chunk_lengths, make_batch, step_batches

WITH_PREFILL = ("idle", "first_chunk", "later_chunk", "decode", "mtp_decode")


def _tokens_of(meta: ForwardMeta, row: int) -> slice:
    """Where the tokens of a row lie."""
    return slice(int(meta.cu_seqlens_q[row]), int(meta.cu_seqlens_q[row + 1]))


def _windows(meta: ForwardMeta) -> np.ndarray:
    """`[ks, ke)` of each token; (0, 0) everywhere in a decode-only step."""
    if meta.indexer_attn_mask_offsets is None:
        return np.zeros((len(meta.position_ids), 2), np.int32)
    return meta.indexer_attn_mask_offsets.reshape(-1, 2)


@settings(max_examples=200, deadline=None)
@given(batch=step_batches())
def test_slots_are_distinct_and_inside_own_blocks(batch: StepBatch) -> None:
    meta = builder_for(batch).build(*batch.inputs(), batch.num_padded_tokens)
    slots = meta.slot_mapping[: batch.num_tokens]
    assert len(set(slots.tolist())) == batch.num_tokens
    for row in range(batch.num_rows):
        end = int(batch.seq_lens_decoder[row] + batch.seq_lens_this_time[row])
        owned = batch.block_tables[row, : -(-end // batch.block_size)]
        assert set(slots[_tokens_of(meta, row)] // batch.block_size) <= set(owned.tolist())


@settings(max_examples=200, deadline=None)
@given(batch=step_batches())
def test_positions_of_a_row_are_consecutive_from_its_cached_length(batch: StepBatch) -> None:
    meta = builder_for(batch).build(*batch.inputs(), batch.num_padded_tokens)
    for row in range(batch.num_rows):
        tokens = _tokens_of(meta, row)
        positions = meta.position_ids[tokens]
        assert (meta.batch_id_per_token[tokens] == row).all()
        assert (np.diff(positions) == 1).all()
        assert (
            positions[:1].tolist()
            == batch.seq_lens_decoder[row : row + 1][: len(positions)].tolist()
        )


@settings(max_examples=200, deadline=None)
@given(batch=step_batches(kinds=WITH_PREFILL, min_rows=1))
def test_windows_start_together_and_grow_by_one(batch: StepBatch) -> None:
    meta = builder_for(batch).build(*batch.inputs(), batch.num_padded_tokens)
    windows = _windows(meta)
    for row in range(batch.num_rows):
        starts, ends = windows[_tokens_of(meta, row)].T
        if batch.seq_lens_encoder[row] == 0:
            assert not starts.any()
            assert not ends.any()
            continue
        # inside the row's own gathered keys, the last token sees all of them
        assert (starts == meta.cu_seqlens_kg[row]).all()
        assert (np.diff(ends) == 1).all()
        assert ends[-1] == meta.cu_seqlens_kg[row + 1]
        np.testing.assert_array_equal(ends - starts, meta.position_ids[_tokens_of(meta, row)] + 1)


@settings(max_examples=200, deadline=None)
@given(batch=step_batches())
def test_padding_can_touch_no_key(batch: StepBatch) -> None:
    meta = builder_for(batch).build(*batch.inputs(), batch.num_padded_tokens)
    padding = slice(batch.num_tokens, None)
    assert (meta.slot_mapping[padding] == -1).all()
    assert (meta.batch_id_per_token[padding] == -1).all()
    assert not meta.position_ids[padding].any()
    assert not _windows(meta)[padding].any()
    assert (meta.slot_mapping[: batch.num_tokens] >= 0).all()


@settings(max_examples=200, deadline=None)
@given(data=st.data(), batch=step_batches(min_rows=2))
def test_permuting_rows_permutes_the_metadata(data: st.DataObject, batch: StepBatch) -> None:
    order = data.draw(st.permutations(range(batch.num_rows)))
    meta = builder_for(batch).build(*batch.inputs())
    permuted = builder_for(batch).build(*batch.take_rows(order).inputs())
    for name in ROW_FIELDS:
        if name != "cu_seqlens_q":
            np.testing.assert_array_equal(getattr(permuted, name), getattr(meta, name)[order])
    lengths, permuted_lengths = (np.diff(_windows(m), axis=1) for m in (meta, permuted))
    for new_row, old_row in enumerate(order):
        new, old = _tokens_of(permuted, new_row), _tokens_of(meta, old_row)
        np.testing.assert_array_equal(permuted.position_ids[new], meta.position_ids[old])
        np.testing.assert_array_equal(permuted.slot_mapping[new], meta.slot_mapping[old])
        np.testing.assert_array_equal(permuted_lengths[new], lengths[old])
    assert permuted.max_seqlen_k == meta.max_seqlen_k
    assert permuted.num_prefill_tokens == meta.num_prefill_tokens


@settings(max_examples=200, deadline=None)
@given(data=st.data(), total=st.integers(1, 300), block_size=st.sampled_from([1, 16, 64]))
def test_chunks_of_a_prefill_concatenate_to_the_whole(
    data: st.DataObject, total: int, block_size: int
) -> None:
    chunks = data.draw(chunk_lengths(total))
    whole = make_batch([(total, 0, total)], block_size)
    builder = StepMetadataBuilder(
        1, total, whole.block_tables.shape[1], block_size, whole.num_blocks, "numpy"
    )
    meta = builder.build(*whole.inputs())
    wanted = [a.copy() for a in (meta.position_ids, meta.slot_mapping, _windows(meta))]

    found: list[list[np.ndarray]] = [[], [], []]
    cached = 0
    for chunk in chunks:
        lengths = (np.array([n], np.int32) for n in (chunk, cached, chunk))
        meta = builder.build(*lengths, whole.block_tables)
        assert meta.cu_seqlens_kg.tolist() == [0, cached + chunk]
        parts = (meta.position_ids, meta.slot_mapping, _windows(meta))
        for values, part in zip(found, parts, strict=True):
            values.append(part.copy())
        cached += chunk
    for values, array in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(np.concatenate(values), array)


@settings(max_examples=200, deadline=None)
@given(batch=step_batches(kinds=("decode", "mtp_decode"), min_rows=1))
def test_a_decode_row_sees_its_history_and_itself(batch: StepBatch) -> None:
    meta = builder_for(batch).build(*batch.inputs())
    last = meta.cu_seqlens_q[1:] - 1
    np.testing.assert_array_equal(meta.cache_seqlens, meta.position_ids[last] + 1)
    assert meta.max_seqlen_k == meta.cache_seqlens.max()
