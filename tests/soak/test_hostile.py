"""Short forms of the soak runs over HTTP."""

from __future__ import annotations

from contextlib import nullcontext

import pytest

from tests.soak import fuzz, streams


def test_hostile_requests_get_no_5xx_and_leave_nothing_behind() -> None:
    counts = fuzz.run(first=5_000_000, count=500)
    assert counts["status 400"] > 200 and counts["status 200"] > 50


def test_only_an_error_of_the_head_may_have_the_form_of_another_api() -> None:
    error = {"type": "invalid_request_error", "param": None, "code": None}
    for message, is_right in (("the request is no valid HTTP/1.1 (x)", True), ("x", False)):
        with nullcontext() if is_right else pytest.raises(AssertionError):
            fuzz.check_error({"error": {**error, "message": message}}, "/v1/messages")


@pytest.mark.slow
def test_answers_in_company_are_those_alone() -> None:
    counts = streams.run(seconds=5, num_questions=6)
    # a busy machine ends fewer answers in that time
    assert counts["survivors equal"] > 5
    assert counts["disconnect"] and counts["bad"]
