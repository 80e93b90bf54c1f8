"""The memories give back what was put in, and what nothing wrote shows."""

from __future__ import annotations

import numpy as np
import pytest

from tests.kernel_memory import POISON, SIGNALLING_NAN, KernelMemory


@pytest.mark.parametrize("dtype", ["float32", "float64", "int32", "int64", "int16", "uint8"])
def test_values_are_copied_and_return(kernel_memory: KernelMemory, dtype: str) -> None:
    for shape in ((3, 5), (1,), (0, 7)):
        array = np.arange(np.prod(shape)).reshape(shape).astype("int64")
        tensor = kernel_memory.put(array, dtype)
        expected = array.astype(dtype)
        array[:] = 1
        found = kernel_memory.get(tensor)
        assert found.dtype == expected.dtype
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(("dtype", "bits"), [("bfloat16", "uint16"), ("float8_e4m3fn", "uint8")])
def test_narrow_floats_pass_by_bits(kernel_memory: KernelMemory, dtype: str, bits: str) -> None:
    # NaNs, infinities and negative zero among them
    array = np.arange(65536 if bits == "uint16" else 256, dtype=bits)
    tensor = kernel_memory.put(array, dtype)
    assert str(tensor.dtype).endswith(dtype)
    found = kernel_memory.get(tensor)
    assert found.dtype == bits
    np.testing.assert_array_equal(found, array)


def test_a_slice_returns_its_own_values(kernel_memory: KernelMemory) -> None:
    bits = np.arange(12, dtype=np.uint16).reshape(3, 4)
    found = kernel_memory.get(kernel_memory.put(bits, "bfloat16")[:, 1:3])
    np.testing.assert_array_equal(found, bits[:, 1:3])


@pytest.mark.parametrize("dtype", ["bfloat16", "float8_e4m3fn", "float32", "int64", "uint8"])
def test_every_byte_is_poisoned(kernel_memory: KernelMemory, dtype: str) -> None:
    tensor = kernel_memory.poisoned((3, 2), dtype)
    assert str(tensor.dtype).endswith(dtype) and list(tensor.shape) == [3, 2]
    assert set(kernel_memory.get(tensor).tobytes()) == {POISON}


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "int64", "uint8"])
def test_results_that_nothing_wrote_hold_signalling_nans(dtype: str) -> None:
    paddle = pytest.importorskip("paddle", reason="the results are Paddle's tensors")
    tensor = paddle.empty([3, 5], dtype, device=paddle.CPUPlace())
    found = tensor.view("uint8").numpy().tobytes()
    assert found == (SIGNALLING_NAN * len(found))[: len(found)]
    assert paddle.empty([0, 5], dtype, device=paddle.CPUPlace()).shape == [0, 5]
