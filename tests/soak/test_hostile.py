"""Short forms of the soak runs over HTTP, and defects that they must find."""

from __future__ import annotations

import pytest

from fd_dsa.serve import tokenization
from tests.soak import fuzz, streams


def test_hostile_requests_get_no_5xx_and_leave_nothing_behind() -> None:
    counts = fuzz.run(first=5_000_000, count=500)
    assert counts["status 400"] > 200 and counts["status 200"] > 50


def test_a_route_that_fails_is_found(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(tokenization, "encode_prompt", fail)
    with pytest.raises(AssertionError, match="answered wrongly"):
        fuzz.run(first=0, count=200)
    assert "internal error" in capsys.readouterr().out


@pytest.mark.slow
def test_answers_in_company_are_those_alone() -> None:
    counts = streams.run(seconds=5, num_questions=6)
    # a busy machine ends fewer answers in that time
    assert counts["survivors equal"] > 5
    assert counts["disconnect"] and counts["bad"]
