"""A tensor on NumPy's memory costs no memory of its own, and ends with it."""

from __future__ import annotations

import resource
import weakref
from pathlib import Path

import numpy as np
import pytest

from fd_dsa.device.host_tensor import as_tensor

CALLS = 100_000


def resident_bytes() -> int:
    """Resident memory of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


@pytest.mark.parametrize("dtype", ["bool", "uint8", "int32", "int64", "float16", "float32"])
@pytest.mark.parametrize("shape", [(), (0, 4), (3,), (2, 3, 4)])
def test_both_see_what_is_written_to_either(dtype: str, shape: tuple[int, ...]) -> None:
    array = np.zeros(shape, dtype)
    tensor = as_tensor(array)
    assert (tuple(tensor.shape), str(tensor.dtype)) == (shape, f"paddle.{dtype}")
    array[...] = 1
    np.testing.assert_array_equal(tensor.numpy(), array)
    np.from_dlpack(tensor)[...] = 0
    assert not array.any()


def test_calls_leave_nothing() -> None:
    array = np.zeros((4, 64), np.float32)
    for _ in range(CALLS // 10):
        as_tensor(array)
    before = resident_bytes()
    for _ in range(CALLS):
        tensor = as_tensor(array)
    assert tuple(tensor.shape) == (4, 64)
    # of from_dlpack each leaves 80 bytes
    assert resident_bytes() - before < 20 * CALLS


def test_memory_is_free_when_its_last_tensor_is() -> None:
    array = np.zeros(1000, np.float32)
    alive = weakref.ref(array)
    tensors = [as_tensor(array.reshape(10, 100)) for _ in range(3)]
    del array
    tensors[0][0, 0] = 5.0
    while tensors:
        assert float(tensors[-1][0, 0]) == 5.0
        del tensors[0]
    assert alive() is None


def test_what_paddle_would_copy_is_refused() -> None:
    with pytest.raises(ValueError, match=r"strides are \(16, 4\).*C-contiguous.*\(3, 2\)"):
        as_tensor(np.zeros((3, 4), np.float32)[:, :2])
