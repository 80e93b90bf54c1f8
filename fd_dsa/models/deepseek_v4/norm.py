"""RMSNorm of DeepSeek-V4 in float32, because no kernel must match its bits."""

from __future__ import annotations

import numpy as np

from fd_dsa.models.weights_protocol import HostOnlyWeights


class RowNorm:
    """RMSNorm of rows with a weight.

    Args:
        name: name of the weight, float32 [width].
        epsilon: added to the mean square.
    """

    def __init__(self, weights: HostOnlyWeights, name: str, width: int, epsilon: float) -> None:
        self._weight, self._epsilon = weights.vector({name: width}, factor=width**0.5), epsilon

    def normalize(self, x: np.ndarray) -> np.ndarray:
        """Normalize x [n, width], which may be columns of wider rows."""
        out = x / length(x, self._epsilon)
        out *= self._weight
        return out


def length(rows: np.ndarray, epsilon: float) -> np.ndarray:
    """Return sqrt(sum of squares + width * epsilon) per row: float32 [n, 1]."""
    squares = np.vecdot(rows, rows)
    squares += np.float32(rows.shape[1] * epsilon)
    return np.sqrt(squares, out=squares)[:, None]
