"""Walsh-Hadamard rotation of index keys and queries, as in DeepSeek's own inference code."""

from __future__ import annotations

import numpy as np


def hadamard(x: np.ndarray) -> np.ndarray:
    """float32 `x` [..., width] times the orthogonal Hadamard matrix in Sylvester's order.

    Stages m = 1, 2, 4 .. width / 2 replace (u, v), m apart, by (u + v, u - v), then everything
    is multiplied by float32(width ** -0.5); `width` is a power of two.
    """
    width = x.shape[-1]
    out, m = x, 1
    while m < width:
        pairs = out.reshape(*x.shape[:-1], width // (2 * m), 2, m)
        u, v = pairs[..., 0, :], pairs[..., 1, :]
        out = np.stack([u + v, u - v], axis=-2).reshape(x.shape)
        m *= 2
    return out * np.float32(width**-0.5)
