"""The CUDA source of the position ids, its threads emulated on the CPU, against the oracle.

Barriers and shuffles are in place, so most mistakes show without a GPU; those of memory ordering
and of real sizes are left to the tests on one.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.custom_ops.adoption import adopted
from tests.custom_ops.building import emulated_library
from tests.custom_ops.test_position_ids_kernel import (  # noqa: F401
    test_lengths_that_no_step_has_stay_inside,
    test_the_kernel_gives_the_same,
)

pytestmark = pytest.mark.triton


@pytest.fixture
def kernel_memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Host memory on which the emulated kernel works."""
    from tests.kernel_memory import open_memory

    memory = open_memory("interpreter")
    with adopted(emulated_library(), monkeypatch, on_gpu=False):
        yield memory
