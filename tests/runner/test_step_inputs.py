"""The packed inputs of a step: what the rows hold arrives, whatever the step before held."""

from __future__ import annotations

import numpy as np
import pytest

from fd_dsa.ops._host import as_numpy
from fd_dsa.runner import InputBatch
from fd_dsa.runner.step_inputs import DeviceInputs, HostInputs, StepInputs
from tests.kernel_memory import KernelMemory

MAX_ROWS, MAX_TOKENS, COLUMNS = 5, 40, 3


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
    if not wanted:
        wanted.append(batch.add_row(MAX_ROWS - 1, [1], 0, True))
    return np.array(wanted[: int(rng.integers(0, len(wanted) + 1))], np.int64)


def check(found: dict[str, np.ndarray], batch: InputBatch, wanted: np.ndarray) -> None:
    """Every field against the batch."""
    rows, tokens = batch.num_rows, batch.num_tokens
    expected = StepInputs(
        batch.ids_remove_padding[:tokens],
        batch.seq_lens_encoder[:rows],
        batch.seq_lens_decoder[:rows],
        batch.seq_lens_this_time[:rows],
        batch.block_tables[:rows],
        wanted,
    )
    for name, values in expected._asdict().items():
        assert found[name].shape == values.shape, name
        np.testing.assert_array_equal(found[name], values, err_msg=name)


def test_device_inputs(kernel_memory: KernelMemory) -> None:
    m, rng = kernel_memory, np.random.default_rng(0)
    batch = InputBatch(MAX_ROWS, MAX_TOKENS, COLUMNS, 16)
    inputs = DeviceInputs(batch, m.poisoned)
    addresses = set()
    for _ in range(12):
        wanted = filled(batch, rng)
        staged = inputs.stage(wanted)
        check({n: m.get(v) for n, v in staged._asdict().items()}, batch, wanted)
        addresses.add(staged.ids_remove_padding.data_ptr())
        for field in staged:
            assert field.data_ptr() % 16 == 0 or field.shape[0] == 0
    assert len(addresses) == 1


def test_a_step_in_flight_keeps_its_values(kernel_memory: KernelMemory) -> None:
    m = kernel_memory
    batch = InputBatch(2, 8, 1, 16)
    inputs = DeviceInputs(batch, m.poisoned)
    batch.begin_step()
    batch.add_row(0, [7, 8], 0, True)
    staged = inputs.stage(np.array([1]))
    batch.begin_step()
    batch.add_row(1, [1], 0, True)
    assert m.get(staged.ids_remove_padding).tolist() == [7, 8]


def test_host_inputs_are_the_batch() -> None:
    pytest.importorskip("paddle")
    batch, rng = InputBatch(MAX_ROWS, MAX_TOKENS, COLUMNS, 16), np.random.default_rng(1)
    wanted = filled(batch, rng)
    staged = HostInputs(batch).stage(wanted)
    check({n: as_numpy(v) for n, v in staged._asdict().items()}, batch, wanted)
    assert np.shares_memory(staged.block_tables, batch.block_tables)
