"""Statistics of passed prompts: intervals, tests, smallest visible differences.

Shares and differences are fractions, not percent. Nothing here depends on when or where it runs:
the resampling is seeded, and NumPy keeps the stream of `RandomState` as it is.
"""

from __future__ import annotations

import math
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

ALPHA = 0.05
POWER = 0.8
RESAMPLES = 10_000
SEED = 0

_Z = NormalDist().inv_cdf(1 - ALPHA / 2)
# elements of one block of resampled indices: 32 MB
_BLOCK_ELEMENTS = 1 << 22


class Estimate(NamedTuple):
    """A share or a difference of shares with its 95 % interval; value is NaN without data."""

    value: float
    low: float
    high: float

    def percent(self) -> str:
        """A share in percent, `86.69 [83.6, 89.3]`; a dash without data."""
        if math.isnan(self.value):
            return "-"
        value, low, high = (100 * part for part in self)
        return f"{value:.2f} [{low:.1f}, {high:.1f}]"

    def points(self) -> str:
        """A difference in points, `+1.11 [-2.89, +5.11]`; a dash without data."""
        if math.isnan(self.value):
            return "-"
        return "{} [{}, {}]".format(*map(signed, self))

    def to_json(self) -> dict[str, float | None]:
        """The estimate in percent or points to four decimals; NaN is null."""
        parts = self._asdict().items()
        return {n: None if math.isnan(part) else round(100 * part, 4) for n, part in parts}


def signed(difference: float) -> str:
    """A difference in points, two decimals and its sign; nothing is `0.00`."""
    text = f"{100 * difference:+.2f}"
    return "0.00" if text in ("+0.00", "-0.00") else text


def wilson(passed: int, total: int) -> Estimate:
    """A share of independent trials with its Wilson score interval; [0, 1] without trials.

    (p + z²/2n ± z sqrt(p(1-p)/n + z²/4n²)) / (1 + z²/n). Source: Wilson 1927, JASA 22.
    """
    if total == 0:
        return Estimate(math.nan, 0.0, 1.0)
    share, scale = passed / total, 1 + _Z * _Z / total
    middle = (share + _Z * _Z / (2 * total)) / scale
    half = _Z * math.sqrt(share * (1 - share) / total + _Z * _Z / (4 * total * total)) / scale
    # at 0 and at total the bound is the share itself, except for rounding
    low = 0.0 if passed == 0 else max(0.0, middle - half)
    high = 1.0 if passed == total else min(1.0, middle + half)
    return Estimate(share, low, high)


def mcnemar(worse: int, better: int) -> float:
    """Exact two-sided p that a prompt which flips is as likely to get worse as better.

    min(1, 2 Σ_{i <= min(worse, better)} C(n, i) / 2^n) with n = worse + better, in whole numbers.
    Source: McNemar 1947, Psychometrika 12, in its binomial form.
    """
    flips = worse + better
    tail = sum(math.comb(flips, i) for i in range(min(worse, better) + 1))
    return min(1.0, 2 * tail / 2**flips)


def most_unseen_share(trials: int) -> float:
    """Largest share of flips that shows none in so many prompts with 5 % probability."""
    return 1 - ALPHA ** (1 / trials) if trials else 1.0


def paired_difference(worse: int, better: int, prompts: int) -> Estimate:
    """Difference after - before of a pass rate on the same prompts, from its flips.

    The shares of both kinds of flips are cells of one multinomial; their Wilson intervals are
    combined with the correlation -sqrt(bw / ((1 - b)(1 - w))) of such cells. Unlike the bootstrap
    it holds with few flips. Source: Newcombe 1998, Statistics in Medicine 17 (paired data), in the
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
    """Share of passed instructions [prompts] of so many, by resampling whole prompts.

    Instructions of one prompt pass or fail together, so an interval that counts them as
    independent is too narrow. Where no resample can differ, it is Wilson's for the prompts.
    """
    found = _bootstrap(passed, sizes)
    if found.value in (0.0, 1.0):
        return wilson(len(np.asarray(sizes)) if found.value else 0, len(np.asarray(sizes)))
    return found


def bootstrap_difference(before: ArrayLike, after: ArrayLike, sizes: ArrayLike) -> Estimate:
    """Difference after - before of two shares of the same prompts, by resampling whole prompts."""
    return _bootstrap(np.asarray(after, np.float64) - np.asarray(before, np.float64), sizes)


def _bootstrap(values: ArrayLike, sizes: ArrayLike) -> Estimate:
    """Sum of values over sum of sizes, its interval from 10,000 resamples of the prompts.

    Percentiles 2.5 and 97.5, with a fixed seed.
    Source: Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapters 8 and 13.
    """
    pairs = np.stack([np.asarray(values, np.float64), np.asarray(sizes, np.float64)], axis=1)
    prompts = len(pairs)
    # Generator may change its stream in any release of NumPy, this one never does
    random = np.random.RandomState(SEED)
    step = max(1, _BLOCK_ELEMENTS // prompts)
    blocks = []
    for start in range(0, RESAMPLES, step):
        rows = min(step, RESAMPLES - start)
        drawn = random.randint(prompts, size=(rows, prompts), dtype=np.int64)
        drawn += np.arange(rows)[:, None] * prompts
        times = np.bincount(drawn.ravel(), minlength=rows * prompts).reshape(rows, prompts)
        blocks.append(times @ pairs)
    sums, total = np.concatenate(blocks), pairs.sum(axis=0)
    bounds = np.percentile(sums[:, 0] / sums[:, 1], [50 * ALPHA, 100 - 50 * ALPHA])
    return Estimate(float(total[0] / total[1]), *map(float, bounds))


def smallest_difference(prompts: int, flip_rate: float, power: float = POWER) -> float | None:
    """Smallest true difference d that a paired run shows with the given power.

    Of `prompts` pairs a share `flip_rate` is expected to flip, (flip_rate + d) / 2 of it to the
    better; "shows" is p <= 0.05 in the exact test of `mcnemar`, its power that of the binomial
    distributions. None where even flips all in one direction are too few.
    """
    chances = _binomial(prompts, flip_rate)
    # numbers of flips less likely than this change nothing in three digits
    counts = [int(flips) for flips in np.flatnonzero(chances > 1e-12)]
    limits = {flips: _largest_rejected(flips) for flips in counts}

    def reached(difference: float) -> float:
        better = (1 + difference / flip_rate) / 2
        total = 0.0
        for flips, limit in limits.items():
            tails = _binomial(flips, better)
            total += chances[flips] * (tails[: limit + 1].sum() + tails[flips - limit :].sum())
        return float(total)

    if flip_rate == 0 or reached(flip_rate) < power:
        return None
    low, high = 0.0, flip_rate
    while high - low > 1e-5:
        middle = (low + high) / 2
        low, high = (low, middle) if reached(middle) >= power else (middle, high)
    return high


def _binomial(trials: int, share: float) -> NDArray[np.float64]:
    """[trials + 1]: probability of each count."""
    if share in (0.0, 1.0):
        return np.eye(trials + 1)[trials if share else 0]
    factorials = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, trials + 1)))])
    counts = np.arange(trials + 1)
    ways = factorials[-1] - factorials - factorials[::-1]
    return np.exp(ways + counts * math.log(share) + counts[::-1] * math.log1p(-share))


def _largest_rejected(flips: int) -> int:
    """Largest smaller side at which the exact test reaches its level; -1 where none does."""
    tail = np.cumsum(_binomial(flips, 0.5))
    return int(np.searchsorted(tail[: flips // 2 + 1], ALPHA / 2, side="right")) - 1
