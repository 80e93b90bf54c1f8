"""Intervals and tests against closed forms, published figures and each other."""

from __future__ import annotations

import math
from fractions import Fraction
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fd_dsa.accuracy import stats

COUNTS = st.integers(1, 400).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n)))


@given(COUNTS)
def test_wilson_solves_its_equation(counts: tuple[int, int]) -> None:
    # |share - bound| = z sqrt(bound (1 - bound) / n) at both bounds
    found = stats.wilson(*counts)
    assert found.value == counts[0] / counts[1]
    assert 0 <= found.low <= found.value <= found.high <= 1
    assert found.low < found.high
    for bound in (found.low, found.high):
        if bound not in (0.0, 1.0):
            distance = 1.959964 * math.sqrt(bound * (1 - bound) / counts[1])
            assert abs(found.value - bound) == pytest.approx(distance, abs=1e-6)


def test_wilson_without_trials_knows_nothing() -> None:
    found = stats.wilson(0, 0)
    assert math.isnan(found.value) and (found.low, found.high) == (0.0, 1.0)


@pytest.mark.parametrize(("worse", "better"), [*product(range(5), range(5)), (3, 11), (0, 8)])
def test_mcnemar_is_the_share_of_all_coin_tosses(worse: int, better: int) -> None:
    flips = worse + better
    tosses = [abs(2 * sum(coins) - flips) for coins in product((0, 1), repeat=flips)]
    extreme = sum(distance >= abs(worse - better) for distance in tosses)
    assert stats.mcnemar(worse, better) == float(Fraction(extreme, len(tosses)))


def test_bootstrap_share_agrees_with_the_normal_interval() -> None:
    passed = np.arange(541) < 469
    found = stats.bootstrap_share(passed, np.ones(541))
    half = 1.96 * math.sqrt(469 / 541 * 72 / 541 / 541)
    assert found == pytest.approx((469 / 541, 469 / 541 - half, 469 / 541 + half), abs=0.003)


def test_bootstrap_of_correlated_instructions_is_wider_than_of_independent_ones() -> None:
    together = stats.bootstrap_share([2] * 50 + [0] * 50, [2] * 100)
    apart = stats.bootstrap_share([1] * 100, [2] * 100)
    mixed = stats.bootstrap_share(([2] * 25 + [1] * 50 + [0] * 25), [2] * 100)
    widths = [found.high - found.low for found in (apart, mixed, together)]
    assert widths[0] == 0 and widths[2] == pytest.approx(widths[1] * math.sqrt(2), rel=0.1)


@pytest.mark.parametrize("passed", [0, 2])
def test_bootstrap_without_variance_falls_back_to_prompts(passed: int) -> None:
    found = stats.bootstrap_share([passed] * 30, [2] * 30)
    assert found == stats.wilson(15 * passed, 30)
    assert found.high - found.low > 0.1


@given(
    st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=60),
)
@settings(max_examples=15, deadline=None)
def test_bootstrap_difference_swaps_and_holds_its_value(rows: list[tuple[bool, bool]]) -> None:
    before, after = np.array(rows).T
    ones = np.ones(len(rows))
    there = stats.bootstrap_difference(before, after, ones)
    back = stats.bootstrap_difference(after, before, ones)
    assert there == pytest.approx((-back.value, -back.high, -back.low))
    assert there.low <= there.value <= there.high
    assert there == stats.bootstrap_difference(before, after, ones)


def test_bootstrap_difference_agrees_with_the_paired_normal_interval() -> None:
    # 10 worse and 16 better of 541: variance (b + c - (c - b)²/n) / n²
    before, after = np.zeros(541), np.zeros(541)
    before[:10], after[10:26] = 1, 1
    found = stats.bootstrap_difference(before, after, np.ones(541))
    half = 1.96 * math.sqrt(26 - 36 / 541) / 541
    assert found == pytest.approx((6 / 541, 6 / 541 - half, 6 / 541 + half), abs=0.002)


@given(st.integers(0, 80), st.integers(0, 80))
def test_paired_difference_swaps_and_holds_its_value(worse: int, better: int) -> None:
    there = stats.paired_difference(worse, better, 160)
    back = stats.paired_difference(better, worse, 160)
    assert there == pytest.approx((-back.value, -back.high, -back.low))
    assert -1 <= there.low < there.value == (better - worse) / 160 < there.high <= 1


@pytest.mark.parametrize(("worse", "better"), [(0.004, 0.002), (0.05, 0.02), (0.3, 0.3)])
def test_paired_difference_covers_the_truth(worse: float, better: float) -> None:
    cells = [worse, better, 1 - worse - better]
    draws = np.random.RandomState(2).multinomial(300, cells, size=2000)
    bounds = [stats.paired_difference(int(w), int(b), 300) for w, b, _ in draws]
    covered = np.mean([found.low <= better - worse <= found.high for found in bounds])
    # four standard errors below; small counts are covered more often
    assert covered > 0.93


def test_paired_difference_of_no_flips_is_not_nothing() -> None:
    found = stats.paired_difference(0, 0, 541)
    # both bounds are those of a share of 0: z² / (n + z²)
    assert found == pytest.approx((0, -0.00705, 0.00705), abs=5e-5)
    assert stats.paired_difference(0, 5, 5).high == 1.0
    assert math.isnan(stats.paired_difference(0, 0, 0).value)


def test_smallest_difference_has_the_power_it_says() -> None:
    prompts, rate = 200, 0.1
    least = stats.smallest_difference(prompts, rate)
    assert least is not None
    random = np.random.RandomState(1)
    better, worse = (rate + least) / 2, (rate - least) / 2
    draws = random.multinomial(prompts, [better, worse, 1 - rate], size=4000)
    seen = np.mean([stats.mcnemar(int(w), int(b)) <= 0.05 for b, w, _ in draws])
    # three standard errors of 4,000 draws
    assert seen == pytest.approx(0.8, abs=0.019)


@pytest.mark.parametrize(("prompts", "rate"), [(1, 1.0), (541, 0.0), (40, 0.02)])
def test_too_few_flips_show_nothing(prompts: int, rate: float) -> None:
    assert stats.smallest_difference(prompts, rate) is None


@pytest.mark.parametrize(
    ("estimate", "percent", "points"),
    [
        ((0.8669, 0.836, 0.893), "86.69 [83.6, 89.3]", "+86.69 [+83.60, +89.30]"),
        ((-0.01, -0.0234, 0.000001), "-1.00 [-2.3, 0.0]", "-1.00 [-2.34, 0.00]"),
        ((math.nan, 0, 1), "-", "-"),
    ],
)
def test_estimates_in_words(
    estimate: tuple[float, float, float], percent: str, points: str
) -> None:
    assert stats.Estimate(*estimate).percent() == percent
    assert stats.Estimate(*estimate).points() == points
