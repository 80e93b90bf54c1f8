"""The threshold of the second stream is no larger than what was measured to pay."""

from __future__ import annotations

import json

import pytest

from benchmarks._harness import RESULTS
from benchmarks.engine_overlap import limit
from fd_dsa.environment import DEFAULT_OVERLAP_MAX_TOKENS


def test_the_default_is_within_all_measured_limits() -> None:
    limits = {
        path.stem: json.loads(path.read_text())["limit_tokens"]
        for path in RESULTS.glob("engine_overlap*.json")
    }
    assert min(limits.values()) >= DEFAULT_OVERLAP_MAX_TOKENS, limits


@pytest.mark.parametrize(
    ("ratios", "wanted"),
    [((1.01, 1.0, 1.002), 64), ((1.01, 0.999, 1.002), 1), ((0.99, 1.2, 1.2), 0)],
)
def test_the_limit_is_the_last_size_before_a_loss(ratios: tuple[float, ...], wanted: int) -> None:
    cases = [{"rows": n, "ratio": r} for n, r in zip((1, 8, 64), ratios, strict=True)]
    assert limit(cases[::-1]) == wanted
