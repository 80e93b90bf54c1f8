"""Any legal step equals the naive loop, in every memory, whatever step the buffers held before."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernel_memory import KernelMemory, open_memory
from tests.reference.step_metadata import ref_step_metadata
from tests.step.helpers import (
    ARRAY_FIELDS,
    COUNT_FIELDS,
    Place,
    assert_matches_oracle,
    builder_for,
    counts_of,
    device_builder,
)
from tests.strategies import (
    BLOCK_SIZES,
    StepBatch,
    examples,
    make_batch,
    step_batches,
    step_sequences,
)

DECODE = ("idle", "idle_with_cache", "decode", "mtp_decode")


def examples_at(place: Place, many: int, in_soak: int) -> settings:
    """Random steps: `many` with NumPy; fewer where a step takes longer."""
    return examples(many, in_soak) if place.name == "numpy" else examples(many // 2, 30)


@pytest.mark.parametrize(
    ("kinds", "many", "in_soak"),
    [
        ({}, 60, 400),
        ({"kinds": DECODE}, 30, 200),
        ({"min_rows": 1, "max_rows": 70, "max_len": 70}, 30, 200),
    ],
    ids=["any", "decode", "many rows"],
)
def test_any_step(place: Place, kinds: dict[str, Any], many: int, in_soak: int) -> None:
    """In buffers with room, and in buffers that it fills."""

    @examples_at(place, many, in_soak)
    @given(batch=step_batches(**kinds))
    def check(batch: StepBatch) -> None:
        tokens = max(1, batch.num_tokens, batch.num_padded_tokens or 0)
        sizes = {"max_num_seqs": max(1, batch.num_rows), "max_num_tokens": tokens}
        place.check(batch)
        place.check(batch, **sizes)

    check()


def test_a_step_does_not_see_the_steps_before_it(place: Place) -> None:
    @examples_at(place, 40, 200)
    @given(steps=step_sequences(), on_host=st.lists(st.booleans(), min_size=6, max_size=6))
    def check(steps: list[StepBatch], on_host: list[bool]) -> None:
        tokens = max(max(b.num_tokens, b.num_padded_tokens or 0) for b in steps)
        sizes = max(1, max(batch.num_rows for batch in steps)), max(1, tokens)
        builder = place.builder(
            steps[0], max_num_seqs=sizes[0], max_num_tokens=sizes[1], num_blocks=None
        )
        for number, (batch, staged) in enumerate(zip(steps, on_host, strict=False), start=1):
            assert_matches_oracle(place.build(builder, batch, staged), batch, place.get)
            assert builder.num_builds == number

    check()


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("new", [1, 31, 32, 33, 63, 64, 65, 128, 129])
def test_chunks_at_block_and_tile_edges(place: Place, block_size: int, new: int) -> None:
    """The launch is the same from tensors and from arrays, so each chunk comes one way."""
    ends = (0, 1, 63, 64, 65, 127, 128)
    if place.memory and not place.memory.large:
        # a third of them, the others with other chunks
        ends = ends[new % 3 :: 3]
    for number, cached in enumerate(ends):
        rows = [(new, cached, new), (0, cached, 1), (0, cached, 3), (0, 0, 0), (1, new, 1)]
        batch = make_batch(rows, block_size, num_padded_tokens=2 * new + 64)
        place.check(batch, ways=[number % 2 == 0])


@pytest.mark.parametrize(
    ("num_rows", "tokens_a_row"),
    [
        *((rows, 1) for rows in (1, 31, 32, 33, 64, 65, 127, 128, 129, 256, 257)),
        *((rows, 2) for rows in (31, 32, 33, 65)),
        *((rows, 4) for rows in (8, 32, 129)),
    ],
)
def test_decode_batches_off_and_on_the_tiles(
    kernel_memory: KernelMemory, num_rows: int, tokens_a_row: int
) -> None:
    rows = [(0, 61 + n % 7, tokens_a_row if n % 5 else 0) for n in range(num_rows)]
    padded = tokens_a_row * num_rows + 70
    Place("", kernel_memory).check(make_batch(rows, 64, num_padded_tokens=padded))


@pytest.mark.parametrize("has_prefill", [False, True])
@pytest.mark.parametrize("num_rows", [1024, 1025, 2049])
def test_more_rows_than_one_tile_sums(
    kernel_memory: KernelMemory, num_rows: int, has_prefill: bool
) -> None:
    rows = [(0, n % 70, (n * n) % 3) for n in range(num_rows)]
    if has_prefill:
        rows[7], rows[-1] = (300, 5, 300), (33, 64, 33)
    Place("", kernel_memory).check(make_batch(rows, 16), max_num_seqs=num_rows)


def test_long_rows_over_shuffled_blocks_among_short_ones(place: Place) -> None:
    new = 8192 if place.memory and place.memory.large else 150
    rows = [(0, 131_000, 1), (new, 131_072 - new, new), (0, 0, 0), (0, 131_071, 1)]
    place.check(make_batch(rows + [(0, n % 70, 1) for n in range(61)], 64, seed=3))


@pytest.mark.parametrize("rows", [[], [(0, 0, 0)], [(0, 0, 0), (0, 7, 0)]])
@pytest.mark.parametrize("num_padded_tokens", [None, 0, 4])
def test_a_step_without_tokens_is_legal(
    place: Place, rows: list[tuple[int, int, int]], num_padded_tokens: int | None
) -> None:
    place.check(make_batch(rows, 16, num_padded_tokens=num_padded_tokens))


def test_strided_inputs_are_read_as_they_look() -> None:
    batch = make_batch([(3, 20, 3), (0, 40, 2)], 16)
    encoder, decoder, this_time, tables = batch.inputs()
    lengths = np.stack([encoder, decoder, this_time], axis=1)
    wide = np.repeat(tables, 2, axis=1)
    meta = builder_for(batch).build(lengths[:, 0], lengths[:, 1], lengths[:, 2], wide[:, ::2])
    assert_matches_oracle(meta, batch)


def test_tables_may_be_rows_of_a_wider_one(kernel_memory: KernelMemory) -> None:
    m = kernel_memory
    batch = make_batch([(3, 20, 3), (0, 40, 2)], 16)
    wide = np.concatenate([batch.block_tables, batch.block_tables], axis=1)
    tensors = [m.put(array) for array in batch.inputs()[:3]]
    tables = m.put(wide)[:, : batch.block_tables.shape[1]]
    meta = device_builder(m, batch).build(*tensors, tables, **counts_of(batch))
    assert_matches_oracle(meta, batch, m.get)


@pytest.mark.parametrize("has_prefill", [False, True])
def test_a_table_entry_that_is_no_block_gives_no_slot(
    kernel_memory: KernelMemory, has_prefill: bool
) -> None:
    m, place = kernel_memory, Place("", kernel_memory)
    rows = [(0, 40, 2), (0, 15, 2), (0, 20, 1), (20 if has_prefill else 0, 0, 20), (0, 46, 2)]
    batch = make_batch(rows, 16, num_columns=3)
    builder = device_builder(m, batch)
    wanted = m.get(place.build(builder, batch, on_host=False).slot_mapping)
    tables, cached = batch.block_tables.copy(), batch.seq_lens_decoder.copy()
    tables[0, 2], tables[1, 1], tables[2, 1], tables[3, 1] = -1, batch.num_blocks, -7, 2**31 - 1
    # the second token of the last row lies past the last column
    cached[4] = 47
    spoilt = dataclasses.replace(batch, block_tables=tables, seq_lens_decoder=cached)
    meta = place.build(builder, spoilt, on_host=False)
    bad = [0, 1, 3, 4, *range(5 + 16, 5 + 20)]
    wanted[bad], wanted[25:] = -1, [wanted[26], -1]
    np.testing.assert_array_equal(m.get(meta.slot_mapping), wanted)
    assert m.get(meta.position_ids)[[0, 1, 3, 4, 26]].tolist() == [40, 41, 16, 20, 48]


def test_lengths_that_no_step_has_stay_inside_the_buffers(kernel_memory: KernelMemory) -> None:
    m, columns = kernel_memory, 4
    rng = np.random.default_rng(5)
    extremes = np.array([-(2**31), -1, 0, 1, 40, 2**30, 2**31 - 1], np.int32)
    batch = make_batch([(0, 1, 1)] * 9, 16, num_columns=columns)
    outputs: dict[str, list] = {}

    def allocate(shape: tuple[int, ...], dtype: str) -> object:
        whole = m.poisoned((shape[0] + 512,), dtype)
        outputs.setdefault(dtype, []).append((whole, shape[0]))
        return whole[256 : 256 + shape[0]]

    builder = builder_for(batch, device="gpu", allocate=allocate, max_num_tokens=40)
    for _ in range(100 if m.large else 10):
        lengths = [m.put(rng.choice(extremes, 9)) for _ in range(3)]
        tables = m.put(rng.choice(extremes, (9, columns)))
        for prefill in (0, 3):
            meta = builder.build(
                *lengths, tables, num_tokens=40, num_prefill_tokens=prefill, max_seqlen_k=64
            )
            slots = m.get(meta.slot_mapping)
            assert ((slots >= -1) & (slots < batch.num_blocks * 16)).all()
    for dtype, wholes in outputs.items():
        poison = np.frombuffer(bytes([0xA5]) * 8, dtype)[0]
        for whole, size in wholes:
            values = m.get(whole)
            assert (values[:256] == poison).all()
            assert (values[256 + size :] == poison).all()


def windows_without_prefix(encoder: np.ndarray, this_time: np.ndarray) -> np.ndarray:
    """FastDeploy #7598's `[start, end)`: the new keys of the row, up to the token itself."""
    starts = np.cumsum(this_time) - this_time
    pairs = [
        (start, start + j + 1) if is_prefill else (0, 0)
        for start, n, is_prefill in zip(starts, this_time, encoder > 0, strict=True)
        for j in range(n)
    ]
    return np.array(pairs, np.int32).reshape(-1)


@examples(30, 100)
@given(batch=step_batches(kinds=("idle", "first_chunk", "decode", "mtp_decode"), max_rows=30))
def test_without_prefixes_the_windows_are_those_of_fastdeploy(batch: StepBatch) -> None:
    """The oracle, with which all of the above agrees."""
    step = ref_step_metadata(*batch.inputs(), batch.block_size)
    if batch.seq_lens_encoder.any():
        wanted = windows_without_prefix(batch.seq_lens_encoder, batch.seq_lens_this_time)
        np.testing.assert_array_equal(step["indexer_attn_mask_offsets"], wanted)
        np.testing.assert_array_equal(step["cu_seqlens_kg"], step["cu_seqlens_q"])


# Prefill, decode, second chunk after 66 tokens, decode with a draft, idle; tests/fakes/golden.py
# has idle rows between and is the plug-in's test_the_worked_step.
FIVE_KINDS = {
    "rows": [(5, 0, 5), (0, 130, 1), (4, 66, 4), (0, 63, 2), (0, 0, 0)],
    "block_tables": [[7, -1, -1], [3, 9, 12], [2, 5, -1], [11, 4, -1], [-1, -1, -1]],
    "cu_seqlens_q": [0, 5, 6, 10, 12, 12],
    "batch_id_per_token": [0, 0, 0, 0, 0, 1, 2, 2, 2, 2, 3, 3],
    "position_ids": [0, 1, 2, 3, 4, 130, 66, 67, 68, 69, 63, 64],
    "slot_mapping": [448, 449, 450, 451, 452, 770, 322, 323, 324, 325, 767, 256],
    "cu_seqlens_kg": [0, 5, 6, 76, 78, 78],
    "indexer_attn_mask_offsets": [
        *(0, 1, 0, 2, 0, 3, 0, 4, 0, 5),
        *(0, 0),
        *(6, 73, 6, 74, 6, 75, 6, 76),
        *(0, 0, 0, 0),
    ],
    "num_prefill_tokens": 9,
    "num_decode_tokens": 3,
    "max_seqlen_k": 131,
}


def test_numbers_worked_out_by_hand(place: Place) -> None:
    lengths = np.ascontiguousarray(np.array(FIVE_KINDS["rows"], np.int32).T)
    tables = np.array(FIVE_KINDS["block_tables"], np.int32)
    batch = StepBatch(*lengths, tables, 64, 13, None)
    wanted = FIVE_KINDS | dict(zip(ARRAY_FIELDS, lengths.tolist(), strict=False))
    wanted["position_ids_int32"] = FIVE_KINDS["position_ids"]
    oracle = ref_step_metadata(*batch.inputs(), 64)
    for name in (*ARRAY_FIELDS, *COUNT_FIELDS):
        assert np.asarray(oracle[name]).tolist() == wanted[name], name
    for _, meta in place.both(batch):
        for name in ARRAY_FIELDS:
            assert place.get(getattr(meta, name)).tolist() == wanted[name], name
        assert {name: getattr(meta, name) for name in COUNT_FIELDS}.items() <= wanted.items()


SERVING = {
    "1 x 32k": [(32768, 0, 32768)],
    "8 x 4k, half of them cached": [(4096, 4096 * (n % 2), 4096) for n in range(8)],
    "128 decode + 8k": [(0, 100 * n + 63, 1) for n in range(128)] + [(8192, 0, 8192)],
    "256 decode, 4 tokens": [(0, 500 * n, 4) for n in range(256)],
    "1000 decode + 2 chunks": [(0, n, 1) for n in range(1000)] + [(700, 333, 700)] * 2,
}


@pytest.mark.gpu
@pytest.mark.parametrize("name", SERVING)
def test_sizes_of_real_serving(name: str) -> None:
    batch = make_batch(SERVING[name], 64, seed=1)
    padded = dataclasses.replace(batch, num_padded_tokens=batch.num_tokens + 77)
    Place("torch", open_memory("torch")).check(padded)
