"""Dense layers on tensors in device memory: Paddle's products, and launches of our own.

Nothing waits for the device and nothing is read back, so a step of them can be captured. The host
forms of the same functions lie beside their dispatch in `_linear.py` and `_norm.py`. All of them
are float32.
"""

from __future__ import annotations

from typing import Any

import paddle

from fd_dsa.ops._dense_kernels import rms_norm, rows_at, silu_and_mul

__all__ = ["embedding", "head_linear", "joined", "linear", "rms_norm", "rows_at", "silu_and_mul"]


def linear(x: Any, weight: Any, bias: Any | None, transpose_y: bool = False) -> Any:
    """x [num_tokens, in] times weight [in, out], or its transpose [out, in], plus bias [out]."""
    y = paddle.matmul(x, weight, transpose_y=transpose_y)
    return y if bias is None else y + bias


def head_linear(x: Any, weight: Any) -> Any:
    """[num_tokens, num_heads, out] of x [num_tokens, num_heads, in], weight [heads, in, out]."""
    return paddle.matmul(x.transpose([1, 0, 2]), weight).transpose([1, 0, 2])


def joined(left: Any, right: Any) -> Any:
    """The two side by side along the last axis, contiguous."""
    return paddle.concat([left, right], axis=-1)


def embedding(ids: Any, weight: Any) -> Any:
    """Rows `ids` [num_tokens] of `weight` [vocab_size, hidden_size]."""
    return rows_at(weight, ids)
