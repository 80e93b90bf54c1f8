"""The tests of select_slots again, by the kernel of custom_ops/ through its C ABI.

The fixture `kernel_memory` of this folder makes the difference, and the one here.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from fd_dsa import custom_ops
from fd_dsa.errors import BackendUnavailable, LaunchError
from fd_dsa.ops import providers
from fd_dsa.ops.topk import triton_kernel
from fd_dsa.ops.topk.custom_op import SlotSelector, slot_selector
from tests.kernel_memory import KernelMemory
from tests.ops.paged_rows import SMALL_ROWS, paged_rows
from tests.ops.test_topk_kernel import (  # noqa: F401
    scores_of,
    test_a_chunk_of_tokens_leaves_the_others_alone,
    test_a_position_past_the_scores_looks_at_no_other_row,
    test_a_position_past_the_table_has_no_slot,
    test_a_short_window_needs_no_scores,
    test_block_sizes,
    test_keys_without_a_block_have_no_slot,
    test_prompt_tokens_choose_among_the_keys_of_their_windows,
    test_rows_of_scores_may_lie_apart,
    test_set_and_order,
    test_the_choice_of_the_cpu,
    test_the_same_bits_every_time,
    test_windows_around_k_and_the_tile,
    wanted,
)

KERNELS = "topk"


@pytest.fixture(autouse=True)
def selector(kernel_memory: KernelMemory, monkeypatch: pytest.MonkeyPatch) -> SlotSelector:
    """Kernel that replaces Triton's function."""
    found = SlotSelector(custom_ops.build().kernels)
    monkeypatch.setattr("fd_dsa.ops.topk.triton_kernel.select_slots", found)
    return found


def test_it_serves_where_it_agrees(kernel_memory: KernelMemory) -> None:
    assert isinstance(slot_selector("gpu", kernel_memory.poisoned), SlotSelector)
    assert providers.table()["topk"]["gpu"].provider == "custom_op"


def test_a_kernel_that_chooses_others_does_not_serve(
    kernel_memory: KernelMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SlotSelector, "__call__", lambda *arguments, **options: None)
    found = slot_selector("gpu", kernel_memory.poisoned)
    assert found is triton_kernel.select_slots
    assert "row 0 of 40 is [" in providers.table()["topk"]["gpu"].rejected["custom_op"]


def test_a_library_of_another_release_is_refused() -> None:
    class Old:
        @staticmethod
        def fd_dsa_topk_bytes() -> int:
            return 8

    with pytest.raises(BackendUnavailable, match="build it again"):
        SlotSelector(Old())


def test_other_tensors_are_looked_at_again(
    kernel_memory: KernelMemory, selector: SlotSelector
) -> None:
    m, step = kernel_memory, paged_rows(SMALL_ROWS, 16)
    tokens = m.put(step.position_ids), m.put(step.batch_ids), m.put(step.block_tables)
    sizes = {"block_size": 16, "num_blocks": step.num_blocks}
    slots = [m.poisoned((step.num_tokens, k), "int32") for k in (4, 9)]
    for seed in range(2):
        scores = scores_of("normal", step, seed)
        for out in slots:
            selector(m.put(scores), *tokens, out, **sizes)
            np.testing.assert_array_equal(m.get(out), wanted(step, scores, out.shape[1]))


def test_tensors_with_gaps_are_refused(kernel_memory: KernelMemory, selector: SlotSelector) -> None:
    m, step = kernel_memory, paged_rows(SMALL_ROWS, 16)
    scores = m.put(scores_of("normal", step))
    tokens: list[Any] = [m.put(step.position_ids), m.put(step.batch_ids), m.put(step.block_tables)]
    slots = m.poisoned((step.num_tokens, 8), "int32")
    sizes = {"block_size": 16, "num_blocks": step.num_blocks}
    with pytest.raises(LaunchError, match=r"out of shape .* is not contiguous"):
        selector(scores, *tokens, slots[:, ::2], **sizes)
