"""Rows of single tokens for kernels that know rows alone, against a loop, on all memories."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernel_memory import POISON, KernelMemory, open_memory
from tests.strategies import StepBatch, make_batch, step_batches

POISONED = int(np.full(4, POISON, np.uint8).view(np.int32)[0])
BLOCK = 16
# first chunk, idle, decode, later chunk, drafts
ROWS = [(2, 0, 2), (0, 0, 0), (0, 40, 1), (3, 23, 3), (0, 16, 3)]
PADDING = 2


def step_of(batch: StepBatch, gathers: bool) -> SimpleNamespace:
    """The fields of a step that are read, as NumPy arrays."""
    from fd_dsa.step import StepMetadataBuilder

    rows, columns = batch.block_tables.shape
    builder = StepMetadataBuilder(rows, 512, columns, BLOCK, device="numpy")
    meta = builder.build(*batch.inputs(), batch.num_padded_tokens)
    names = ("position_ids", "batch_id_per_token", "block_tables", "seq_lens_encoder")
    starts = meta.cu_seqlens_kg if gathers else None
    found = {name: np.array(getattr(meta, name)) for name in names}
    return SimpleNamespace(**found, cu_seqlens_kg=starts if starts is None else np.array(starts))


def wanted(step: Any, num_rows: int, max_length: int, max_gathered: int) -> list[tuple[Any, ...]]:
    """length, pages, start, end, is_gathered of every row, by the definition."""
    found = []
    gathers = step.cu_seqlens_kg is not None
    for t in range(num_rows):
        b = step.batch_id_per_token[t] if t < len(step.batch_id_per_token) else -1
        length = min(step.position_ids[t] + 1, max_length) if b >= 0 else 1
        start = min(step.cu_seqlens_kg[b], max_gathered) if gathers else 0
        gathered = (
            gathers and b >= 0 and step.seq_lens_encoder[b] > 0
            and step.cu_seqlens_kg[b + 1] <= max_gathered
        )  # fmt: skip
        end = start + length if gathered else start
        if gathered or b < 0:
            length, pages = 1, [0]
        else:
            pages = [max(0, int(p)) for p in step.block_tables[b, : -(-length // BLOCK)]]
        found.append((length, pages, start, end, int(gathered)))
    return found


def fill(
    m: KernelMemory, step: Any, num_rows: int, max_length: int, max_gathered: int
) -> list[tuple[Any, ...]]:
    """The same by the kernel; what lies behind the rows must be untouched."""
    from fd_dsa.ops.indexer_logits.token_rows import TokenRows, fill_token_rows

    columns, capacity = step.block_tables.shape[1], num_rows + 3
    rows = TokenRows(
        m.poisoned((capacity,), "int32"),
        m.poisoned((capacity, columns), "int32"),
        *(m.poisoned((capacity,), "int32") for _ in range(3)),
    )
    device = {k: v if v is None else m.put(v) for k, v in vars(step).items()}
    fill_token_rows(
        rows, SimpleNamespace(**device), block_size=BLOCK, num_rows=num_rows,
        max_length=max_length, max_gathered=max_gathered,
    )  # fmt: skip
    lengths, tables, starts, ends, gathered = (
        m.get(x) for x in (rows.lengths, rows.tables, rows.starts, rows.ends, rows.is_gathered)
    )
    for array in (lengths, tables, starts, ends, gathered):
        assert (array[num_rows:] == POISONED).all()
    found = []
    for t in range(num_rows):
        num_pages = -(-int(lengths[t]) // BLOCK)
        assert (tables[t, num_pages:] == POISONED).all()
        pages = tables[t, :num_pages].tolist()
        found.append((lengths[t], pages, starts[t], ends[t], gathered[t]))
    return found


# room for both prefill rows' keys, for the first row's alone, for none
@pytest.mark.parametrize(("max_gathered", "num_gathered"), [(29, 5), (28, 2), (0, 0)])
@pytest.mark.parametrize("gathers", [True, False])
def test_every_token_is_a_row(
    kernel_memory: KernelMemory, gathers: bool, max_gathered: int, num_gathered: int
) -> None:
    step = step_of(make_batch(ROWS, BLOCK, num_padded_tokens=9 + PADDING), gathers)
    arguments = (step, 9 + PADDING + 4, 64, max_gathered)
    rows = wanted(*arguments)
    assert fill(kernel_memory, *arguments) == rows
    assert sum(row[4] for row in rows) == num_gathered * gathers


@pytest.mark.triton
@settings(max_examples=20)
@given(
    batch=step_batches(min_rows=1, max_rows=5, max_len=40, block_size=BLOCK),
    room=st.integers(0, 200),
    most=st.integers(1, 80),
    more=st.integers(0, 5),
)
def test_any_step(batch: StepBatch, room: int, most: int, more: int) -> None:
    step = step_of(batch, gathers=True)
    num_rows = len(step.position_ids) + more
    most = min(most, step.block_tables.shape[1] * BLOCK)
    found = fill(open_memory("interpreter"), step, num_rows, most, room)
    assert found == wanted(step, num_rows, most, room)


def test_lengths_stay_within_scores_and_tables(kernel_memory: KernelMemory) -> None:
    step = step_of(make_batch(ROWS, BLOCK), True)
    assert max(row[0] for row in fill(kernel_memory, step, 9, 20, 31)) == 20
    step.block_tables = np.ascontiguousarray(step.block_tables[:, :2])
    found = fill(kernel_memory, step, 9, 64, 31)
    assert found == wanted(step, 9, 2 * BLOCK, 31)


def test_a_missing_page_is_block_0(kernel_memory: KernelMemory) -> None:
    step = step_of(make_batch(ROWS, BLOCK), False)
    step.block_tables[2, 1] = -1
    found = fill(kernel_memory, step, 9, 64, 0)
    assert found == wanted(step, 9, 64, 0)
    assert found[2][1][1] == 0


def test_windows_of_neighbours_touch(kernel_memory: KernelMemory) -> None:
    # a block of tokens reads from its first start to its last end: no token may widen that
    step = step_of(make_batch(ROWS, BLOCK, num_padded_tokens=9 + PADDING), True)
    rows = fill(kernel_memory, step, 9 + PADDING, 64, 31)
    starts = [row[2] for row in rows]
    assert starts == sorted(starts)
    assert all(row[2] >= step.cu_seqlens_kg[4] for row in rows[6:])
