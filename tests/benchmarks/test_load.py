"""The load of random arrivals: what is drawn, its figures, and a whole run in small."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks import load
from benchmarks._arrivals import LENGTHS, RATES, Arrival, Lengths, arrivals, figures

ALL = Lengths((1, 9, None), (1, 9, None), first_token_s=1.0, token_s=0.05)


def test_the_same_seed_gives_the_same_arrivals() -> None:
    first, second, other = (
        arrivals(LENGTHS["short"], 5.0, seed, 4096, 20.0, 4096) for seed in (1, 1, 2)
    )
    assert first == second
    assert first != other


@pytest.mark.parametrize("name", LENGTHS)
def test_arrivals_have_their_rate_and_lengths(name: str) -> None:
    lengths = LENGTHS[name]
    drawn = arrivals(lengths, 40.0, 1, 1000, 50.0, 33024)
    # 2,000 arrivals with a standard deviation of 45
    assert abs(len(drawn) - 2000) < 200
    times = [one.at for one in drawn]
    assert times == sorted(times) and times[0] > 0 and times[-1] < 50
    for values, (low, high, shape) in (
        ([len(one.prompt) for one in drawn], lengths.prompt),
        ([one.new_tokens for one in drawn], lengths.answer),
    ):
        assert low <= min(values) and max(values) <= high
        middle = (low + high) / 2 if shape is None else np.exp(shape[0])
        assert np.median(values) == pytest.approx(middle, rel=0.15)
    ids = {token for one in drawn[:50] for token in one.prompt}
    assert min(ids) >= 10 and max(ids) < 1000


def test_a_short_context_cuts_both_lengths() -> None:
    drawn = arrivals(LENGTHS["1k1k"], 9.0, 1, 1000, 5.0, 100)
    assert {(len(one.prompt), one.new_tokens) for one in drawn} == {(50, 50)}


def test_every_number_of_gpus_has_known_distributions() -> None:
    assert {name for rates in RATES.values() for name in rates} == set(LENGTHS)


def test_figures_of_known_times() -> None:
    requests = [Arrival(0.5, [1], 2), Arrival(2.0, [1], 3), Arrival(4.0, [1], 1)]
    found = figures(requests, [[9.0, 9.5], [2.25, 2.5, 2.75], [5.5]], ALL, warm_up_s=1.0)
    # the first request is not counted, save for its tokens
    assert found["requests"] == 2
    assert found["first_token_ms"]["p50"] == pytest.approx(875)
    assert found["token_ms"]["p50"] == pytest.approx(125)
    assert found["gap_ms"] == pytest.approx({"p50": 250, "p99": 250})
    assert found["tokens_per_s"] == pytest.approx(6 / 9.5)
    assert found["good_share"] == 0


def test_a_good_answer_keeps_both_limits() -> None:
    requests = [Arrival(0.0, [1], 3)] * 3
    quick, late, slow = [0.5, 0.55, 0.6], [1.5, 1.55, 1.6], [0.5, 0.75, 1.0]
    assert figures(requests, [quick, late, slow], ALL, 0.0)["good_share"] == pytest.approx(1 / 3)


def test_a_lost_token_is_an_error() -> None:
    with pytest.raises(ValueError, match="an answer has 1 tokens, wanted 2"):
        figures([Arrival(0.0, [1], 2)], [[1.0]], ALL, 0.0)


@pytest.mark.slow
def test_a_dry_run_writes_its_cases(tmp_path: Path) -> None:
    assert load.main(["--dry", "--out", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "load.json").read_text())
    assert [case["lengths"] for case in result["cases"]] == ["chat"]
    assert result["tier"] == "dry" and result["cases"][0]["requests"] > 3
