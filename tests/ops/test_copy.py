"""Copies on a device against NumPy's, on all memories: what lies beside them stays as it is."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fd_dsa.errors import ShapeError
from tests.kernel_memory import POISON, KernelMemory, open_memory

pytestmark = pytest.mark.triton


def copied_heads(m: KernelMemory, shape: tuple[int, int, int], heads: int, dtype: str) -> Any:
    """Source, and target of another number of heads, after the copy."""
    from fd_dsa.ops._copy import copy_heads

    bits = np.random.default_rng(0).integers(0, 1 << 16, shape, np.uint16)
    source = bits if dtype == "bfloat16" else bits.astype(dtype)
    target = m.poisoned((shape[0], heads, shape[2]), dtype)
    copy_heads(m.put(source, dtype), target)
    return source, m.get(target)


def check_heads(m: KernelMemory, shape: tuple[int, int, int], heads: int, dtype: str) -> None:
    source, found = copied_heads(m, shape, heads, dtype)
    both = min(shape[1], heads)
    np.testing.assert_array_equal(found[:, :both], source[:, :both])
    assert (np.ascontiguousarray(found[:, both:]).view(np.uint8) == POISON).all()


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(
    ("shape", "heads"),
    [((3, 16, 576), 64), ((3, 64, 512), 16), ((2, 96, 576), 128), ((5, 7, 3), 7), ((1, 1, 1), 2)],
)
def test_heads_of_rows(
    kernel_memory: KernelMemory, shape: tuple[int, int, int], heads: int, dtype: str
) -> None:
    check_heads(kernel_memory, shape, heads, dtype)
    if kernel_memory.large:
        check_heads(kernel_memory, (2048, *shape[1:]), heads, dtype)


@settings(max_examples=20)
@given(
    shape=st.tuples(st.integers(0, 4), st.integers(1, 5), st.integers(1, 700)),
    heads=st.integers(1, 5),
)
def test_heads_of_any_size(shape: tuple[int, int, int], heads: int) -> None:
    check_heads(open_memory("interpreter"), shape, heads, "float32")


@pytest.mark.parametrize("shape", [(2, 4, 8), (3, 4, 9), (3, 8)])
def test_other_rows_or_widths(kernel_memory: KernelMemory, shape: tuple[int, ...]) -> None:
    from fd_dsa.ops._copy import copy_heads

    source = kernel_memory.poisoned((3, 4, 8), "float32")
    with pytest.raises(ShapeError, match="copy_heads: target"):
        copy_heads(source, kernel_memory.poisoned(shape, "float32"))


def test_rows_to_the_start(kernel_memory: KernelMemory) -> None:
    from fd_dsa.ops._copy import copy_rows

    m = kernel_memory
    source = np.arange(5000, dtype=np.float32).reshape(50, 100)
    target = m.poisoned((60, 100), "float32")
    copy_rows(m.put(source), target)
    found = m.get(target)
    np.testing.assert_array_equal(found[:50], source)
    assert (found[50:].view(np.uint8) == POISON).all()
    with pytest.raises(ShapeError, match="source has 6000 values, allowed are the 5000"):
        copy_rows(target, m.put(source))
