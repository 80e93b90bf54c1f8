"""The dense operators between GEMMs: the device's against the host's, norms against the formula."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

pytest.importorskip("paddle", reason="the operators are on Paddle's tensors")

import paddle

from fd_dsa.device.host_tensor import as_tensor
from fd_dsa.ops import dense_kernels as dense
from fd_dsa.ops.arrays import rows_at, values_of
from fd_dsa.ops.device_matrix import DeviceMatrix
from fd_dsa.ops.head_gemm import join_columns
from fd_dsa.ops.host_gemm import HostMatrix
from fd_dsa.ops.host_rows import layer_norm, rms_norm
from fd_dsa.tensor import Normed
from tests.kernel_memory import KernelMemory
from tests.ops import block_fp8
from tests.reference.indexer import ref_layer_norm, ref_rms_norm

TOLERANCE = 1e-6
EPSILON = 1e-6
DTYPES = ["float32", "bfloat16"]


def floats(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)


def close(found: Any, wanted: np.ndarray) -> None:
    assert list(found.shape) == list(wanted.shape) and found.dtype == paddle.float32
    bound = TOLERANCE * max(1.0, float(np.abs(wanted).max(initial=0)))
    np.testing.assert_allclose(found.numpy(), wanted, rtol=0, atol=bound)


@pytest.mark.parametrize("num_tokens", [1, 7])
def test_products(paddle_memory: KernelMemory, num_tokens: int) -> None:
    m, x, stored = paddle_memory, floats(num_tokens, 6), floats(4, 6)
    weight, on_host = DeviceMatrix(m.put(stored)), HostMatrix(as_tensor(stored), transposed=True)
    close(weight.matmul(m.put(x)), on_host.matmul(x))
    by_head, weights = floats(num_tokens, 3, 6), floats(3, 6, 5)
    found = DeviceMatrix(m.put(weights)).matmul_by_head(m.put(by_head))
    close(found, HostMatrix(as_tensor(weights)).matmul_by_head(by_head))


@pytest.mark.parametrize("epsilon", [1e-6, 1e-2])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
def test_norms_on_a_cpu(epsilon: float, scale: float) -> None:
    x = scale * floats(5, 33) + np.float32(2 * scale)
    x[4] = 0
    (weight, bias), before = floats(2, 33), x.copy()
    for rows in (x, np.concatenate([x, x], axis=1)[:, 33:]):
        wanted = [ref_rms_norm(row, weight, epsilon) for row in x]
        np.testing.assert_allclose(rms_norm(rows, weight, epsilon), wanted, rtol=1e-5, atol=1e-6)
        wanted = [ref_layer_norm(row, weight, bias, epsilon) for row in x]
        found = layer_norm(rows, weight, bias, epsilon)
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)
    # a row of zeros stays zero
    assert (found[4] == bias).all()
    np.testing.assert_array_equal(x, before)


@pytest.mark.parametrize("shape", [(4, 6), (0, 6), (3, 1), (2, 1025), (5, 2049)])
def test_norms_of_column_slices(paddle_memory: KernelMemory, shape: tuple[int, int]) -> None:
    x, weight = 5 * floats(shape[0], shape[1] + 3), floats(shape[1])
    put, columns = paddle_memory.put, shape[1]
    _, found = dense.rms_norm(put(x)[:, :columns], None, put(weight), 1e-5)
    close(found, rms_norm(x[:, : shape[1]], weight, 1e-5))


@pytest.mark.parametrize("shape", [(9, 4), (9, 3, 700), (9, 0)])
@pytest.mark.parametrize("dtype", ["int32", "int64"])
def test_rows(paddle_memory: KernelMemory, dtype: str, shape: tuple[int, ...]) -> None:
    weight, ids = floats(*shape), np.array([8, 0, 3, 3], dtype)
    tensors = paddle_memory.put(weight), paddle_memory.put(ids)
    close(rows_at(*tensors), rows_at(weight, ids))


@pytest.mark.parametrize("shape", [(1, 2, 3), (3, 2, 1500), (2, 0, 4), (2, 3, 0)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_parts_of_rows_side_by_side(
    paddle_memory: KernelMemory, dtype: str, shape: tuple[int, ...]
) -> None:
    m, parts = paddle_memory, block_fp8.rounded(floats(*shape), dtype)
    count, rows, width = shape
    out = m.poisoned((rows, count * width), "float32")
    found = join_columns(block_fp8.put(m, parts, dtype), out)
    assert found is out
    np.testing.assert_array_equal(m.get(out), np.concatenate([*parts], 1))


@pytest.mark.parametrize("shape", [(0, 6), (6, 10), (1, 2 * 1500)])
def test_silu(paddle_memory: KernelMemory, shape: tuple[int, int]) -> None:
    x = floats(*shape)
    x.flat[:4] = np.float32([-300, 0, 300, -1])[: x.size]
    close(dense.silu_and_mul(paddle_memory.put(x)), HostMatrix.activated(x.copy()))


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_that_a_table_has_not_are_zeros(paddle_memory: KernelMemory, dtype: str) -> None:
    m, values = paddle_memory, block_fp8.rounded(floats(3, 1100), dtype)
    index = m.put(np.array([2, -1, 3, 2**40], np.int64))
    found = rows_at(block_fp8.put(m, values, dtype), index)
    assert str(found.dtype).endswith(dtype)
    found = block_fp8.get(m, found)
    np.testing.assert_array_equal(found[0], values[2])
    assert not found[1:].any()


def test_rows_that_a_table_has_not_may_have_another_value(paddle_memory: KernelMemory) -> None:
    m, table = paddle_memory, np.arange(8, dtype=np.int32).reshape(2, 4)
    found = dense.rows_at(m.put(table), m.put(np.array([1, -1, 2], np.int32)), missing=-1)
    np.testing.assert_array_equal(m.get(found), [[4, 5, 6, 7], [-1] * 4, [-1] * 4])


def rms(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """float64 rms_norm with EPSILON."""
    x = x.astype(np.float64)
    return x / np.sqrt((x * x).mean(axis=1, keepdims=True) + EPSILON) * weight


def near(m: KernelMemory, found: Any, wanted: np.ndarray, dtype: str) -> np.ndarray:
    """Assert the values of float64 to a step of their type, and return them."""
    assert list(found.shape) == list(wanted.shape) and str(found.dtype).endswith(dtype)
    values = block_fp8.get(m, found)
    step = 2.0**-8 if dtype == "bfloat16" else 4e-6
    np.testing.assert_allclose(values, wanted, rtol=step, atol=1e-30)
    return values


# rows of a part of a group, of whole groups, of three quarters of a block of 1,024 and past it
@pytest.mark.parametrize("width", [24, 256, 700, 1300])
@pytest.mark.parametrize("round_scales", [None, False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_sum_norm_and_codes(
    paddle_memory: KernelMemory, width: int, round_scales: bool | None, dtype: str
) -> None:
    m, weight = paddle_memory, floats(width)
    hidden, delta = (block_fp8.rounded(floats(5, width, seed=i), dtype) for i in range(2))
    hidden[1], delta[1] = 1e-9, 2e-9
    hidden[2], delta[2] = 0, 0
    hidden, delta = block_fp8.rounded(hidden, dtype), block_fp8.rounded(delta, dtype)
    put = block_fp8.put(m, hidden, dtype), block_fp8.put(m, delta, dtype)
    total, made = dense.rms_norm(*put, m.put(weight), EPSILON, round_scales)
    # the sum of two is exact before it is rounded to the type
    wanted = block_fp8.rounded(hidden + delta, dtype)
    np.testing.assert_array_equal(block_fp8.get(m, total), wanted)
    values = near(m, values_of(made), rms(wanted, weight), dtype)
    none, alone = dense.rms_norm(total, None, m.put(weight), EPSILON, round_scales)
    assert none is None
    np.testing.assert_array_equal(block_fp8.get(m, values_of(alone)), values)
    for normed in (made, alone):
        assert isinstance(normed, Normed) == (round_scales is not None)
        if isinstance(normed, Normed):
            block_fp8.check_quantized(m, normed.fp8, values, round_scales)


@pytest.mark.parametrize("width", [5, 384, 1300])
@pytest.mark.parametrize("dtype", DTYPES)
def test_silu_and_codes(paddle_memory: KernelMemory, width: int, dtype: str) -> None:
    m, gate_up = paddle_memory, block_fp8.rounded(3 * floats(5, 2 * width), dtype)
    gate_up[3] = 0
    put = block_fp8.put(m, gate_up, dtype)
    gate, up = gate_up[:, :width].astype(np.float64), gate_up[:, width:]
    values = near(m, dense.silu_and_mul(put), gate / (1 + np.exp(-gate)) * up, dtype)
    for round_scales in (False, True):
        quantized = dense.silu_and_mul(put, round_scales)
        block_fp8.check_quantized(m, quantized, values, round_scales)


# an infinite scale: the interpreter divides infinity by it
@pytest.mark.filterwarnings("ignore:invalid value encountered in divide:RuntimeWarning")
@pytest.mark.parametrize("round_scales", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_codes_of_rows(paddle_memory: KernelMemory, round_scales: bool, dtype: str) -> None:
    m, x = paddle_memory, floats(9, 1300)
    # groups of every size: tiny ones, zeros, one large value, and scales that are powers of two
    x *= np.float32(2.0) ** np.arange(-120, 132, 28, dtype=np.float32)[:, None]
    x[4, :128], x[4, 128:256], x[5, 7] = 0, 448, 1e4
    x[6, 300], x[7, 1299] = np.nan, -np.inf
    x = block_fp8.rounded(x, dtype)
    found = dense.quantize_rows(block_fp8.put(m, x, dtype), round_scales)
    block_fp8.check_quantized(m, found, x, round_scales)


@pytest.mark.parametrize("rows", [0, 8, 13])
def test_scales_are_padded_for_cublaslt(paddle_memory: KernelMemory, rows: int) -> None:
    found = dense.quantize_rows(paddle_memory.put(floats(rows, 130)), False)
    assert list(found.codes.shape) == [rows, 130]
    assert list(found.scales.shape) == [2, {0: 8, 8: 8, 13: 16}[rows]]
