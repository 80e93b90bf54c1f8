"""Matrix products of activations with parameters.

On a CPU the activations of a step are NumPy arrays; Paddle sees them as tensors of the same
memory for the length of a product.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import paddle

from fd_dsa.ops._host import as_numpy, staged


def linear(x: np.ndarray, weight: Any, bias: np.ndarray | None = None) -> np.ndarray:
    """x [num_tokens, in] times weight [in, out], plus bias [out]; float32 [num_tokens, out]."""
    y = as_numpy(paddle.matmul(staged(x), weight))
    if bias is not None:
        y += bias
    return y


def head_linear(x: np.ndarray, weight: Any) -> np.ndarray:
    """Each head's own product: x [num_heads, num_tokens, in] times weight [num_heads, in, out].

    `x` may be a view. The result is float32 [num_heads, num_tokens, out].
    """
    return as_numpy(paddle.matmul(staged(x), weight))


def silu_and_mul(gate_up: np.ndarray) -> np.ndarray:
    """silu(gate) * up of float32 [num_tokens, 2 * width] whose halves are gate and up."""
    width = gate_up.shape[1] // 2
    gate = gate_up[:, :width]
    # exp(-x) may overflow to inf for very negative x: x / inf is the right 0
    with np.errstate(over="ignore"):
        activated = np.exp(-gate)
    activated += np.float32(1.0)
    np.divide(gate, activated, out=activated)
    activated *= gate_up[:, width:]
    return activated
