"""The dense operators between GEMMs: the device's against the host's, norms against the formula."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

pytest.importorskip("paddle", reason="the operators are on Paddle's tensors")

import paddle

from fd_dsa.ops._linear import head_linear, joined, linear, rows_at, silu_and_mul
from fd_dsa.ops._norm import layer_norm, rms_norm
from fd_dsa.step.host_tensor import as_tensor
from tests.kernel_memory import KernelMemory
from tests.reference.indexer import ref_layer_norm, ref_rms_norm

TOLERANCE = 1e-6


@pytest.fixture(autouse=True)
def every_tensor_is_on_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter's too; NumPy arrays are the host's."""
    for module in ("_linear", "_norm"):
        name = f"fd_dsa.ops.{module}.on_device"
        monkeypatch.setattr(name, lambda array: not isinstance(array, np.ndarray))


def floats(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)


def close(found: Any, wanted: np.ndarray) -> None:
    assert list(found.shape) == list(wanted.shape) and found.dtype == paddle.float32
    bound = TOLERANCE * max(1.0, float(np.abs(wanted).max(initial=0)))
    np.testing.assert_allclose(found.numpy(), wanted, rtol=0, atol=bound)


@pytest.mark.parametrize("num_tokens", [1, 7])
def test_products(paddle_memory: KernelMemory, num_tokens: int) -> None:
    m, x, weight, bias = paddle_memory, floats(num_tokens, 6), floats(6, 4), floats(4)
    on_host = as_tensor(weight)
    close(linear(m.put(x), m.put(weight), None), linear(x, on_host))
    found = linear(m.put(x), m.put(weight), m.put(bias))
    close(found, linear(x, on_host, bias))
    found = linear(m.put(x), m.put(np.ascontiguousarray(weight.T)), None, transpose_y=True)
    close(found, linear(x, on_host))
    by_head, weights = floats(num_tokens, 3, 6), floats(3, 6, 5)
    found = head_linear(m.put(by_head), m.put(weights))
    close(found, head_linear(by_head, as_tensor(weights)))


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
    found = rms_norm(paddle_memory.put(x)[:, : shape[1]], paddle_memory.put(weight), 1e-5)
    close(found, rms_norm(x[:, : shape[1]], weight, 1e-5))


@pytest.mark.parametrize("dtype", ["int32", "int64"])
def test_rows(paddle_memory: KernelMemory, dtype: str) -> None:
    weight, ids = floats(9, 4), np.array([8, 0, 3, 3], dtype)
    tensors = paddle_memory.put(weight), paddle_memory.put(ids)
    close(rows_at(*tensors), rows_at(weight, ids))


@pytest.mark.parametrize("shape", [(0, 6), (2, 3, 10), (1, 2 * 1500)])
def test_silu(paddle_memory: KernelMemory, shape: tuple[int, ...]) -> None:
    x = floats(*shape)
    x.flat[:4] = np.float32([-300, 0, 300, -1])[: x.size]
    found = silu_and_mul(paddle_memory.put(x))
    assert list(found.shape) == [*shape[:-1], shape[-1] // 2]
    flat = silu_and_mul(x.reshape(-1, shape[-1]))
    close(found, flat.reshape(*shape[:-1], shape[-1] // 2))


def test_rows_that_a_table_has_not_are_zeros(paddle_memory: KernelMemory) -> None:
    table = paddle_memory.put(floats(3, 1100))
    index = paddle_memory.put(np.array([2, -1, 3, 2**40], np.int64))
    found = rows_at(table, index).numpy()
    np.testing.assert_array_equal(found[0], table.numpy()[2])
    assert not found[1:].any()


def test_parts_side_by_side(paddle_memory: KernelMemory) -> None:
    left, right = floats(4, 2, 3), floats(2, 4, 5).transpose(1, 0, 2)
    found = joined(paddle_memory.put(left), paddle_memory.put(right))
    close(found, joined(left, right))
