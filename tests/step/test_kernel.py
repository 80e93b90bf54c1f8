"""The step kernel against the naive loop, in every memory that kernels run on."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.kernel_memory import KernelMemory, open_memory
from tests.step.helpers import (
    assert_matches_oracle,
    build_from_tensors,
    builder_for,
    device_builder,
)
from tests.strategies import BLOCK_SIZES, StepBatch, make_batch, step_batches, step_sequences

# the fixture holds no state that one example could leave to the next
EXAMPLES = settings(
    max_examples=min(30, settings.default.max_examples),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
DECODE = ("idle", "idle_with_cache", "decode", "mtp_decode")


def _check(memory: KernelMemory, batch: StepBatch, **sizes: int) -> None:
    """A step equals the oracle, from device tensors and from host arrays."""
    builder = device_builder(memory, batch, **sizes)
    from_tensors = build_from_tensors(builder, memory, batch)
    assert_matches_oracle(from_tensors, batch, memory.get)
    from_host = builder.build(*batch.inputs(), batch.num_padded_tokens)
    assert_matches_oracle(from_host, batch, memory.get)


@EXAMPLES
@given(batch=step_batches())
def test_any_step_equals_the_oracle(kernel_memory: KernelMemory, batch: StepBatch) -> None:
    _check(kernel_memory, batch)


@EXAMPLES
@given(batch=step_batches(kinds=DECODE))
def test_any_decode_step_equals_the_oracle(kernel_memory: KernelMemory, batch: StepBatch) -> None:
    _check(kernel_memory, batch)


@EXAMPLES
@given(batch=step_batches(min_rows=1, max_rows=70, max_len=70))
def test_a_step_that_fills_the_capacity_equals_the_oracle(
    kernel_memory: KernelMemory, batch: StepBatch
) -> None:
    tokens = max(1, batch.num_tokens, batch.num_padded_tokens or 0)
    _check(kernel_memory, batch, max_num_seqs=batch.num_rows, max_num_tokens=tokens)


@EXAMPLES
@given(steps=step_sequences(), on_host=st.lists(st.booleans(), min_size=6, max_size=6))
def test_a_step_does_not_see_the_steps_before_it(
    kernel_memory: KernelMemory, steps: list[StepBatch], on_host: list[bool]
) -> None:
    tokens = max(max(b.num_tokens, b.num_padded_tokens or 0) for b in steps)
    rows = max(batch.num_rows for batch in steps)
    builder = device_builder(
        kernel_memory,
        steps[0],
        max_num_seqs=max(1, rows),
        max_num_tokens=max(1, tokens),
        num_blocks=None,
    )
    for batch, staged in zip(steps, on_host, strict=False):
        if staged:
            meta = builder.build(*batch.inputs(), batch.num_padded_tokens)
        else:
            meta = build_from_tensors(builder, kernel_memory, batch)
        assert_matches_oracle(meta, batch, kernel_memory.get)


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("new", [1, 31, 32, 33, 63, 64, 65, 129])
def test_chunks_at_block_and_tile_edges(
    kernel_memory: KernelMemory, block_size: int, new: int
) -> None:
    for cached in (0, 1, 63, 64, 65, 128):
        rows = [(new, cached, new), (0, cached, 1), (0, cached, 3), (0, 0, 0), (1, new, 1)]
        _check(kernel_memory, make_batch(rows, block_size, num_padded_tokens=2 * new + 64))


@pytest.mark.parametrize("num_rows", [1, 31, 32, 33, 64, 65, 127, 128, 129, 256, 257])
@pytest.mark.parametrize("tokens_a_row", [1, 2, 4])
def test_decode_batches_off_and_on_the_tiles(
    kernel_memory: KernelMemory, num_rows: int, tokens_a_row: int
) -> None:
    rows = [(0, 61 + n % 7, tokens_a_row if n % 5 else 0) for n in range(num_rows)]
    padded = tokens_a_row * num_rows + 70
    _check(kernel_memory, make_batch(rows, 64, num_padded_tokens=padded))


@pytest.mark.parametrize("has_prefill", [False, True])
@pytest.mark.parametrize("num_rows", [1024, 1025, 2500])
def test_more_rows_than_one_tile_sums(
    kernel_memory: KernelMemory, num_rows: int, has_prefill: bool
) -> None:
    rows = [(0, n % 70, (n * n) % 3) for n in range(num_rows)]
    if has_prefill:
        rows[7], rows[-1] = (300, 5, 300), (33, 64, 33)
    batch = make_batch(rows, 16)
    _check(kernel_memory, batch, max_num_seqs=num_rows)


def test_a_row_of_128k_keys_over_shuffled_blocks(kernel_memory: KernelMemory) -> None:
    new = 8192 if kernel_memory.large else 150
    rows = [(0, 131_000, 1), (new, 131_072 - new, new), (0, 0, 0), (0, 131_071, 1)]
    _check(kernel_memory, make_batch(rows, 64, seed=3))


@pytest.mark.parametrize("rows", [[], [(0, 0, 0)], [(0, 0, 0), (0, 7, 0)]])
@pytest.mark.parametrize("num_padded_tokens", [None, 0, 4])
def test_a_step_without_tokens_is_legal(
    kernel_memory: KernelMemory,
    rows: list[tuple[int, int, int]],
    num_padded_tokens: int | None,
) -> None:
    _check(kernel_memory, make_batch(rows, 16, num_padded_tokens=num_padded_tokens))


@pytest.mark.parametrize("has_prefill", [False, True])
def test_a_table_entry_that_is_no_block_gives_no_slot(
    kernel_memory: KernelMemory, has_prefill: bool
) -> None:
    m = kernel_memory
    rows = [(0, 40, 2), (0, 15, 2), (0, 20, 1), (20 if has_prefill else 0, 0, 20), (0, 46, 2)]
    batch = make_batch(rows, 16, num_columns=3)
    builder = device_builder(m, batch)
    wanted = m.get(build_from_tensors(builder, m, batch).slot_mapping)
    tables, cached = batch.block_tables.copy(), batch.seq_lens_decoder.copy()
    tables[0, 2], tables[1, 1], tables[2, 1], tables[3, 1] = -1, batch.num_blocks, -7, 2**31 - 1
    # the second token of the last row lies past the last column
    cached[4] = 47
    spoilt = dataclasses.replace(batch, block_tables=tables, seq_lens_decoder=cached)
    meta = build_from_tensors(builder, m, spoilt)
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
            found = m.get(whole)
            assert (found[:256] == poison).all()
            assert (found[256 + size :] == poison).all()


def test_tables_may_be_rows_of_a_wider_one(kernel_memory: KernelMemory) -> None:
    m = kernel_memory
    batch = make_batch([(3, 20, 3), (0, 40, 2)], 16)
    wide = np.concatenate([batch.block_tables, batch.block_tables], axis=1)
    tensors = [m.put(array) for array in batch.inputs()[:3]]
    tables = m.put(wide)[:, : batch.block_tables.shape[1]]
    meta = device_builder(m, batch).build(
        *tensors, tables, num_tokens=5, num_prefill_tokens=3, max_seqlen_k=42
    )
    assert_matches_oracle(meta, batch, m.get)


def windows_without_prefix(encoder: np.ndarray, this_time: np.ndarray) -> np.ndarray:
    """FastDeploy #7598's `[start, end)`: the new keys of the row, up to the token itself."""
    starts = np.cumsum(this_time) - this_time
    pairs = [
        (start, start + j + 1) if is_prefill else (0, 0)
        for start, n, is_prefill in zip(starts, this_time, encoder > 0, strict=True)
        for j in range(n)
    ]
    return np.array(pairs, np.int32).reshape(-1)


@EXAMPLES
@given(batch=step_batches(kinds=("idle", "first_chunk", "decode", "mtp_decode"), max_rows=30))
def test_without_prefixes_the_windows_are_those_of_fastdeploy(
    kernel_memory: KernelMemory, batch: StepBatch
) -> None:
    batch = dataclasses.replace(batch, num_padded_tokens=None)
    meta = build_from_tensors(device_builder(kernel_memory, batch), kernel_memory, batch)
    if not batch.seq_lens_encoder.any():
        assert meta.indexer_attn_mask_offsets is None
        return
    wanted = windows_without_prefix(batch.seq_lens_encoder, batch.seq_lens_this_time)
    np.testing.assert_array_equal(kernel_memory.get(meta.indexer_attn_mask_offsets), wanted)
    np.testing.assert_array_equal(
        kernel_memory.get(meta.cu_seqlens_kg), kernel_memory.get(meta.cu_seqlens_q)
    )


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
    memory = open_memory("torch")
    batch = make_batch(SERVING[name], 64, seed=1)
    padded = batch.num_tokens + 77
    _check(memory, dataclasses.replace(batch, num_padded_tokens=padded))
