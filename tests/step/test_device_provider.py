"""The builder on a device: checks on request, repeats, captures, and what a step costs."""

from __future__ import annotations

import numpy as np
import pytest

from fd_dsa.step import StepMetadataBuilder
from tests.kernel_memory import KernelMemory, open_memory
from tests.step.helpers import (
    ARRAY_FIELDS,
    ROW_FIELDS,
    TOKEN_FIELDS,
    arrays_of,
    assert_matches_oracle,
    counts_of,
    device_builder,
)
from tests.strategies import StepBatch, make_batch

LARGE = make_batch([(20, 30, 20), (0, 60, 1), (6, 0, 6), (0, 5, 4), (0, 40, 1)], 16, num_columns=4)


def _builder(memory: KernelMemory) -> StepMetadataBuilder:
    return device_builder(memory, LARGE, max_num_seqs=5, max_num_tokens=40, num_blocks=None)


def test_checks_on_request_read_device_tensors_back(
    kernel_memory: KernelMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    m = kernel_memory
    tensors = [m.put(array) for array in LARGE.inputs()[:3]]
    tables = LARGE.block_tables.copy()
    tables[1, 3] = -1
    spoilt = m.put(tables)
    _builder(m).build(*tensors, spoilt, **counts_of(LARGE))
    monkeypatch.setenv("FD_DSA_CHECK", "1")
    builder = _builder(m)
    with pytest.raises(ValueError, match=r"block_tables: row 1, column 3 is -1"):
        builder.build(*tensors, spoilt, **counts_of(LARGE))
    good = m.put(LARGE.block_tables)
    with pytest.raises(ValueError, match=r"num_tokens: got 33, the lengths of the rows say 32"):
        builder.build(*tensors, good, **(counts_of(LARGE) | {"num_tokens": 33}))
    assert_matches_oracle(builder.build(*tensors, good, **counts_of(LARGE)), LARGE, m.get)


@pytest.mark.gpu
def test_ten_thousand_launches_write_the_same_bytes() -> None:
    import torch

    m = open_memory("torch")
    for rows in ([(0, 100 * n, 1 + n % 3) for n in range(130)], [(999, 77, 999), (0, 5, 1)] * 4):
        batch = make_batch(rows, 64)
        tensors = [m.put(array) for array in batch.inputs()]
        builder = device_builder(m, batch)
        first = builder.build(*tensors, **counts_of(batch))
        fields = [name for name in ARRAY_FIELDS if getattr(first, name) is not None]
        held = {name: getattr(first, name).clone() for name in fields}
        different = torch.zeros((), dtype=torch.int64, device="cuda")
        for _ in range(10_000):
            meta = builder.build(*tensors, **counts_of(batch))
            for name in (*TOKEN_FIELDS, "cu_seqlens_q"):
                different += (getattr(meta, name) != held[name]).sum()
                getattr(meta, name).fill_(-91)
        assert different.item() == 0


def _decode(num_rows: int, seed: int, tokens_a_row: int = 1) -> StepBatch:
    """A decode step whose other rows, up to eight, are idle."""
    rows = [(0, 300 + 11 * n + seed, tokens_a_row) for n in range(num_rows)]
    return make_batch(rows + [(0, 0, 0)] * (8 - num_rows), 64, seed=seed, num_columns=8)


@pytest.mark.gpu
def test_a_captured_step_follows_its_inputs() -> None:
    import torch

    m = open_memory("torch")
    inputs = [m.put(array) for array in _decode(8, 0).inputs()]
    builder = device_builder(m, _decode(8, 0), max_num_tokens=24, num_blocks=None)
    counts = {"num_tokens": 16, "num_prefill_tokens": 0, "max_seqlen_k": 512}
    builder.build(*inputs, 24, **counts)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        meta = builder.build(*inputs, 24, **counts)
    for num_rows, tokens_a_row in ((8, 2), (3, 1), (0, 1), (5, 3), (8, 1)):
        batch = _decode(num_rows, 7 * num_rows, tokens_a_row)
        for tensor, array in zip(inputs, batch.inputs(), strict=True):
            tensor.copy_(torch.from_numpy(array))
        graph.replay()
        found = arrays_of(meta, m.get)
        eager = device_builder(m, batch, max_num_tokens=24)
        wanted = arrays_of(eager.build(*batch.inputs(), 24), m.get)
        for name in (*ROW_FIELDS, *TOKEN_FIELDS):
            np.testing.assert_array_equal(found[name], wanted[name], err_msg=name)


@pytest.mark.gpu
def test_host_arrays_cannot_be_captured_and_do_not_end_the_capture() -> None:
    import torch

    m, batch = open_memory("torch"), _decode(4, 1)
    builder = device_builder(m, batch)
    tensors = [m.put(array) for array in batch.inputs()]
    builder.build(*batch.inputs())
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        meta = builder.build(*tensors, **counts_of(batch))
        with pytest.raises(RuntimeError, match="graph capture"):
            builder.build(*batch.inputs())
    graph.replay()
    assert_matches_oracle(meta, batch, m.get)


@pytest.mark.gpu
def test_a_decode_step_neither_waits_nor_allocates_nor_compiles() -> None:
    import torch

    from benchmarks import _gpu
    from fd_dsa.triton_runtime import num_late_compilations

    m, batch = open_memory("torch"), _decode(8, 3)
    builder = device_builder(m, batch)
    tensors = [m.put(array) for array in batch.inputs()]

    def step() -> None:
        builder.build(*tensors, **counts_of(batch))

    step()
    compiled = num_late_compilations()
    found = _gpu.effects(step)
    assert found == {"launches": 1, "copies": 0, "host_waits": 0, "allocations": 0}
    assert num_late_compilations() == compiled
    torch.cuda.synchronize()
