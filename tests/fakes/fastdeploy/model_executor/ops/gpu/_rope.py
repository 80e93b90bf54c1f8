"""custom_ops/gpu_ops/fused_rotary_position_encoding.cu."""

from __future__ import annotations

from typing import Any

import numpy as np

from fastdeploy import _counters, _tree
from fastdeploy._arrays import host, writable

from ._checks import check_dtypes


def fused_rotary_position_encoding(
    query: Any,
    key: Any,
    position_ids: Any,
    cos_sin_cache: Any,
    rotary_dim: int,
    is_neox: bool,
) -> None:
    """Rotate the first `rotary_dim` values of each head of both tensors, in place.

    Args:
        query, key: [T, ..., head_dim]; rows past the positions stay.
        position_ids: [T], in the dtype of the tree's position operator.
        cos_sin_cache: [positions, rotary_dim], cos then sin.
        is_neox: pairs are halves apart, else neighbours.
    """
    op = "fused_rotary_position_encoding"
    _counters.launch(op)
    check_dtypes(op, _tree.current().position_dtype, position_ids=position_ids)
    angles = host(cos_sin_cache)[host(position_ids).reshape(-1)]
    cos, sin = np.split(angles.astype(np.float32), 2, axis=-1)
    for tensor in (query, key):
        with writable(tensor) as values:
            _rotate(values, cos, sin, rotary_dim, is_neox)


def _rotate(
    values: np.ndarray, cos: np.ndarray, sin: np.ndarray, rotary_dim: int, is_neox: bool
) -> None:
    if is_neox:
        first, second = slice(0, rotary_dim // 2), slice(rotary_dim // 2, rotary_dim)
    else:
        first, second = slice(0, rotary_dim, 2), slice(1, rotary_dim, 2)
    shape = (len(cos), *[1] * (values.ndim - 2), rotary_dim // 2)
    cos, sin = cos.reshape(shape), sin.reshape(shape)
    rows = values[: len(cos)]
    a, b = rows[..., first].copy(), rows[..., second].copy()
    rows[..., first] = a * cos - b * sin
    rows[..., second] = b * cos + a * sin
