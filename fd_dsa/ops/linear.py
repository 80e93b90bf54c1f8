"""GEMMs of activations with parameters, and the operations between two of them.

On a CPU the activations of a step are NumPy arrays; during a GEMM Paddle sees them as tensors over
the same memory. On a device they are tensors there: nothing waits for the device and nothing is
read back, so a step of them can be captured. The first GEMM imports Paddle: the attention serves
tensors of other libraries too.
"""

from __future__ import annotations

from typing import Any, Protocol, TypeVar

import numpy as np

from fd_dsa.ops.arrays import as_numpy, on_device
from fd_dsa.tensor import StepArray

_Linear = TypeVar("_Linear", bound="Linear")


class Linear(Protocol):
    """Weight of a GEMM, or a weight for each head: HostMatrix or DeviceMatrix."""

    def times(self, x: StepArray) -> StepArray:
        """Multiply activations x [num_tokens, in] by the weight: [num_tokens, out]."""

    def times_by_head(self, x: StepArray) -> StepArray:
        """Multiply x [num_tokens, heads, in] by the weight of each head: [..., out]."""

    def heads_joined(self: _Linear, x: StepArray, reader: _Linear) -> StepArray:
        """Multiply as `times_by_head`, with the heads of a token side by side.

        Args:
            x: [num_tokens, heads, in].
            reader: weight that multiplies the result, which has a form that suits it.
        """

    def activated(self, gate_up: StepArray) -> StepArray:
        """Return silu(gate) * up of gate_up [num_tokens, 2 * in], in a form that suits `times`."""


def rows_at(x: Any, index: Any) -> Any:
    """Rows `index`, integers [n], of x [num_rows, width]; on a CPU `x` is a NumPy array."""
    if isinstance(x, np.ndarray):
        return x[as_numpy(index)]
    from fd_dsa.ops import dense_kernels

    return dense_kernels.rows_at(x, index)


def linear(x: StepArray, weight: Linear, bias: StepArray | None = None) -> StepArray:
    """Multiply x [num_tokens, in] by a weight and add a bias [out]: [num_tokens, out]."""
    y = weight.times(x)
    return y if bias is None else added(y, bias)


def joined(left: Any, right: Any) -> Any:
    """The two side by side along the last axis, contiguous; each may be a view."""
    if on_device(left):
        import paddle

        return paddle.concat([left, right], axis=-1)
    return np.concatenate([as_numpy(left), as_numpy(right)], axis=-1)


def values_of(x: Any) -> Any:
    """Activations without the quantised form that a norm on a device may give beside them."""
    return getattr(x, "plain", x)


def added(x: Any, y: Any) -> Any:
    """x + y; on a CPU in the memory of `x`."""
    if isinstance(x, np.ndarray):
        x += y
        return x
    return x + y
