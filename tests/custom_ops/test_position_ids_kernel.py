"""The kernel of the position ids through its C ABI: on a GPU, and emulated on the CPU."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import pytest

from fd_dsa import custom_ops
from tests.custom_ops.position_rows import MANY, expected, lengths_of
from tests.kernel_memory import KernelMemory

KERNELS = "position_ids"
POINTER, INT = ctypes.c_void_p, ctypes.c_int32


def launch(*arguments: Any) -> None:
    """Call the launcher on the default stream."""
    function = custom_ops.build().kernels.fd_dsa_position_ids_cuda
    function.argtypes = (POINTER, POINTER, POINTER, INT, INT, POINTER)
    assert function(*arguments, None) == 0


@pytest.mark.parametrize("name", MANY)
def test_the_kernel_gives_the_same(kernel_memory: KernelMemory, name: str) -> None:
    m, rows = kernel_memory, MANY[name]
    total = sum(new for _, _, new in rows)
    _, cached, new = (m.put(lengths) for lengths in lengths_of(rows))
    # two tokens too few, and more than there are
    for size in (max(total - 2, 0), total + 700):
        positions = m.put(np.full(size + 256, -91, np.int32))
        pointers = [tensor.data_ptr() for tensor in (cached, new, positions)]
        for _ in range(3 if m.on_gpu else 1):
            launch(*pointers, len(rows), size)
        found = m.get(positions)
        np.testing.assert_array_equal(found[:size], expected(rows, size))
        assert (found[size:] == -91).all()


def test_lengths_that_no_step_has_stay_inside(kernel_memory: KernelMemory) -> None:
    m, rng = kernel_memory, np.random.default_rng(2)
    extremes = np.array([-(2**31), -1, 0, 1, 40, 2**30, 2**31 - 1], np.int32)
    for num_rows in (1, 9, 300, 1500):
        positions = m.put(np.full(600, -91, np.int32))
        cached, new = (m.put(rng.choice(extremes, num_rows)) for _ in range(2))
        pointers = cached.data_ptr(), new.data_ptr(), positions.data_ptr() + 400
        launch(*pointers, num_rows, 400)
        found = m.get(positions)
        assert (found[:100] == -91).all() and (found[500:] == -91).all()
