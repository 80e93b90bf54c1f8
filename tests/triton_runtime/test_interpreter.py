"""Kernels run in Triton's interpreter on Paddle CPU tensors, without torch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fd_dsa.errors import BackendUnavailable, LaunchError
from fd_dsa.triton_runtime import INTERPRETING, paddle_jit

import triton
import triton.language as tl

paddle = pytest.importorskip("paddle", reason="the kernels are on Paddle's tensors")

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [
    pytest.mark.triton,
    pytest.mark.skipif(not INTERPRETING, reason="kernels are compiled in this process"),
]


@paddle_jit(do_not_specialize=("n",), contiguous=("x_ptr",))
def add_kernel(x_ptr, y_ptr, out_ptr, n, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < n
    x = tl.load(x_ptr + offsets, mask=mask)
    y = tl.load(y_ptr + offsets, mask=mask)
    tl.store(out_ptr + offsets, x + y, mask=mask)


@paddle_jit
def sum_kernel(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, n, BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        total += tl.load(x_ptr + offsets, mask=offsets < n, other=0.0)
    tl.store(out_ptr, tl.sum(total, axis=0))


@triton.jit
def _matrix(pointer, SIZE: tl.constexpr):
    rows = tl.arange(0, SIZE)
    return pointer + rows[:, None] * SIZE + rows[None, :]


@paddle_jit
def dot_kernel(a_ptr, b_ptr, out_ptr, SIZE: tl.constexpr):
    product = tl.dot(tl.load(_matrix(a_ptr, SIZE)), tl.load(_matrix(b_ptr, SIZE)))
    tl.store(_matrix(out_ptr, SIZE), product)


def _added(n: int) -> tuple[np.ndarray, paddle.Tensor, paddle.Tensor, paddle.Tensor]:
    """The expected sum, two operands and an output full of NaN."""
    x, y = np.arange(n, dtype=np.float32), np.full(n, 0.5, np.float32)
    out = paddle.to_tensor(np.full(n, np.nan, np.float32))
    return x + y, paddle.to_tensor(x), paddle.to_tensor(y), out


@pytest.mark.parametrize("n", [1, 63, 64, 65])
def test_launch(n: int) -> None:
    # the second one by a function that was generated for such arguments
    for _ in range(2):
        expected, x, y, out = _added(n)
        add_kernel[(triton.cdiv(n, 64),)](x, y, out, n, BLOCK=64, num_warps=2)
        np.testing.assert_array_equal(out.numpy(), expected)


def test_numpy_scalars_views_and_a_grid_from_the_arguments() -> None:
    expected, x, y, out = _added(70)
    grid = lambda meta: (triton.cdiv(meta["n"], meta["BLOCK"]),)  # noqa: E731
    add_kernel[grid](x[6:], y[6:], out[6:], np.int64(64), 16)
    np.testing.assert_array_equal(out.numpy()[6:], expected[6:])
    assert np.isnan(out.numpy()[:6]).all()


@pytest.mark.parametrize("n", [1, 40, 64])
def test_range_with_a_run_time_bound(n: int) -> None:
    x = np.arange(n, dtype=np.float32)
    out = paddle.zeros([1])
    sum_kernel[(1,)](paddle.to_tensor(x), out, n, BLOCK=16)
    assert out.item() == x.sum()


def test_bfloat16_product() -> None:
    rng = np.random.default_rng(0)
    a, b = (
        paddle.to_tensor(rng.standard_normal((32, 32)).astype(np.float32)).astype("bfloat16")
        for _ in range(2)
    )
    out = paddle.zeros([32, 32])
    dot_kernel[(1,)](a, b, out, SIZE=32)
    wide = a.astype("float32").numpy() @ b.astype("float32").numpy()
    np.testing.assert_allclose(out.numpy(), wide, atol=1e-5)


def test_bound_launch() -> None:
    expected, x, y, out = _added(64)
    launch = add_kernel.bind((1,), x, y, out, 64, BLOCK=64, scalars=("n",))
    launch(10)
    np.testing.assert_array_equal(out.numpy()[:10], expected[:10])
    assert np.isnan(out.numpy()[10:]).all()
    launch(64, grid=(1,))
    np.testing.assert_array_equal(out.numpy(), expected)
    other = paddle.zeros([64])
    with pytest.raises(LaunchError, match=r"'x_ptr' is \*i32 on device 0, bound is \*fp32"):
        launch.exchange(out_ptr=other, x_ptr=x.astype("int32"))
    launch()
    assert not other.numpy().any()
    launch.exchange(out_ptr=other)
    launch()
    np.testing.assert_array_equal(other.numpy(), expected)


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
def test_sums_that_are_too_large_wrap_as_on_a_device() -> None:
    largest = np.iinfo(np.int32).max
    x, y = (paddle.to_tensor([value], "int32") for value in (largest, 2))
    out = paddle.zeros([1], "int32")
    add_kernel[(1,)](x, y, out, 1, BLOCK=1)
    assert out.tolist() == [-largest]


NO_TORCH = """
import sys
class NoTorch:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "torch":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, NoTorch())
"""
TOO_EARLY = """
import os
os.environ.pop("TRITON_INTERPRET")
import triton
"""


@pytest.mark.parametrize(
    ("before", "line"),
    # Triton itself asks for torch where it is installed
    [(NO_TORCH, "launched"), (TOO_EARLY, "import fd_dsa.triton_runtime first")],
)
def test_processes(before: str, line: str) -> None:
    code = f"""{before}
from tests.triton_runtime.test_interpreter import test_launch
try:
    test_launch(65)
    print("launched")
except ImportError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert line in done.stdout
    assert issubclass(BackendUnavailable, ImportError)
