"""Weights of tokens, exp((logit - largest) / temperature), and where a draw falls among them."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]

BLOCK = 512
"""Tokens of a block: a draw finds its block first, so it needs no running sum over all tokens."""

NEAR = 3e-7
"""Share of the mass: so near to another token the order of float32 sums may decide.

NumPy's pairwise sums are more exact than einsum's and take more than twice as long.
"""


def weigh(logits: Float32, largest: Any, divisor: Any, out: Float32 | None = None) -> Float32:
    """Weights of logits in float32.

    Args:
        logits: float32 [vocab_size] or [n, vocab_size].
        largest: float32, of the row or [n, 1].
        divisor: the temperature, float32 like `largest`; None is 1 and saves a pass.
        out: where the weights go.
    """
    out = np.subtract(logits, largest, out=out)
    if divisor is not None:
        np.divide(out, divisor, out=out)
    return np.exp(out, out=out)


def first_above(ends: Float64, target: float) -> int:
    """First index whose running sum is above the target, so of positive weight.

    Args:
        ends: float64 [n], running sums of weights, the last one positive.
        target: kept below the last sum where rounding brought it there.
    """
    return int(ends.searchsorted(min(target, np.nextafter(ends[-1], 0.0)), "right"))
