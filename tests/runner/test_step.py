"""The packed inputs of a step: what the rows hold arrives, whatever the step before held."""

from __future__ import annotations

from typing import Any

import numpy as np

from fd_dsa.runner import InputBatch
from fd_dsa.runner.device_steps import DeviceInputs
from fd_dsa.runner.input_batch import SamplingInputs
from tests.kernel_memory import KernelMemory

MAX_ROWS, MAX_TOKENS, COLUMNS = 5, 40, 3


def staged(
    inputs: DeviceInputs, batch: InputBatch, sampled: np.ndarray, num_tokens: int = 0
) -> list[Any]:
    """The tensors of a step, padded to some tokens."""
    inputs.stage(batch.arrays(sampled), SamplingInputs())
    tokens = max(batch.num_tokens, num_tokens)
    return inputs.views(tokens, batch.num_rows, len(sampled))[0]


def filled(batch: InputBatch, rng: np.random.Generator) -> np.ndarray:
    """Put random rows into the batch; which tokens' logits are wanted."""
    batch.begin_step()
    wanted = []
    for row in range(MAX_ROWS):
        count = int(rng.integers(0, 8))
        batch.set_blocks(row, rng.integers(0, 99, COLUMNS).tolist())
        if count:
            ids = rng.integers(0, 1000, count).tolist()
            last = batch.add_row(row, ids, int(rng.integers(0, 50)), bool(rng.integers(2)))
            wanted.append(last)
            batch.pending_source[row] = int(rng.integers(-1, 4))
            batch.snapshot_slots[row] = int(rng.integers(-1, 4))
    if not wanted:
        wanted.append(batch.add_row(MAX_ROWS - 1, [1], 0, True))
    return np.array(wanted[: int(rng.integers(0, len(wanted) + 1))], np.int64)


def check(found: list[np.ndarray], batch: InputBatch, sampled: np.ndarray) -> None:
    """Every field against the batch."""
    rows, tokens = batch.num_rows, batch.num_tokens
    expected = (
        batch.token_ids[:tokens],
        batch.num_chunk_tokens[:rows],
        batch.num_computed_tokens[:rows],
        batch.num_scheduled_tokens[:rows],
        sampled,
        batch.pending_source[:rows],
        batch.snapshot_slots[:rows],
        batch.block_tables[:rows],
    )
    for array, values in zip(found, expected, strict=True):
        np.testing.assert_array_equal(array, values)
        assert array.shape == values.shape


def test_device_inputs(kernel_memory: KernelMemory) -> None:
    m, rng = kernel_memory, np.random.default_rng(0)
    batch = InputBatch(MAX_ROWS, MAX_TOKENS, COLUMNS, 16)
    inputs = DeviceInputs(batch, m.poisoned)
    addresses = set()
    for _ in range(12):
        wanted = filled(batch, rng)
        fields = staged(inputs, batch, wanted)
        check([m.get(tensor) for tensor in fields], batch, wanted)
        addresses.add(fields[0].data_ptr())
        for field in fields:
            assert field.data_ptr() % 16 == 0 or field.shape[0] == 0
    assert len(addresses) == 1


def test_a_step_in_flight_keeps_its_values(kernel_memory: KernelMemory) -> None:
    m = kernel_memory
    batch = InputBatch(2, 8, 1, 16)
    inputs = DeviceInputs(batch, m.poisoned)
    batch.begin_step()
    batch.add_row(0, [7, 8], 0, True)
    ids, *_ = staged(inputs, batch, np.array([1]))
    batch.begin_step()
    batch.add_row(1, [1], 0, True)
    assert m.get(ids).tolist() == [7, 8]


def test_rows_of_one_token_and_three_drafts_are_all_sampled(kernel_memory: KernelMemory) -> None:
    m, batch = kernel_memory, InputBatch(MAX_ROWS, MAX_TOKENS, COLUMNS, 16)
    inputs = DeviceInputs(batch, m.poisoned, max_drafts=3)
    for row in range(MAX_ROWS):
        batch.add_row(row, [row] * 4, 9, is_prefill=False)
    sampled = np.arange(4 * MAX_ROWS)
    check([m.get(tensor) for tensor in staged(inputs, batch, sampled)], batch, sampled)


def test_padding_of_a_captured_step_is_token_0(kernel_memory: KernelMemory) -> None:
    m, batch = kernel_memory, InputBatch(MAX_ROWS, MAX_TOKENS, COLUMNS, 16)
    inputs = DeviceInputs(batch, m.poisoned)
    batch.add_row(0, [7, 8, 9], 0, is_prefill=True)
    staged(inputs, batch, np.array([2]))
    batch.begin_step()
    batch.add_row(0, [5], 3, is_prefill=False)
    for _ in range(4):
        assert m.get(staged(inputs, batch, np.array([0]), 4)[0]).tolist() == [5, 0, 0, 0]


def test_arrays_are_those_of_the_batch() -> None:
    batch, rng = InputBatch(MAX_ROWS, MAX_TOKENS, COLUMNS, 16), np.random.default_rng(1)
    wanted = filled(batch, rng)
    fields = batch.arrays(wanted)
    check(list(fields), batch, wanted)
    assert np.shares_memory(fields[-1], batch.block_tables)
