"""Shapes that interpreted kernels share, and sums of integers that are too large."""

from __future__ import annotations

import numpy as np
import pytest

from fd_dsa.triton_runtime import INTERPRETING, paddle_jit
from fd_dsa.triton_runtime.interpreter import repair

import triton.language as tl

paddle = pytest.importorskip("paddle", reason="the kernels are on Paddle's tensors")
pytestmark = [
    pytest.mark.triton,
    pytest.mark.skipif(not INTERPRETING, reason="kernels are compiled in this process"),
]


@paddle_jit
def shapes_kernel(x_ptr, out_ptr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    row, column = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    x = tl.load(x_ptr + row[:, None] * COLUMNS + column[None, :])
    turned = tl.reshape(tl.trans(x), [ROWS * COLUMNS])
    tl.store(out_ptr + tl.arange(0, ROWS * COLUMNS), turned + tl.max(x))


@paddle_jit
def add_kernel(x_ptr, y_ptr, out_ptr):
    tl.store(out_ptr, tl.load(x_ptr) + tl.load(y_ptr))


@pytest.mark.parametrize("shape", [(1, 1), (1, 8), (8, 1), (2, 4), (4, 2)])
@pytest.mark.parametrize("dtype", ["float32", "int32", "uint8"])
def test_blocks_of_one_size_and_other_shapes(shape: tuple[int, int], dtype: str) -> None:
    x = np.arange(np.prod(shape)).reshape(shape).astype(dtype)
    out = paddle.zeros([x.size], dtype)
    shapes_kernel[(1,)](paddle.to_tensor(x), out, ROWS=shape[0], COLUMNS=shape[1])
    np.testing.assert_array_equal(out.numpy(), (x.T + x.max()).ravel())


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
def test_sums_that_are_too_large_wrap_as_on_a_device() -> None:
    largest = np.iinfo(np.int32).max
    x, y = (paddle.to_tensor([value], "int32") for value in (largest, 2))
    out = paddle.zeros([1], "int32")
    add_kernel[(1,)](x, y, out)
    assert out.tolist() == [-largest]


def test_types_of_one_shape_share_it() -> None:
    repair()
    first, second = tl.block_type(tl.int32, [2, 4]), tl.block_type(tl.int32, (2, 4))
    assert first.shape is second.shape and first == second
    assert first != tl.block_type(tl.int32, [4, 2])
    assert first != tl.block_type(tl.float32, [2, 4])
    one, other = tl.tensor(None, first), tl.tensor(None, second)
    assert one.shape is other.shape and [size.value for size in one.shape] == [2, 4]
    assert one.numel.value == 8 and one.dtype == tl.int32
    assert tl.tensor(None, tl.int32).numel.value == 1


@pytest.mark.parametrize(("shape", "error"), [([], TypeError), ([3], ValueError)])
def test_shapes_that_there_cannot_be_are_refused_every_time(
    shape: list[int], error: type[Exception]
) -> None:
    repair()
    for _ in range(2):
        with pytest.raises(error):
            tl.block_type(tl.int32, shape)
