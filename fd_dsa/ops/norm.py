"""RMSNorm and LayerNorm of a packed step in host memory.

On a CPU NumPy, not Paddle: the arrays are small, and a Paddle norm starts its thread pool for each
of them, which costs more than the work and far more on a busy machine.

Sums run in float64 and are rounded to float32 once, so their order does not show: a kernel that
adds in another order gets the same bits.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np

from fd_dsa.ops.arrays import as_numpy
from fd_dsa.tensor import Array

# values that become float64 at a time, and stay in a core's cache
_CHUNK = 1 << 16


class Reducer(Protocol):
    """Ranks that sum their parts of a tensor, such as a group of `distributed`."""

    def all_reduce(self, tensor: Any) -> Any:
        """Return the sum over all ranks, an array of the same kind."""


def rms_norm(x: Array, weight: Array, epsilon: float) -> np.ndarray:
    """x * rsqrt(mean(x^2) + epsilon) * weight, float32 [num_tokens, width], C-contiguous.

    Args:
        x: float32 [num_tokens, width]; may be a view of a wider row.
        weight: float32 [width].
        epsilon: added to the mean square.
    """
    rows = x if isinstance(x, np.ndarray) else as_numpy(x)
    out = rows * inverse_root(rows, epsilon)
    out *= weight
    return out


class HostNorm:
    """RMSNorm of rows in host memory."""

    def __init__(self, weight: np.ndarray, epsilon: float) -> None:
        self.weight, self.epsilon = weight, epsilon

    def of(self, x: np.ndarray) -> np.ndarray:
        """x [num_tokens, width], normed; may be columns of wider rows."""
        return rms_norm(x, self.weight, self.epsilon)

    def after(
        self, hidden_states: np.ndarray, change: np.ndarray, group: Reducer | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """The sum of `hidden_states` and of the ranks' changes, and the sum normed.

        Args:
            change: this rank's part; overwritten.
            group: ranks that share the model; None = one rank.
        """
        if group is not None:
            change = group.all_reduce(change)
        change += hidden_states
        return change, rms_norm(change, self.weight, self.epsilon)


def layer_norm(x: Array, weight: np.ndarray, bias: np.ndarray, epsilon: float) -> np.ndarray:
    """(x - mean) * rsqrt(variance + epsilon) * weight + bias, float32 like `x`."""
    rows = as_numpy(x)
    mean = rows.mean(axis=1, dtype=np.float64, keepdims=True).astype(np.float32)
    out = rows - mean
    out *= inverse_root(out, epsilon)
    out *= weight
    out += bias
    return out


def inverse_root(rows: np.ndarray, epsilon: float) -> np.ndarray:
    """float32 [num_tokens, 1]: 1 / sqrt(mean(x^2) + epsilon)."""
    num_tokens, width = rows.shape
    step = max(1, _CHUNK // width)
    if num_tokens <= step:
        total = _squares(rows)
    else:
        chunks = [_squares(rows[i : i + step]) for i in range(0, num_tokens, step)]
        total = np.concatenate(chunks)
    total /= width
    mean_square = total.astype(np.float32)
    mean_square += np.float32(epsilon)
    return (np.float32(1.0) / np.sqrt(mean_square, out=mean_square))[:, None]


def _squares(rows: np.ndarray) -> np.ndarray:
    """float64 [num_tokens]: the sum of squares of each row."""
    wide = rows.astype(np.float64)
    sums: np.ndarray = np.matmul(wide[:, None], wide[:, :, None])[:, 0, 0]
    return sums
