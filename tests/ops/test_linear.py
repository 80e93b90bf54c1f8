"""Products of staged operands: any shape, any order, several threads."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import paddle
import pytest

from fd_dsa.errors import ShapeError
from fd_dsa.ops import _gemm
from fd_dsa.ops._host import staged
from fd_dsa.ops._linear import head_linear, joined, linear, silu_and_mul


def operands(seed: int, rows: int, width: int, out: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((rows, width)).astype(np.float32)
    return x, rng.standard_normal((width, out)).astype(np.float32)


@pytest.mark.parametrize("rows", [1, 3, 600])
def test_results_outlive_later_products(rows: int) -> None:
    pairs = [operands(seed, rows, 128, 8) for seed in range(4)]
    found = [linear(x, paddle.to_tensor(w)) for x, w in pairs]
    for (x, w), y in zip(pairs, found, strict=True):
        np.testing.assert_allclose(y, x @ w, rtol=1e-4, atol=1e-4)


def test_bias_and_views() -> None:
    x, w = operands(0, 5, 12, 4)
    wide = np.concatenate([x, x], axis=1)
    bias = np.arange(4, dtype=np.float32)
    found = linear(wide[:, 12:], paddle.to_tensor(w), bias)
    np.testing.assert_allclose(found, x @ w + bias, rtol=1e-5, atol=1e-5)


def test_each_head_has_its_own_product() -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((5, 3, 6)).astype(np.float32)
    w = rng.standard_normal((3, 6, 4)).astype(np.float32)
    found = head_linear(x, paddle.to_tensor(w))
    np.testing.assert_allclose(found, np.einsum("nhi,hio->nho", x, w), rtol=1e-5, atol=1e-5)


def test_parts_side_by_side() -> None:
    wide = np.arange(2 * 3 * 4, dtype=np.float32).reshape(2, 3, 4)
    latent, q_pe = wide.transpose(1, 0, 2), 100 + wide[:, :, :2].transpose(1, 0, 2)
    found = joined(latent, paddle.to_tensor(q_pe))
    assert found.flags.c_contiguous and found.shape == (3, 2, 4 + q_pe.shape[2])
    for token in range(3):
        for head in range(2):
            wanted = [*latent[token, head], *q_pe[token, head]]
            assert found[token, head].tolist() == wanted


def test_more_shapes_than_are_kept() -> None:
    weight = paddle.ones([2, 1])
    for rows in range(1, 1200):
        assert linear(np.ones((rows, 2), np.float32), weight).shape == (rows, 1)
    assert (linear(np.full((7, 2), 3, np.float32), weight) == 6).all()


def test_threads_have_operands_of_their_own() -> None:
    def work(seed: int) -> bool:
        x, w = operands(seed, 9, 32, 16)
        weight = paddle.to_tensor(w)
        return all(np.allclose(linear(x, weight), x @ w, atol=1e-4) for _ in range(200))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(4)))


def test_a_staged_tensor_is_a_copy() -> None:
    x = np.zeros((2, 2), np.float32)
    tensor = staged(x)
    x[:] = 1
    assert (tensor.numpy() == 0).all()


def test_silu_of_extremes() -> None:
    gate_up = np.array([[-200.0, 0.0, 200.0, 3.0, 3.0, 3.0]], np.float32)
    np.testing.assert_array_equal(silu_and_mul(gate_up), [[0.0, 0.0, 600.0]])


@pytest.fixture(params=["sgemm", "operator"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Which function serves a GEMM: oneDNN's, or Paddle's operator."""
    if request.param == "operator":
        monkeypatch.setattr(_gemm._thread, "sgemm", None)
    elif _gemm._thread.sgemm is None:
        pytest.skip("this Paddle brings no oneDNN")
    return str(request.param)


@pytest.mark.parametrize("rows", [0, 1, 2, 5, 70])
@pytest.mark.parametrize("transposed", [False, True])
def test_a_bound_weight(way: str, rows: int, transposed: bool) -> None:
    x, w = operands(rows, rows, 24, 10)
    tensor = paddle.to_tensor(np.ascontiguousarray(w.T) if transposed else w)
    weight = _gemm.HostMatrix(tensor, transposed=transposed)
    wide = np.full((rows, 40), np.nan, np.float32)
    wide[:, 9:33] = x
    for view in (x, wide[:, 9:33], np.asfortranarray(x)):
        found = linear(view, weight)
        assert found.flags.c_contiguous and found.dtype == np.float32
        np.testing.assert_allclose(found, x @ w, rtol=1e-5, atol=1e-5)
    # a weight that is loaded again is read at the same address
    tensor.set_value(2 * tensor)
    np.testing.assert_allclose(linear(x, weight), 2 * (x @ w), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rows", [1, 2, 5, 70])
def test_bound_weights_of_heads(way: str, rows: int) -> None:
    rng = np.random.default_rng(rows)
    wide = rng.standard_normal((rows, 3, 9)).astype(np.float32)
    w = rng.standard_normal((3, 6, 4)).astype(np.float32)
    weight = _gemm.HostMatrix(paddle.to_tensor(w))
    for x in (wide[:, :, 2:8], wide[:, :, :6].copy()):
        wanted = np.einsum("nhi,hio->nho", x, w)
        np.testing.assert_allclose(head_linear(x, weight), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("count", [1, 4, 5])
@pytest.mark.parametrize("transpose_y", [False, True])
def test_products_of_a_batch(way: str, count: int, transpose_y: bool) -> None:
    rng = np.random.default_rng(count)
    x = rng.standard_normal((count, 3, 8)).astype(np.float32)
    y = rng.standard_normal((count, 8, 5)).astype(np.float32)
    given = np.ascontiguousarray(y.transpose(0, 2, 1)) if transpose_y else y
    found = _gemm.batched(x, given, transpose_y=transpose_y)
    np.testing.assert_allclose(found, x @ y, rtol=1e-5, atol=1e-5)


def test_a_bound_weight_of_another_width_is_refused() -> None:
    weight = _gemm.HostMatrix(paddle.ones([4, 2]))
    with pytest.raises(ShapeError, match="x has 5 columns, the weight takes 4"):
        weight.times(np.ones((1, 5), np.float32))
    heads = _gemm.HostMatrix(paddle.ones([3, 4, 2]))
    with pytest.raises(ShapeError, match=r"\(1, 2, 4\)"):
        heads.times_by_head(np.ones((1, 2, 4), np.float32))


def test_bound_weights_serve_several_threads() -> None:
    x, w = operands(3, 9, 32, 16)
    weight = _gemm.HostMatrix(paddle.to_tensor(w))
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(lambda _: weight.times(x), range(50)):
            np.testing.assert_allclose(found, x @ w, rtol=1e-4, atol=1e-4)
