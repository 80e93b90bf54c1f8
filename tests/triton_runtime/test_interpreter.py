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
import triton.runtime.interpreter as triton_interpreter

try:
    import paddle
except ImportError:
    paddle = None

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [
    pytest.mark.triton,
    pytest.mark.skipif(not INTERPRETING, reason="kernels are compiled in this process"),
    pytest.mark.skipif(paddle is None, reason="not installed: paddle"),
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


@paddle_jit
def many_calls_kernel(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    x = tl.load(x_ptr + tl.arange(0, BLOCK))
    total = tl.zeros((BLOCK,), tl.float32)
    for _ in range(n):
        total += x / tl.sum(x, axis=0)
    tl.store(out_ptr + tl.arange(0, BLOCK), total)


def _added(n: int) -> tuple[np.ndarray, paddle.Tensor, paddle.Tensor, paddle.Tensor]:
    """The expected sum, two operands and an output full of NaN."""
    x, y = np.arange(n, dtype=np.float32), np.full(n, 0.5, np.float32)
    out = paddle.to_tensor(np.full(n, np.nan, np.float32))
    return x + y, paddle.to_tensor(x), paddle.to_tensor(y), out


@pytest.mark.parametrize("n", [1, 63, 64, 65])
def test_launch(n: int) -> None:
    expected, x, y, out = _added(n)
    add_kernel[(triton.cdiv(n, 64),)](x, y, out, n, BLOCK=64, num_warps=2)
    np.testing.assert_array_equal(out.numpy(), expected)


def test_grid_from_the_arguments() -> None:
    expected, x, y, out = _added(100)
    add_kernel[lambda meta: (triton.cdiv(meta["n"], meta["BLOCK"]),)](x, y, out, 100, BLOCK=16)
    np.testing.assert_array_equal(out.numpy(), expected)


def test_numpy_scalars_and_views() -> None:
    expected, x, y, out = _added(70)
    add_kernel[(1,)](x[6:], y[6:], out[6:], np.int64(64), 64)
    np.testing.assert_array_equal(out.numpy()[6:], expected[6:])
    assert np.isnan(out.numpy()[:6]).all()


@pytest.mark.parametrize("n", [1, 40, 64])
def test_range_with_a_run_time_bound(n: int) -> None:
    x = np.arange(n, dtype=np.float32)
    out = paddle.zeros([1])
    sum_kernel[(1,)](paddle.to_tensor(x), out, n, BLOCK=16)
    assert out.item() == x.sum()


def test_a_launch_prepares_the_language_once(monkeypatch: pytest.MonkeyPatch) -> None:
    original = triton_interpreter._patch_builtin
    packages: list[object] = []

    def patch_builtin(package: object, *rest: object) -> None:
        packages.append(package)
        original(package, *rest)

    monkeypatch.setattr(triton_interpreter, "_patch_builtin", patch_builtin)
    x, out, counts = np.arange(1, 9, dtype=np.float32), paddle.zeros([8]), []
    # the first launch rewrites the functions that it calls
    for n in (2, 1, 9):
        packages.clear()
        many_calls_kernel[(2,)](paddle.to_tensor(x), out, n, BLOCK=8)
        np.testing.assert_allclose(out.numpy(), n * x / x.sum(), rtol=1e-6)
        counts.append(len(packages))
    assert counts[1] == counts[2] > 0


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
    launch.exchange(out_ptr=other)
    launch()
    np.testing.assert_array_equal(other.numpy(), expected)


def test_a_bound_launch_refuses_what_a_compiled_one_does() -> None:
    expected, x, y, out = _added(64)
    launch = add_kernel.bind((1,), x, y, out, 64, BLOCK=64, scalars=("n",))
    for wrong in (1.5, 1 << 40, "64"):
        with pytest.raises(LaunchError, match=r"does not fit the scalar 'n'.*i32"):
            launch(wrong)
    other = paddle.zeros([64])
    for name, tensor, said in (
        ("x_ptr", x.astype("int32"), r"'x_ptr' is \*i32, bound is \*fp32"),
        ("x_ptr", paddle.ones([8, 8]).T, "'x_ptr' of shape .* not contiguous"),
        ("n", x, "no tensor is bound to 'n'"),
    ):
        with pytest.raises(LaunchError, match=said):
            launch.exchange(out_ptr=other, **{name: tensor})
    # all or none
    launch()
    np.testing.assert_array_equal(out.numpy(), expected)
    np.testing.assert_array_equal(other.numpy(), 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_warps": 3}, "option num_warps is 3, .* powers of two from 1 to 32"),
        ({"num_warps": "4"}, "option num_warps is '4'"),
        ({"num_ctas": 32}, "option num_ctas is 32"),
        ({"BLOCK": [8]}, "argument 'BLOCK' is a list, but it is compiled in"),
        ({"BLOCK": lambda: paddle.ones([8])}, "argument 'BLOCK' is a Tensor"),
        ({"n": None, "m": 3}, "add_kernel: unknown argument 'm'"),
        ({"n": "many"}, "argument 'n' is a str"),
        ({"x_ptr": lambda: paddle.ones([8], "complex64")}, "'x_ptr' has dtype complex64"),
        ({"x_ptr": lambda: paddle.ones([8, 8]).T}, "'x_ptr' of shape .* not contiguous"),
        ({"y_ptr": np.ones(8, np.float32)}, "argument 'y_ptr' is a ndarray"),
    ],
)
def test_refusals(change: dict, message: str) -> None:
    _, x, y, out = _added(8)
    change = {name: value() if callable(value) else value for name, value in change.items()}
    arguments = {"x_ptr": x, "y_ptr": y, "out_ptr": out, "n": 8, "BLOCK": 8} | change
    with pytest.raises(LaunchError, match=message):
        add_kernel[(1,)](**arguments)


def test_missing_and_repeated_arguments() -> None:
    _, x, y, out = _added(8)
    with pytest.raises(LaunchError, match="add_kernel: argument 'n' is missing"):
        add_kernel[(1,)](x, y, out, BLOCK=8)
    with pytest.raises(LaunchError, match="'x_ptr' is given twice"):
        add_kernel[(1,)](x, y, out, 8, 8, x_ptr=x)
    with pytest.raises(LaunchError, match="wanted one to three numbers"):
        add_kernel[(1, 1, 1, 1)](x, y, out, 8, 8)


def _run(code: str) -> str:
    """Output of a fresh process."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_torch_is_not_needed() -> None:
    # Triton itself asks for it where it is installed
    code = """
import sys
class NoTorch:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "torch":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, NoTorch())
from tests.triton_runtime.test_interpreter import test_launch
test_launch(65)
print("launched")
"""
    assert _run(code).split()[-1] == "launched"


def test_triton_imported_too_early_is_explained() -> None:
    code = """
import os
os.environ.pop("TRITON_INTERPRET")
import triton
from tests.triton_runtime.test_interpreter import test_launch
try:
    test_launch(65)
except ImportError as error:
    print(error)
"""
    assert "import fd_dsa.triton_runtime first" in _run(code)
    assert issubclass(BackendUnavailable, ImportError)
