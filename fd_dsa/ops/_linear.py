"""GEMMs of activations with parameters, and the operations between two of them.

On a CPU the activations of a step are NumPy arrays; during a GEMM Paddle sees them as tensors over
the same memory. On a device they are tensors there: nothing waits for the device and nothing is
read back, so a step of them can be captured. The first GEMM imports Paddle: the attention serves
tensors of other libraries too.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from fd_dsa.ops._gemm import HostMatrix
from fd_dsa.ops._host import as_numpy, matmul, on_device


def rows_at(x: Any, index: Any) -> Any:
    """Rows `index`, integers [n], of x [num_rows, width]; on a CPU `x` is a NumPy array."""
    if isinstance(x, np.ndarray):
        return x[as_numpy(index)]
    from fd_dsa.ops import _dense_kernels

    return _dense_kernels.rows_at(x, index)


def linear(x: Any, weight: Any, bias: Any = None, *, transpose_y: bool = False) -> Any:
    """x [num_tokens, in] times weight [in, out], plus bias [out]; float32 [num_tokens, out].

    With `transpose_y` the weight is [out, in] and is read in that order: it is not copied. On a CPU
    the weight is a HostMatrix, which knows its order, or a contiguous Paddle tensor.
    """
    if not isinstance(weight, HostMatrix):
        if on_device(x):
            product = matmul(x, weight, transpose_y=transpose_y)
            return product if bias is None else product + bias
        weight = HostMatrix(weight, transposed=transpose_y)
    y = weight.times(x)
    if bias is not None:
        y += bias
    return y


def head_linear(x: Any, weight: Any) -> Any:
    """Each head's own product: x [num_tokens, num_heads, in] times weight [num_heads, in, out].

    `x` may be a view. The result is float32 [num_tokens, num_heads, out], and not contiguous.
    """
    if not isinstance(weight, HostMatrix):
        if on_device(x):
            return matmul(x.transpose([1, 0, 2]), weight).transpose([1, 0, 2])
        weight = HostMatrix(weight)
    return weight.times_by_head(x)


def joined(left: Any, right: Any) -> Any:
    """The two side by side along the last axis, contiguous; each may be a view."""
    if on_device(left):
        import paddle

        return paddle.concat([left, right], axis=-1)
    return np.concatenate([as_numpy(left), as_numpy(right)], axis=-1)


def added(x: Any, y: Any) -> Any:
    """x + y; on a CPU in the memory of `x`."""
    if isinstance(x, np.ndarray):
        x += y
        return x
    return x + y


def silu_and_mul(gate_up: Any) -> Any:
    """silu(gate) * up of float32 [num_tokens, 2 * width] whose halves are gate and up."""
    if not isinstance(gate_up, np.ndarray) and on_device(gate_up):
        from fd_dsa.ops import _dense_kernels

        return _dense_kernels.silu_and_mul(gate_up)
    width = gate_up.shape[1] // 2
    gate = gate_up[:, :width]
    # exp(-x) may overflow to inf for very negative x: x / inf is the right 0
    with np.errstate(over="ignore"):
        activated = np.exp(-gate)
    activated += np.float32(1.0)
    np.divide(gate, activated, out=activated)
    activated *= gate_up[:, width:]
    return activated
