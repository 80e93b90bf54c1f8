"""RMSNorm and LayerNorm of a packed step on a CPU.

NumPy, not Paddle: the arrays are small, and a Paddle norm starts its thread pool for each of
them, which costs more than the work and far more on a busy machine.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from fd_dsa.ops._host import as_numpy


def rms_norm(x: Any, weight: np.ndarray, epsilon: float) -> np.ndarray:
    """x * rsqrt(mean(x^2) + epsilon) * weight, float32 [num_tokens, width], C-contiguous.

    Args:
        x: float32 [num_tokens, width]; may be a view of a wider row.
        weight: float32 [width].
        epsilon: added to the mean square.
    """
    rows = as_numpy(x)
    mean_square = np.einsum("ij,ij->i", rows, rows) / np.float32(rows.shape[1])
    factor = np.float32(1.0) / np.sqrt(mean_square + np.float32(epsilon))
    out = rows * factor[:, None]
    out *= weight
    return out


def layer_norm(x: Any, weight: np.ndarray, bias: np.ndarray, epsilon: float) -> np.ndarray:
    """(x - mean) * rsqrt(variance + epsilon) * weight + bias, float32 like `x`."""
    rows = as_numpy(x)
    out = rows - rows.mean(axis=1, keepdims=True)
    variance = np.einsum("ij,ij->i", out, out) / np.float32(rows.shape[1])
    out *= (np.float32(1.0) / np.sqrt(variance + np.float32(epsilon)))[:, None]
    out *= weight
    out += bias
    return out
