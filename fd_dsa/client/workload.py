"""What a benchmark sends, and when."""

from __future__ import annotations

import math

import numpy as np

# every vocabulary has these, and few have special tokens among them
_LOWEST_ID, _HIGHEST_ID = 100, 1000


def random_prompts(num_prompts: int, length: int, seed: int) -> list[list[int]]:
    """Token ids of `num_prompts` prompts of `length` random tokens each.

    As ids they have the same length for every tokenizer, and no two begin alike, so that a prefix
    cache helps nobody.
    """
    generator = np.random.default_rng(seed)
    drawn = generator.integers(_LOWEST_ID, _HIGHEST_ID, (num_prompts, length))
    return [[int(token) for token in row] for row in drawn]


def start_times(num_prompts: int, request_rate: float, seed: int) -> list[float]:
    """Seconds after the beginning at which each request is sent.

    Args:
        num_prompts: how many.
        request_rate: mean of a Poisson process, requests a second; infinite: all at once.
        seed: of the intervals.
    """
    if math.isinf(request_rate):
        return [0.0] * num_prompts
    generator = np.random.default_rng(seed)
    gaps = generator.exponential(1 / request_rate, num_prompts)
    gaps[0] = 0.0
    return [float(at) for at in np.cumsum(gaps)]
