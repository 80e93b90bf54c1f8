"""Dense layers on tensors in device memory: plain Paddle operators, no wait, nothing in place.

The host forms of the same functions lie beside their dispatch in `_linear.py` and `_norm.py`. All
of them are float32.
"""

from __future__ import annotations

from typing import Any

import paddle
from paddle.nn import functional


def linear(x: Any, weight: Any, bias: Any | None) -> Any:
    """x [num_tokens, in] times weight [in, out], plus bias [out]."""
    y = paddle.matmul(x, weight)
    return y if bias is None else y + bias


def head_linear(x: Any, weight: Any) -> Any:
    """[num_tokens, num_heads, out] of x [num_tokens, num_heads, in], weight [heads, in, out]."""
    return paddle.matmul(x.transpose([1, 0, 2]), weight).transpose([1, 0, 2])


def silu_and_mul(gate_up: Any) -> Any:
    """silu(gate) * up of the two halves of the last axis."""
    gate, up = paddle.chunk(gate_up, 2, axis=-1)
    return functional.silu(gate) * up


def rms_norm(x: Any, weight: Any, epsilon: float) -> Any:
    """x * rsqrt(mean(x^2) + epsilon) * weight over the last axis."""
    mean_square = (x * x).mean(axis=-1, keepdim=True)
    return x * paddle.rsqrt(mean_square + epsilon) * weight


def joined(left: Any, right: Any) -> Any:
    """The two side by side along the last axis, contiguous."""
    return paddle.concat([left, right], axis=-1)


def rows_at(x: Any, index: Any) -> Any:
    """Rows `index`, integers [n], of x [num_tokens, width]."""
    return paddle.gather(x, index)


def embedding(ids: Any, weight: Any) -> Any:
    """Rows `ids` [num_tokens] of `weight` [vocab_size, hidden_size]."""
    return functional.embedding(ids, weight)
