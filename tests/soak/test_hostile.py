"""Short forms of the soak runs over HTTP, and defects that they must find."""

from __future__ import annotations

import os
from unittest.mock import patch

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


@pytest.mark.parametrize(
    "wrong", [{}, {"error": "text"}, {"detail": []}, {"error": {"message": "a"}}]
)
def test_an_error_of_another_shape_is_found(wrong: dict[str, object]) -> None:
    with pytest.raises((AssertionError, TypeError)):
        fuzz.check_error(wrong)


@pytest.mark.slow
@pytest.mark.parametrize("is_exact", [False, True], ids=["within rounding", "exactly"])
def test_answers_in_company_are_those_alone(is_exact: bool) -> None:
    with patch.dict(os.environ, {streams.INVARIANT: "1" if is_exact else "0"}):
        counts = streams.run(seconds=5, num_questions=6, seed=int(is_exact))
    assert counts["survivors equal"] > 20
    assert counts["disconnect"] and counts["bad"]


def test_answers_of_other_tokens_are_found() -> None:
    alone = [streams.Answer([5, 6], "ab", ["a", "b"], [{"a": -0.1}, {"b": -0.1, "c": -0.1005}])]
    near = [streams.Answer([5, 7], "ac", ["a", "c"], [])]
    far = [streams.Answer([5, 8], "ad", ["a", "d"], [])]
    assert streams.compare(alone, alone, is_exact=True)
    assert not streams.compare(alone, near, is_exact=False)
    for found, is_exact in ((near, True), (far, False)):
        with pytest.raises(AssertionError, match="token 1 alone 'b'"):
            streams.compare(alone, found, is_exact)
