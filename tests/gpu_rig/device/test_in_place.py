"""In-place operators: what the fallback does to views, and what repairs it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import paddle
import pytest

from tests.gpu_rig import Rig
from tests.gpu_rig.in_place import in_place_repaired
from tests.gpu_rig.session import VARIABLE

pytestmark = pytest.mark.gpu_rig


def set_item(x: Any) -> None:
    x[1] = 9.0


CHANGES: dict[str, Callable[[Any], Any]] = {
    "__setitem__": set_item,
    "fill_": lambda x: x.fill_(2.5),
    "zero_": lambda x: x.zero_(),
    "scale_": lambda x: x.scale_(3.0),
    "clip_": lambda x: x.clip_(1, 2),
    "exp_": lambda x: x.exp_(),
    "masked_fill_": lambda x: x.masked_fill_(x > 2, -1.0),
    "index_add_": lambda x: x.index_add_(paddle.to_tensor([0]), 0, paddle.ones([1, 4])),
    "put_along_axis_": lambda x: x.put_along_axis_(
        paddle.zeros([1, 4], "int64"), paddle.full([1, 4], 7.0), 0
    ),
    "scatter_": lambda x: x.scatter_(paddle.to_tensor([1]), paddle.zeros([1, 4])),
}


def start() -> np.ndarray:
    return np.arange(12, dtype=np.float32).reshape(3, 4) / 4


def on_cpu(change: Callable[[Any], Any]) -> np.ndarray:
    """What the change gives on a CPU."""
    paddle.set_device("cpu")
    x = paddle.to_tensor(start())
    change(x)
    return x.numpy()


@pytest.mark.parametrize("name", CHANGES)
def test_repaired_operators_keep_memory_and_views(rig: Rig, name: str) -> None:
    x = paddle.to_tensor(start())
    view, address = x[1:], x.data_ptr()
    with in_place_repaired():
        CHANGES[name](x)
    assert x.data_ptr() == address
    found, seen = x.numpy(), view.numpy()
    expected = on_cpu(CHANGES[name])
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(seen, expected[1:])


def test_repaired_operators_change_a_slice_of_their_tensor(rig: Rig) -> None:
    x = paddle.to_tensor(start())
    with in_place_repaired():
        x[:, 1:3].fill_(5.0)
    expected = start()
    expected[:, 1:3] = 5
    np.testing.assert_array_equal(x.numpy(), expected)


def test_without_the_repair_a_view_keeps_the_old_values(rig: Rig) -> None:
    # the day this fails, Paddle works in place through its fallback and the repair can go
    x = paddle.to_tensor(start())
    view = x[1:]
    x.exp_()
    np.testing.assert_array_equal(view.numpy(), start()[1:])
    assert not np.array_equal(x.numpy()[1:], start()[1:])


def test_the_repair_ends_with_its_block(rig: Rig) -> None:
    before = paddle.Tensor.fill_
    with in_place_repaired():
        assert paddle.Tensor.fill_ is not before
    assert paddle.Tensor.fill_ is before


def test_copies_from_the_device_and_registered_kernels_work_in_place(rig: Rig) -> None:
    x = paddle.to_tensor(start())
    view, address = x[1:], x.data_ptr()
    x[:, 1:].copy_(paddle.ones([3, 3]), False)
    x.add_(paddle.ones([3, 4]))
    assert x.data_ptr() == address
    expected = start() + 1
    expected[:, 1:] = 2
    np.testing.assert_array_equal(view.numpy(), expected[1:])


COPY_FROM_HOST_INTO_A_STRIDED_VIEW = """
import os
from tests.gpu_rig import load
rig = load(os.environ["FD_DSA_RIG"])
import paddle
x = paddle.zeros([4, 4]).to(rig.place)
source = paddle.ones([4, 2])
print("made", flush=True)
x[:, :2].copy_(source, False)
print("copied", flush=True)
"""


def test_host_copies_into_strided_views_fault_where_memory_is_guarded(rig: Rig) -> None:
    # Paddle follows the device pointer on the host; on a GPU that is a segmentation fault
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", COPY_FROM_HOST_INTO_A_STRIDED_VIEW],
        env=os.environ | {VARIABLE: rig.form},
        capture_output=True,
        text=True,
    )
    assert "made" in done.stdout, done.stderr
    assert ("copied" in done.stdout) == (rig.form == "fake")
    assert (done.returncode != 0) == (rig.form != "fake"), done.stderr
