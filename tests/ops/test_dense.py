"""The device's dense operators, run on CPU tensors, against the host's."""

from __future__ import annotations

import numpy as np
import paddle
import pytest

from fd_dsa.ops import _dense
from fd_dsa.ops._linear import embedding, head_linear, joined, linear, rows_at, silu_and_mul
from fd_dsa.ops._norm import rms_norm

TOLERANCE = 1e-6


def floats(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)


def close(found: paddle.Tensor, wanted: np.ndarray) -> None:
    assert list(found.shape) == list(wanted.shape) and found.dtype == paddle.float32
    bound = TOLERANCE * max(1.0, float(np.abs(wanted).max(initial=0)))
    np.testing.assert_allclose(found.numpy(), wanted, rtol=0, atol=bound)


@pytest.mark.parametrize("num_tokens", [1, 7])
def test_products(num_tokens: int) -> None:
    x, weight, bias = floats(num_tokens, 6), paddle.to_tensor(floats(6, 4)), floats(4)
    close(_dense.linear(paddle.to_tensor(x), weight, None), linear(x, weight))
    found = _dense.linear(paddle.to_tensor(x), weight, paddle.to_tensor(bias))
    close(found, linear(x, weight, bias))
    by_head, weights = floats(num_tokens, 3, 6), paddle.to_tensor(floats(3, 6, 5))
    close(_dense.head_linear(paddle.to_tensor(by_head), weights), head_linear(by_head, weights))


def test_norm_of_a_column_slice() -> None:
    x, weight = 5 * floats(4, 9), floats(6)
    found = _dense.rms_norm(paddle.to_tensor(x)[:, :6], paddle.to_tensor(weight), 1e-6)
    close(found, rms_norm(x[:, :6], weight, 1e-6))


def test_silu() -> None:
    x = np.concatenate([np.float32([[-300, 0, 300, -1]]), floats(1, 4)], axis=1)
    close(_dense.silu_and_mul(paddle.to_tensor(x)), silu_and_mul(x))


@pytest.mark.parametrize("dtype", ["int32", "int64"])
def test_rows(dtype: str) -> None:
    weight, ids = floats(9, 4), np.array([8, 0, 3, 3], dtype)
    tensors = paddle.to_tensor(weight), paddle.to_tensor(ids)
    close(_dense.embedding(tensors[1], tensors[0]), embedding(ids, weight))
    close(_dense.rows_at(*tensors), rows_at(weight, ids))


def test_parts_side_by_side() -> None:
    left, right = floats(4, 2, 3), floats(2, 4, 5).transpose(1, 0, 2)
    found = _dense.joined(paddle.to_tensor(left), paddle.to_tensor(right))
    close(found, joined(left, right))
