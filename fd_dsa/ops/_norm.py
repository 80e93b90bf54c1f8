"""RMSNorm and LayerNorm of a packed step; on a device the RMSNorm is that of `_dense_kernels.py`.

On a CPU NumPy, not Paddle: the arrays are small, and a Paddle norm starts its thread pool for each
of them, which costs more than the work and far more on a busy machine.

Sums run in float64 and are rounded to float32 once, so their order does not show: a kernel that
adds in another order gets the same bits.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from fd_dsa.ops._host import as_numpy, on_device


def rms_norm(x: Any, weight: Any, epsilon: float) -> Any:
    """x * rsqrt(mean(x^2) + epsilon) * weight, float32 [num_tokens, width], C-contiguous.

    Args:
        x: float32 [num_tokens, width]; may be a view of a wider row.
        weight: float32 [width].
        epsilon: added to the mean square.
    """
    if not isinstance(x, np.ndarray) and on_device(x):
        # Paddle only here: the CPU form is the oracle of kernels where Paddle is not installed
        from fd_dsa.ops import _dense_kernels

        return _dense_kernels.rms_norm(x, weight, epsilon)
    rows = x if isinstance(x, np.ndarray) else as_numpy(x)
    out = rows * _inverse_root(rows, epsilon)
    out *= weight
    return out


def layer_norm(x: Any, weight: np.ndarray, bias: np.ndarray, epsilon: float) -> np.ndarray:
    """(x - mean) * rsqrt(variance + epsilon) * weight + bias, float32 like `x`."""
    rows = as_numpy(x)
    mean = rows.mean(axis=1, dtype=np.float64, keepdims=True).astype(np.float32)
    out = rows - mean
    out *= _inverse_root(out, epsilon)
    out *= weight
    out += bias
    return out


def _inverse_root(rows: np.ndarray, epsilon: float) -> np.ndarray:
    """float32 [num_tokens, 1]: 1 / sqrt(mean(x^2) + epsilon)."""
    total = np.einsum("ij,ij->i", rows, rows, dtype=np.float64)
    mean_square = (total / rows.shape[1]).astype(np.float32)
    return (np.float32(1.0) / np.sqrt(mean_square + np.float32(epsilon)))[:, None]
