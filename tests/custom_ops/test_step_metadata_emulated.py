"""The CUDA source of the small kernels, its threads emulated on the CPU, against the oracles.

Barriers and shuffles are in place, so most mistakes show without a GPU; those of memory ordering
and of real sizes are left to the tests on one.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from fd_dsa import custom_ops
from tests.custom_ops.adoption import adopted
from tests.custom_ops.building import emulated_library
from tests.custom_ops.test_position_ids_kernel import (  # noqa: F401
    test_lengths_that_no_step_has_stay_inside,
    test_the_kernel_gives_the_same,
)
from tests.custom_ops.test_step_metadata_launch import (  # noqa: F401
    test_a_new_builder_holds_padding_only,
    test_a_step_without_tokens_is_legal,
    test_a_table_entry_that_is_no_block_gives_no_slot,
    test_any_decode_step_equals_the_oracle,
    test_any_step_equals_the_oracle,
    test_lengths_that_no_step_has_stay_inside_the_buffers,
    test_more_rows_than_one_tile_sums,
    test_on_a_device,
    test_tables_may_be_rows_of_a_wider_one,
    test_the_kernel_serves_the_builders_of_this_folder,
)

pytestmark = pytest.mark.triton


@pytest.fixture
def kernel_memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Host memory in which builders take the emulated kernels."""
    from tests.kernel_memory import open_memory

    memory = open_memory("interpreter")
    with adopted(emulated_library(), monkeypatch, on_gpu=False):
        yield memory
        # else a builder went on with Triton's kernel, and nothing was tested
        assert all(choice.serves for choice in custom_ops.choices()), custom_ops.choices()
