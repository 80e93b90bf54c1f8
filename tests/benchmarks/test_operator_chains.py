"""The other forms of `once_per_step` make the slots and windows that a step has."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("paddle", reason="the operators are on Paddle's tensors")

from benchmarks._operator_chains import slot_chain, values_of, write_windows
from fd_dsa.step import StepMetadataBuilder
from tests.strategies import make_batch

pytestmark = pytest.mark.triton

# prompts, a later chunk, decode with drafts, an idle row
ROWS = [(300, 0, 300), (0, 70, 2), (40, 90, 40), (0, 0, 0), (0, 5, 1), (3, 0, 3)]


@pytest.mark.parametrize("by_kernels", [False, True])
def test_slots_and_windows(by_kernels: bool) -> None:
    batch = make_batch(ROWS, 16, num_padded_tokens=350)
    sizes = batch.num_rows, 350, batch.block_tables.shape[1], 16
    step = StepMetadataBuilder(*sizes).build(*batch.inputs(), 350)
    slots = values_of(slot_chain(step, 16, by_kernels), "int64")
    wanted = step.slot_mapping.numpy()
    np.testing.assert_array_equal(slots[wanted >= 0], wanted[wanted >= 0])
    windows = values_of(step.indexer_attn_mask_offsets, "int32")
    step.indexer_attn_mask_offsets.fill_(-1)
    write_windows(step, by_kernels)
    np.testing.assert_array_equal(step.indexer_attn_mask_offsets.numpy(), windows)
