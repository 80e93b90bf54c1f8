"""The sampler's rules written plainly, one row at a time, in float64."""

from __future__ import annotations

import numpy as np


def ref_distribution(
    logits: np.ndarray, temperature: float, top_k: int, top_p: float
) -> np.ndarray:
    """Probability of every token; float64 [vocab_size]."""
    order = sorted(range(len(logits)), key=lambda i: (-logits[i], i))
    weights = np.exp((logits.astype(np.float64) - logits.max()) / temperature)
    if 0 < top_k < len(logits):
        order = order[:top_k]
    total = sum(weights[i] for i in order)
    kept = []
    mass = 0.0
    for i in order:
        kept.append(i)
        mass += weights[i]
        if top_p < 1 and mass >= top_p * total:
            break
    probabilities = np.zeros(len(logits))
    probabilities[kept] = weights[kept] / weights[kept].sum()
    return probabilities


def ref_uniform(seed: int, position: int) -> float:
    """SplitMix64 in Python integers: element `position` of the stream named by `seed`."""
    mask = 2**64 - 1

    def mix(state: int) -> int:
        state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 & mask
        state = (state ^ (state >> 27)) * 0x94D049BB133111EB & mask
        return state ^ (state >> 31)

    step = (position + 1) * 0x9E3779B97F4A7C15 & mask
    return (mix((mix(seed & mask) + step) & mask) >> 11) / 2**53


def ref_token(probabilities: np.ndarray, uniform: float) -> tuple[int, float]:
    """Drawn token in the order of ids, and how near the draw was to a neighbour."""
    ends = np.cumsum(probabilities)
    token = int(np.searchsorted(ends, uniform * ends[-1], side="right"))
    return token, float(np.abs(ends - uniform * ends[-1]).min())
