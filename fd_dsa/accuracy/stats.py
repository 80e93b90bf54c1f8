"""What counts of passed prompts allow to say: intervals, tests, smallest visible differences.

Shares and differences are fractions, not percent. Nothing here depends on when or where it runs:
the resampling is seeded, and NumPy keeps the stream of `RandomState` as it is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fd_dsa.errors import ShapeError

CONFIDENCE = 0.95
ALPHA = 1 - CONFIDENCE
POWER = 0.8
RESAMPLES = 10_000
SEED = 0

# elements of one block of resampled indices: 32 MB
_BLOCK_ELEMENTS = 1 << 22
# numbers of flips less likely than this do not change a power that is wanted to three digits
_NEGLIGIBLE = 1e-12


class Estimate(NamedTuple):
    """A share or a difference of shares with its 95 % interval; value is NaN without data."""

    value: float
    low: float
    high: float


def wilson(passed: int, total: int) -> Estimate:
    """A share of independent trials with its Wilson score interval.

    (p + z²/2n ± z sqrt(p(1-p)/n + z²/4n²)) / (1 + z²/n)

    Args:
        passed: 0 to total.
        total: 0 gives NaN in the interval [0, 1].

    Source: Wilson 1927, JASA 22.
    """
    if not 0 <= passed <= total:
        raise ValueError(f"passed: {passed} of {total}; allowed is 0 to {total}")
    if total == 0:
        return Estimate(math.nan, 0.0, 1.0)
    z = _normal_quantile()
    share, scale = passed / total, 1 + z * z / total
    middle = (share + z * z / (2 * total)) / scale
    half = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total)) / scale
    # at 0 and at total the bound is the share itself, but for rounding
    low = 0.0 if passed == 0 else max(0.0, middle - half)
    high = 1.0 if passed == total else min(1.0, middle + half)
    return Estimate(share, low, high)


def two_proportions(before: tuple[int, int], after: tuple[int, int]) -> Estimate:
    """Difference after - before of two independent shares, each given as (passed, total).

    Newcombe's hybrid of the two Wilson intervals: unlike the normal approximation it does not
    shrink to nothing where a share is 0 or 1. Source: Newcombe 1998, Statistics in Medicine 17,
    method 10.
    """
    p, q = wilson(*before), wilson(*after)
    difference = q.value - p.value
    below = math.hypot(q.value - q.low, p.high - p.value)
    above = math.hypot(q.high - q.value, p.value - p.low)
    return Estimate(difference, difference - below, difference + above)


def two_proportions_p(before: tuple[int, int], after: tuple[int, int]) -> float:
    """Two-sided p of the z test that two independent shares are equal, pooled variance."""
    (x, n), (y, m) = before, after
    pooled = (x + y) / (n + m)
    variance = pooled * (1 - pooled) * (1 / n + 1 / m)
    if variance == 0:
        return 1.0
    return 2 * NormalDist().cdf(-abs(y / m - x / n) / math.sqrt(variance))


def mcnemar(worse: int, better: int) -> float:
    """Exact two-sided p that a prompt which flips is as likely to get worse as better.

    min(1, 2 Σ_{i <= min(worse, better)} C(n, i) / 2^n) with n = worse + better, in whole numbers.
    Source: McNemar 1947, Psychometrika 12, in its binomial form.
    """
    if worse < 0 or better < 0:
        raise ValueError(f"flips: {worse} worse, {better} better; neither may be negative")
    flips, term, tail = worse + better, 1, 0
    for i in range(min(worse, better) + 1):
        tail += term
        term = term * (flips - i) // (i + 1)
    return min(1.0, 2 * tail / 2**flips)


def least_one_sided_flips() -> int:
    """Flips, all in one direction, from which on the exact test reaches its level: 6 at 5 %."""
    flips = 1
    while mcnemar(0, flips) > ALPHA:
        flips += 1
    return flips


def most_unseen_share(trials: int) -> float:
    """Largest share of flips that shows none in so many prompts with 5 % probability."""
    return 1 - ALPHA ** (1 / trials) if trials else 1.0


def paired_difference(worse: int, better: int, prompts: int) -> Estimate:
    """Difference after - before of a pass rate on the same prompts, from its flips.

    The shares of both kinds of flips are cells of one multinomial; their Wilson intervals are
    combined with the correlation -sqrt(bw / ((1 - b)(1 - w))) of such cells. Unlike the bootstrap
    it holds with few flips, and with none it is not [0, 0].

    Source: the hybrid of Newcombe 1998, Statistics in Medicine 17 (paired data), in the general
    form of Zou and Donner 2008, Statistics in Medicine 27.
    """
    lost, won = wilson(worse, prompts), wilson(better, prompts)
    if not prompts:
        return Estimate(math.nan, -1.0, 1.0)
    rest = (1 - lost.value) * (1 - won.value)
    related = math.sqrt(lost.value * won.value / rest) if rest else 0.0

    def combined(one: float, other: float) -> float:
        return math.sqrt(one * one + other * other + 2 * related * one * other)

    difference = (better - worse) / prompts
    below = combined(won.value - won.low, lost.high - lost.value)
    above = combined(won.high - won.value, lost.value - lost.low)
    return Estimate(difference, max(-1.0, difference - below), min(1.0, difference + above))


def bootstrap_share(passed: ArrayLike, sizes: ArrayLike) -> Estimate:
    """Share of passed instructions, its interval by resampling whole prompts.

    Instructions of one prompt pass or fail together, so an interval that counts them as
    independent is too narrow. Where no resample can differ (all pass, or none), the interval is
    Wilson's on the number of prompts.

    Args:
        passed: [prompts], passed instructions of each prompt.
        sizes: [prompts], its instructions, at least 1.
    """
    numerator, denominator = _columns(passed, sizes)
    if not len(numerator):
        return Estimate(math.nan, 0.0, 1.0)
    share = float(numerator.sum() / denominator.sum())
    if share in (0.0, 1.0):
        return wilson(len(numerator) if share else 0, len(numerator))
    sums = _resampled_sums(np.stack([numerator, denominator], axis=1))
    return Estimate(share, *_percentiles(sums[:, 0] / sums[:, 1]))


def bootstrap_difference(before: ArrayLike, after: ArrayLike, sizes: ArrayLike) -> Estimate:
    """Difference after - before of two shares of the same prompts, by resampling whole prompts.

    10,000 resamples with a fixed seed, percentiles 2.5 and 97.5. [0, 0] where no prompt differs:
    see `most_unseen_share` for what that proves.

    Args:
        before: [prompts], passed instructions of each prompt.
        after: [prompts], the same prompts in the other run.
        sizes: [prompts], instructions of each prompt, at least 1; all 1 for a prompt-level metric.

    Source: Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapters 8 and 13.
    """
    old, new, size = _columns(before, after, sizes)
    if not len(size):
        return Estimate(math.nan, -1.0, 1.0)
    change = new - old
    sums = _resampled_sums(np.stack([change, size], axis=1))
    return Estimate(float(change.sum() / size.sum()), *_percentiles(sums[:, 0] / sums[:, 1]))


def smallest_difference(prompts: int, flip_rate: float, power: float = POWER) -> float | None:
    """Smallest true difference that a paired run shows with the given power.

    Of `prompts` pairs a share `flip_rate` is expected to flip, (flip_rate + d) / 2 of it to the
    better; "shows" is p <= 0.05 in the exact test of `mcnemar`. The power is computed from the
    binomial distributions themselves, not from a normal approximation, which is too hopeful by
    up to a tenth of a point for 541 prompts.

    Args:
        prompts: at least 1.
        flip_rate: share of prompts whose result differs between the runs, 0 to 1.
        power: wanted probability, below 1.

    Returns:
        d, at most `flip_rate`; None where even flips all in one direction are too few.
    """
    if prompts < 1 or not 0 <= flip_rate <= 1:
        raise ValueError(f"{prompts} prompts, flip rate {flip_rate}; allowed are >= 1 and 0 to 1")
    counts, weights = _flip_counts(prompts, flip_rate)
    limits = [_largest_rejected(flips) for flips in counts]

    def reached(difference: float) -> float:
        better = (1 + difference / flip_rate) / 2
        chances = (_rejects(n, k, better) for n, k in zip(counts, limits, strict=True))
        return sum(w * chance for w, chance in zip(weights, chances, strict=True))

    if flip_rate == 0 or reached(flip_rate) < power:
        return None
    low, high = 0.0, flip_rate
    while high - low > 1e-5:
        middle = (low + high) / 2
        low, high = (low, middle) if reached(middle) >= power else (middle, high)
    return high


def _normal_quantile() -> float:
    """1.96, in full."""
    return NormalDist().inv_cdf(1 - ALPHA / 2)


def _columns(*columns: ArrayLike) -> list[NDArray[np.float64]]:
    """The arrays as float64 of one length; a prompt without instructions is refused."""
    arrays = [np.asarray(column, dtype=np.float64) for column in columns]
    shapes = [array.shape for array in arrays]
    if len(set(shapes)) != 1 or len(shapes[0]) != 1:
        raise ShapeError(f"prompts: columns of shapes {shapes}; all must be [prompts]")
    if (arrays[-1] < 1).any():
        raise ValueError("sizes: a prompt has no instruction; at least 1 each")
    return arrays


def _resampled_sums(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """[RESAMPLES, columns]: sums of [prompts, columns] over prompts drawn with replacement."""
    prompts = len(values)
    # Generator may change its stream in any release of NumPy, this one never does
    random = np.random.RandomState(SEED)
    step = max(1, _BLOCK_ELEMENTS // prompts)
    blocks = []
    for start in range(0, RESAMPLES, step):
        rows = min(step, RESAMPLES - start)
        drawn = random.randint(prompts, size=(rows, prompts), dtype=np.int64)
        drawn += np.arange(rows)[:, None] * prompts
        times = np.bincount(drawn.ravel(), minlength=rows * prompts).reshape(rows, prompts)
        blocks.append(times @ values)
    return np.concatenate(blocks)


def _percentiles(values: NDArray[np.float64]) -> tuple[float, float]:
    """The bounds of the middle 95 %."""
    low, high = np.percentile(values, [50 * ALPHA, 100 - 50 * ALPHA])
    return float(low), float(high)


def _log_binomial(trials: int, share: float) -> NDArray[np.float64]:
    """[trials + 1]: logarithm of the probability of each count."""
    if share in (0.0, 1.0):
        certain = np.full(trials + 1, -np.inf)
        certain[trials if share else 0] = 0.0
        return certain
    factorials = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, trials + 1)))])
    counts = np.arange(trials + 1)
    ways = factorials[-1] - factorials - factorials[::-1]
    return ways + counts * math.log(share) + counts[::-1] * math.log1p(-share)


def _flip_counts(prompts: int, flip_rate: float) -> tuple[list[int], list[float]]:
    """Numbers of flips that can happen, and how likely each is."""
    chances = np.exp(_log_binomial(prompts, flip_rate))
    counts: Sequence[int] = np.flatnonzero(chances > _NEGLIGIBLE).tolist()
    return list(counts), [float(chances[count]) for count in counts]


def _largest_rejected(flips: int) -> int:
    """Largest smaller side at which the exact test reaches its level; -1 where none does."""
    tail = np.cumsum(np.exp(_log_binomial(flips, 0.5)))
    return int(np.searchsorted(tail[: flips // 2 + 1], ALPHA / 2, side="right")) - 1


def _rejects(flips: int, limit: int, better: float) -> float:
    """Probability that the smaller side of so many flips is at most `limit`."""
    if limit < 0:
        return 0.0
    chances = np.exp(_log_binomial(flips, better))
    return float(chances[: limit + 1].sum() + chances[flips - limit :].sum())
