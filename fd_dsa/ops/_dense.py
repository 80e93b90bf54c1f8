"""Dense layers on tensors in device memory: plain Paddle operators, no wait, nothing in place.

The host forms of the same functions lie beside their dispatch in `_linear.py`, `_norm.py` and
`_rope.py`. All of them are float32.
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


def rope(x: Any, cos_sin: Any, *, interleaved: bool) -> Any:
    """`x` [num_tokens, num_heads, rope_dim], rotated; pairs stay where they are."""
    cos, sin = paddle.chunk(cos_sin.unsqueeze(1), 2, axis=-1)
    half = x.shape[-1] // 2
    if interleaved:
        pairs = x.reshape([*x.shape[:-1], half, 2])
        first, second = pairs[..., 0], pairs[..., 1]
    else:
        first, second = x[..., :half], x[..., half:]
    rotated = first * cos - second * sin, second * cos + first * sin
    if interleaved:
        return paddle.stack(rotated, axis=-1).reshape(x.shape)
    return paddle.concat(rotated, axis=-1)


def joined(left: Any, right: Any) -> Any:
    """The two side by side along the last axis, contiguous."""
    return paddle.concat([left, right], axis=-1)


def rows_at(x: Any, index: Any) -> Any:
    """Rows `index`, integers [n], of x [num_tokens, width]."""
    return paddle.gather(x, index)


def embedding(ids: Any, weight: Any) -> Any:
    """Rows `ids` [num_tokens] of `weight` [vocab_size, hidden_size]."""
    return functional.embedding(ids, weight)
