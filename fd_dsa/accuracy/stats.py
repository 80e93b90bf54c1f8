"""Statistics of passed prompts: intervals, tests, smallest detectable differences.

Shares and differences are fractions, not percent. Resampling is seeded. What has a short closed
form needs no package. The bootstrap and the power of a test are computed by scipy.
"""

from __future__ import annotations

import math
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from fd_dsa.commands import extra_command
from fd_dsa.errors import BackendUnavailable

ALPHA = 0.05
POWER = 0.8
RESAMPLES = 10_000
SEED = 0

_Z = NormalDist().inv_cdf(1 - ALPHA / 2)


class Estimate(NamedTuple):
    """A share or a difference of shares with its 95 % interval.

    The value is NaN without data.
    """

    value: float
    low: float
    high: float

    def percent(self) -> str:
        """Format a share in percent, as in `86.69 [83.6, 89.3]`, or as a dash without data."""
        if math.isnan(self.value):
            return "-"
        value, low, high = (100 * part for part in self)
        return f"{value:.2f} [{low:.1f}, {high:.1f}]"

    def points(self) -> str:
        """Format a difference in points, as `+1.11 [-2.89, +5.11]`, or a dash without data."""
        if math.isnan(self.value):
            return "-"
        return "{} [{}, {}]".format(*map(signed, self))

    def to_json(self) -> dict[str, float | None]:
        """Return the estimate in percent or points with four decimals. NaN becomes null."""
        parts = self._asdict().items()
        return {n: None if math.isnan(part) else round(100 * part, 4) for n, part in parts}


def signed(difference: float) -> str:
    """Format a difference in points with two decimals and its sign. Zero is `0.00`."""
    text = f"{100 * difference:+.2f}"
    return "0.00" if text in ("+0.00", "-0.00") else text


def wilson(passed: int, total: int) -> Estimate:
    """Return a share of independent trials with its Wilson score interval.

    (p + z²/2n ± z sqrt(p(1-p)/n + z²/4n²)) / (1 + z²/n). The interval is [0, 1] without trials.
    Source: Wilson 1927, JASA 22.
    """
    if total == 0:
        return Estimate(math.nan, 0.0, 1.0)
    share, scale = passed / total, 1 + _Z * _Z / total
    middle = (share + _Z * _Z / (2 * total)) / scale
    half = _Z * math.sqrt(share * (1 - share) / total + _Z * _Z / (4 * total * total)) / scale
    # exact at 0 and at total, where rounding would move the bound
    low = 0.0 if passed == 0 else max(0.0, middle - half)
    high = 1.0 if passed == total else min(1.0, middle + half)
    return Estimate(share, low, high)


def mcnemar(worse: int, better: int) -> float:
    """Return the exact two-sided p that flips are equally likely in both directions.

    min(1, 2 Σ_{i <= min(worse, better)} C(n, i) / 2^n) with n = worse + better, in integers.
    Source: McNemar 1947, Psychometrika 12, in its binomial form.
    """
    flips = worse + better
    tail = sum(math.comb(flips, i) for i in range(min(worse, better) + 1))
    return min(1.0, 2 * tail / 2**flips)


def max_unseen_share(trials: int) -> float:
    """Return the flip rate at which `trials` prompts show no flip with 5 % probability."""
    return 1 - ALPHA ** (1 / trials) if trials else 1.0


def paired_difference(worse: int, better: int, prompts: int) -> Estimate:
    """Return the difference after - before of a pass rate, from the flips of its prompts.

    The shares of both kinds of flips are cells of one multinomial distribution. Their Wilson
    intervals are combined with the correlation -sqrt(bw / ((1 - b)(1 - w))) of such cells. Unlike
    the bootstrap this is valid for few flips. Source: Newcombe 1998, Statistics in Medicine 17
    (paired data), in the form of Zou and Donner 2008, Statistics in Medicine 27.
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
    """Return the share of passed instructions, with an interval by resampling prompts.

    Instructions of one prompt pass or fail together, so an interval that counts them as independent
    is too narrow. If no resample can differ, the interval is Wilson's for the prompts.

    Args:
        passed, sizes: [prompts], number of passed and of all instructions of each prompt.
    """
    found = _bootstrap(passed, sizes)
    if found.value in (0.0, 1.0):
        return wilson(len(np.asarray(sizes)) if found.value else 0, len(np.asarray(sizes)))
    return found


def bootstrap_difference(before: ArrayLike, after: ArrayLike, sizes: ArrayLike) -> Estimate:
    """Return the difference after - before of two shares, by resampling prompts."""
    return _bootstrap(np.asarray(after, np.float64) - np.asarray(before, np.float64), sizes)


def _bootstrap(values: ArrayLike, sizes: ArrayLike) -> Estimate:
    """Return sum of values over sum of sizes, with the percentile interval of resampled prompts.

    Source: Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapters 8 and 13.
    """
    columns = np.asarray(values, np.float64), np.asarray(sizes, np.float64)

    def share(values: Any, sizes: Any, axis: int = -1) -> Any:
        return values.sum(axis=axis) / sizes.sum(axis=axis)

    value = float(share(*columns))
    if len(columns[0]) == 1:
        return Estimate(value, value, value)
    found = _scipy().stats.bootstrap(
        columns,
        share,
        paired=True,
        n_resamples=RESAMPLES,
        # a block of resampled prompts of at most 32 MB
        batch=max(1, (1 << 22) // len(columns[0])),
        confidence_level=1 - ALPHA,
        method="percentile",
        rng=np.random.default_rng(SEED),
    )
    return Estimate(value, *map(float, found.confidence_interval))


def smallest_difference(prompts: int, flip_rate: float) -> float | None:
    """Return the smallest true difference that a paired run detects with a power of `POWER`.

    A share `flip_rate` of the pairs is expected to flip, and (flip_rate + difference) / 2 of them
    get better. "Detects" means p <= 0.05 in the exact test of `mcnemar`. The power is computed from
    the binomial distributions.

    Returns:
        The difference, or None if even flips in one direction are too few.
    """
    scipy = _scipy()
    binom, flips = scipy.stats.binom, np.arange(prompts + 1)
    chances = binom.pmf(flips, prompts, flip_rate)
    # largest smaller side of a significant test, -1 without one
    sides = binom.ppf(ALPHA / 2, flips, 0.5)
    sides -= binom.cdf(sides, flips, 0.5) > ALPHA / 2

    def power(difference: float) -> float:
        better = (1 + difference / flip_rate) / 2
        tails = binom.cdf(sides, flips, better) + binom.sf(flips - sides - 1, flips, better)
        return float(chances @ tails)

    if flip_rate == 0 or power(flip_rate) < POWER:
        return None
    return float(scipy.optimize.brentq(lambda size: power(size) - POWER, 0, flip_rate))


def _scipy() -> Any:
    """Import scipy when its statistics are needed, since most commands do without them."""
    try:
        import scipy.optimize
        import scipy.stats
    except ImportError as error:
        raise BackendUnavailable(
            f"the statistics of two runs need scipy ({error}); {extra_command('accuracy')}"
        ) from None
    return scipy
