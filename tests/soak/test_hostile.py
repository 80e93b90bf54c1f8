"""Short forms of the soak runs over HTTP."""

from __future__ import annotations

import pytest

from tests.soak import fuzz, streams


def test_hostile_requests_get_no_5xx_and_leave_nothing_behind() -> None:
    counts = fuzz.run(first=5_000_000, count=500)
    assert counts["status 400"] > 200 and counts["status 200"] > 50


@pytest.mark.slow
def test_answers_in_company_are_those_alone() -> None:
    counts = streams.run(seconds=5, num_questions=6)
    # a busy machine ends fewer answers in that time
    assert counts["survivors equal"] > 5
    assert counts["disconnect"] and counts["bad"]
