"""Counter-based random numbers: each is a function of (seed, position) and of nothing else."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

UInt64 = npt.NDArray[np.uint64]

_MASK = 2**64 - 1
_GOLDEN = 0x9E3779B97F4A7C15
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB


def uniforms(seeds: UInt64, positions: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """Uniform numbers in [0, 1), one for each pair.

    u = mix(mix(seed) + (position + 1) * golden) / 2**64, cut to 53 bits.

    Args:
        seeds: uint64 [n].
        positions: int64 [n]; position of the token in its output, from 0.

    Returns:
        float64 [n].

    Source: SplitMix64 (Steele, Lea, Flood 2014); a seed names one of its streams, a position the
    element of the stream.
    """
    steps = (positions.astype(np.uint64) + np.uint64(1)) * np.uint64(_GOLDEN)
    bits = _mix(_mix(seeds) + steps) >> np.uint64(11)
    return bits.astype(np.float64) * 2.0**-53


def derive_seed(engine_seed: int, arrival: int) -> int:
    """Seed in [0, 2**64) of a request that brings none, from its arrival number."""
    base = _mix(np.array([(engine_seed ^ _MIX_1) & _MASK], np.uint64))
    step = np.array([(arrival + 1) * _GOLDEN & _MASK], np.uint64)
    return int(_mix(base + step)[0])


def _mix(state: UInt64) -> UInt64:
    """SplitMix64's output function; arrays of uint64 wrap around silently."""
    state = (state ^ (state >> np.uint64(30))) * np.uint64(_MIX_1)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(_MIX_2)
    return state ^ (state >> np.uint64(31))
