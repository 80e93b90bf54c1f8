"""Oracle of the lightning indexer's scores: one loop over heads, in doubles.

Source: DeepSeek-V3.2 paper (arXiv 2512.02556) §2, eq. 1.
"""

from __future__ import annotations

from typing import Any

import numpy as np


def ref_score(q: Any, weights: Any, key: Any) -> float:
    """sum_h weights[h] * max(q[h] . key, 0) of one query [heads, dim] and one key [dim]."""
    total = 0.0
    for head, weight in zip(q, weights, strict=True):
        dot = float(np.asarray(head, np.float64) @ np.asarray(key, np.float64))
        total += float(weight) * max(dot, 0.0)
    return total


def ref_layer_norm(x: Any, weight: Any, bias: Any, epsilon: float) -> np.ndarray:
    """float64: (x - mean) / sqrt(variance + epsilon) * weight + bias of one vector."""
    x = np.asarray(x, np.float64)
    mean = sum(x) / len(x)
    variance = sum((x - mean) ** 2) / len(x)
    return (x - mean) / np.sqrt(variance + epsilon) * weight + bias


def ref_rms_norm(x: Any, weight: Any, epsilon: float) -> np.ndarray:
    """float64: x / sqrt(mean of squares + epsilon) * weight of one vector."""
    x = np.asarray(x, np.float64)
    return x / np.sqrt(sum(x * x) / len(x) + epsilon) * weight
