"""The builder's tests again, with steps by the kernel of custom_ops/ through its C ABI.

The fixture `kernel_memory` of this folder makes the difference.
"""

from __future__ import annotations

from fd_dsa import custom_ops
from tests.kernel_memory import KernelMemory
from tests.step.helpers import device_builder
from tests.step.test_device import (  # noqa: F401
    test_a_decode_step_leaves_the_windows_alone,
    test_a_new_builder_holds_padding_only,
    test_a_refused_step_writes_nothing,
    test_a_step_of_known_size_makes_no_new_tensors,
    test_addresses_never_move,
    test_device_tensors_are_used_where_they_are,
    test_host_arrays_are_copied,
    test_int32_positions_are_written_where_they_are_asked_for,
    test_the_views_outlive_the_builder_and_do_not_keep_it,
    test_what_the_last_step_used_becomes_padding,
)
from tests.step.test_kernel import (  # noqa: F401
    test_a_row_of_128k_keys_over_shuffled_blocks,
    test_a_step_does_not_see_the_steps_before_it,
    test_a_step_that_fills_the_capacity_equals_the_oracle,
    test_a_step_without_tokens_is_legal,
    test_a_table_entry_that_is_no_block_gives_no_slot,
    test_any_decode_step_equals_the_oracle,
    test_any_step_equals_the_oracle,
    test_chunks_at_block_and_tile_edges,
    test_decode_batches_off_and_on_the_tiles,
    test_lengths_that_no_step_has_stay_inside_the_buffers,
    test_more_rows_than_one_tile_sums,
    test_tables_may_be_rows_of_a_wider_one,
    test_without_prefixes_the_windows_are_those_of_fastdeploy,
)
from tests.step.test_tail import test_on_a_device  # noqa: F401
from tests.strategies import make_batch


def test_the_kernel_serves_the_builders_of_this_folder(kernel_memory: KernelMemory) -> None:
    device_builder(kernel_memory, make_batch([(0, 3, 1)], 16))
    [choice] = custom_ops.choices()
    assert (choice.operator, choice.serves) == ("step_metadata", True), choice
