"""GEMMs on a CPU by NumPy, by oneDNN and by Paddle's operator: shapes, orders, several threads."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import paddle
import pytest

from fd_dsa.errors import ShapeError
from fd_dsa.models.weights import HostWeights
from fd_dsa.ops import host_gemm
from fd_dsa.ops.arrays import staged
from fd_dsa.ops.host_gemm import HostMatrix


def operands(seed: int, *shapes: tuple[int, ...]) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(shape).astype(np.float32) for shape in shapes]


def close(found: Any, wanted: np.ndarray) -> None:
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)


@pytest.fixture(params=["NumPy", "sgemm", "operator"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Select the function of a GEMM: NumPy's (small GEMMs), oneDNN's, or Paddle's operator."""
    if request.param == "operator":
        # of all threads
        monkeypatch.setattr(host_gemm, "load_libraries", lambda: None)
        monkeypatch.setattr(host_gemm, "thread_state", host_gemm.ThreadState())
    elif host_gemm.thread_state.sgemm is None:
        pytest.skip("this Paddle brings no oneDNN")
    if request.param != "NumPy":
        monkeypatch.setattr(host_gemm, "MIN_SGEMM_PRODUCTS", 0)
    return str(request.param)


@pytest.mark.parametrize("rows", [0, 1, 2, 5, 70, 600])
@pytest.mark.parametrize("transposed", [False, True])
def test_a_weight(way: str, rows: int, transposed: bool) -> None:
    x, w = operands(rows, (rows, 24), (24, 10))
    tensor = paddle.to_tensor(np.ascontiguousarray(w.T) if transposed else w)
    weight = HostMatrix(tensor, transposed=transposed)
    wide = np.full((rows, 40), np.nan, np.float32)
    wide[:, 9:33] = x
    for view in (x, wide[:, 9:33], np.asfortranarray(x)):
        found = weight.matmul(view)
        assert found.flags.c_contiguous and found.dtype == np.float32
        close(found, x @ w)
    # a weight that is loaded again is read at the same address
    tensor.set_value(2 * tensor)
    close(weight.matmul(x), 2 * (x @ w))


@pytest.mark.parametrize("rows", [1, 15, 64, 79])
def test_packed_weights(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """After loading, some weights are in another order. The results stay the same."""
    monkeypatch.setattr(host_gemm, "MIN_PACKED_VALUES", 1)
    weights = HostWeights()
    for columns in (192, 24):
        wide, w = operands(rows, (rows, 140), (128, columns))
        matrix = weights.matrix(128, {"name": columns})
        matrix.array[...] = w
        weights.finish()
        with_avx512 = "avx512f" in Path("/proc/cpuinfo").read_text()
        if columns == 192 and with_avx512 and host_gemm.thread_state.sgemm is not None:
            assert (matrix.array == w).mean() < 0.1
        for x in (wide[:, 5:133], wide[:, :128].copy()):
            close(matrix.matmul(x), x @ w)
            close(matrix.matmul(x, np.empty((rows, columns), np.float32)), x @ w)


@pytest.mark.parametrize("rows", [1, 2, 5, 70])
def test_weights_of_heads(way: str, rows: int) -> None:
    wide, w = operands(rows, (rows, 3, 9), (3, 6, 4))
    tensor = paddle.to_tensor(w)
    for x in (wide[:, :, 2:8], wide[:, :, :6].copy()):
        close(HostMatrix(tensor).matmul_by_head(x), np.einsum("nhi,hio->nho", x, w))


@pytest.mark.parametrize(("count", "rows"), [(1, 3), (4, 1), (5, 1), (5, 3)])
@pytest.mark.parametrize("transpose_y", [False, True])
def test_a_batch(way: str, count: int, rows: int, transpose_y: bool) -> None:
    x, y = operands(count, (count, rows, 8), (count, 8, 5))
    stored = np.ascontiguousarray(y.transpose(0, 2, 1)) if transpose_y else y
    close(host_gemm.batched(x, stored, transpose_y=transpose_y), x @ y)


@pytest.mark.parametrize("rows", [1, 3, 600])
def test_results_outlive_later_ones(way: str, rows: int) -> None:
    pairs = [operands(seed, (rows, 128), (128, 8)) for seed in range(4)]
    found = [HostMatrix(paddle.to_tensor(w)).matmul(x) for x, w in pairs]
    for (x, w), y in zip(pairs, found, strict=True):
        close(y, x @ w)


def test_threads(way: str) -> None:
    def work(seed: int) -> None:
        x, w = operands(seed, (9, 32), (32, 16))
        weight = HostMatrix(paddle.to_tensor(w))
        for _ in range(60):
            close(weight.matmul(x), x @ w)
            close(shared.matmul(x), x @ common)

    (common,) = operands(9, (32, 16))
    shared = HostMatrix(paddle.to_tensor(common))
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))


def test_more_shapes_than_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_gemm.thread_state, "sgemm", None)
    weight = HostMatrix(paddle.ones([2, 1]))
    for rows in range(1, 1200):
        assert weight.matmul(np.ones((rows, 2), np.float32)).shape == (rows, 1)
    assert (weight.matmul(np.full((7, 2), 3, np.float32)) == 6).all()


def test_a_staged_tensor_is_a_copy() -> None:
    x = np.zeros((2, 2), np.float32)
    tensor = staged(x)
    x[:] = 1
    assert (tensor.numpy() == 0).all()


def test_weights_of_another_width_are_refused() -> None:
    with pytest.raises(ShapeError, match="x has 5 columns, the weight takes 4"):
        HostMatrix(paddle.ones([4, 2])).matmul(np.ones((1, 5), np.float32))
    with pytest.raises(ShapeError, match=r"\(1, 2, 4\)"):
        HostMatrix(paddle.ones([3, 4, 2])).matmul_by_head(np.ones((1, 2, 4), np.float32))


def test_silu_of_extremes() -> None:
    gate_up = np.array([[-200.0, 0.0, 200.0, 3.0, 3.0, 3.0]], np.float32)
    np.testing.assert_array_equal(HostMatrix.activated(gate_up), [[0.0, 0.0, 600.0]])


# thousands of signals during GEMMs for which oneDNN moves the stack pointer to the heap
SIGNALS = """
import signal, time
import numpy as np
from fd_dsa.ops.host_gemm import batched
x, y = np.ones((1, 32, 512), "f"), np.ones((1, 512, 256), "f")
signal.signal(signal.SIGALRM, lambda *_: None)
batched(x, y)
signal.setitimer(signal.ITIMER_REAL, 3e-4, 3e-4)
memory, end = [], time.monotonic() + 1
while time.monotonic() < end:
    assert (batched(x, y) == 512).all()
    memory = [*memory[-50:], bytearray(1000 + len(memory))]
signal.setitimer(signal.ITIMER_REAL, 0)
"""


def test_signals_during_a_gemm_leave_the_heap_alone() -> None:
    done = subprocess.run(
        [sys.executable, "-c", SIGNALS], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
