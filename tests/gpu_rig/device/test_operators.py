"""Kernels of the plug-in give what Paddle's give on a CPU; other operators go through the host."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import paddle
import paddle.nn.functional as F
import pytest

from tests.gpu_rig import Rig
from tests.gpu_rig.session import VARIABLE

pytestmark = pytest.mark.gpu_rig

X = np.random.default_rng(0).standard_normal((3, 4, 8), dtype=np.float32)
Y = np.random.default_rng(1).standard_normal((3, 4, 8), dtype=np.float32)

# kernels of ours, in strict mode too
REGISTERED: dict[str, Callable[[Any, Any], Any]] = {
    "add": lambda x, y: x + y,
    "add_broadcast": lambda x, y: x[:1] + y[:, :1, :],
    "assign": lambda x, y: paddle.assign(x),
    "clone": lambda x, y: x.clone(),
    "contiguous": lambda x, y: x.transpose([2, 0, 1]).contiguous(),
    "divide": lambda x, y: x / y,
    "full": lambda x, y: paddle.full([2, 3], 0.5),
    "linear": lambda x, y: F.linear(x, y[0].T),
    "matmul": lambda x, y: x[0] @ y[0].T,
    "matmul_batched": lambda x, y: paddle.matmul(x, y, transpose_y=True),
    "matmul_one_left": lambda x, y: paddle.matmul(x[0], y, transpose_y=True),
    "matmul_one_right": lambda x, y: paddle.matmul(x, y[0], transpose_y=True),
    "matmul_transposed": lambda x, y: paddle.matmul(x, y, transpose_x=True),
    "matmul_vector": lambda x, y: paddle.matmul(x, y[0, 0]),
    "multiply": lambda x, y: x * y,
    "silu": lambda x, y: F.silu(x),
    "slice": lambda x, y: x[1:, ::2, 3:].contiguous(),
    "subtract": lambda x, y: x - y,
    "zeros": lambda x, y: paddle.zeros([2, 0, 3]),
}


def on_both(expression: Callable[[Any, Any], Any], place: Any) -> tuple[np.ndarray, np.ndarray]:
    """Return the values of an expression on the device and on a CPU."""
    on_device = expression(paddle.to_tensor(X, place=place), paddle.to_tensor(Y, place=place))
    assert on_device.place.is_custom_place()
    paddle.set_device("cpu")
    on_cpu = expression(paddle.to_tensor(X), paddle.to_tensor(Y))
    return on_device.numpy(), on_cpu.numpy()


@pytest.mark.parametrize("name", REGISTERED)
def test_registered(rig: Rig, name: str) -> None:
    with rig.strict():
        found, expected = on_both(REGISTERED[name], rig.place)
    assert found.shape == expected.shape
    # products sum in another order; 8 terms of order one
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("name", ["add", "multiply", "divide", "silu", "matmul", "assign"])
def test_registered_in_bfloat16(rig: Rig, name: str) -> None:
    narrow = [paddle.to_tensor(a).astype("bfloat16") for a in (X, Y)]
    with rig.strict():
        result = REGISTERED[name](*narrow)
    assert result.dtype == paddle.bfloat16
    paddle.set_device("cpu")
    # the CPU wheel has no bfloat16 kernels: the same values in float32
    exact = REGISTERED[name](*(a.cpu().astype("float32") for a in narrow)).numpy()
    # one rounding to 8 significant bits
    np.testing.assert_allclose(result.astype("float32").numpy(), exact, rtol=2**-8, atol=2**-9)


@pytest.mark.parametrize("dtype", ["bool", "uint8", "int16", "int32", "int64", "float64"])
def test_fill_and_views_of_every_type(rig: Rig, dtype: str) -> None:
    with rig.strict():
        x = paddle.full([4, 6], 1, dtype)
        x[:, ::2].copy_(paddle.zeros([4, 3], dtype), False)
    expected = np.ones((4, 6), dtype)
    expected[:, ::2] = 0
    np.testing.assert_array_equal(x.numpy(), expected)
    np.testing.assert_array_equal(x.T.contiguous().numpy(), expected.T)


def test_matmul_of_batches_that_broadcast_both_ways(rig: Rig) -> None:
    x, y = np.random.default_rng(5).standard_normal((2, 24)).astype(np.float32)
    left, right = x.reshape(2, 1, 3, 4), y.reshape(1, 2, 4, 3)
    x, y = (paddle.to_tensor(array, place=rig.place) for array in (left, right))
    found = paddle.matmul(x, y).numpy()
    np.testing.assert_allclose(found, left @ right, rtol=0, atol=1e-5)


def test_strict_mode_refuses_a_fallback_and_ends(rig: Rig) -> None:
    x = paddle.ones([3])
    with pytest.raises(RuntimeError, match="exp"), rig.strict():
        x.exp()
    np.testing.assert_allclose(x.exp().numpy(), np.exp(np.ones(3)), rtol=1e-6)


def test_float32_products_are_not_rounded_to_tf32(rig: Rig) -> None:
    # 1 + 2^-12 has 13 significant bits, TF32 keeps 11
    x = paddle.full([64, 64], 1 + 2**-12)
    eye = paddle.to_tensor(np.eye(64, dtype=np.float32))
    np.testing.assert_array_equal((x @ eye).numpy(), x.numpy())


def test_copies_and_registered_kernels_work_in_place(rig: Rig) -> None:
    """Operators that fall back leave their result in new memory: views and graphs miss it."""
    start = np.arange(12, dtype=np.float32).reshape(3, 4)
    x = paddle.to_tensor(start)
    view, address = x[1:], x.data_ptr()
    x[:, 1:].copy_(paddle.ones([3, 3]), False)
    x.add_(paddle.ones([3, 4]))
    assert x.data_ptr() == address
    expected = start + 1
    expected[:, 1:] = 2
    np.testing.assert_array_equal(view.numpy(), expected[1:])
    x.exp_()
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
