"""The clock on the wall may be set while a server runs: only `created` follows it."""

from __future__ import annotations

import itertools
import time
from typing import Any

import pytest

from fd_dsa.engine.async_engine import AsyncEngine
from tests.engine.fakes import make_engine
from tests.serve.conftest import Live, chunks_of, running
from tests.serve.test_errors import complete

FIELDS: dict[str, Any] = {"prompt": [5, 6, 7], "temperature": 0, "max_tokens": 30, "n": 2}
# 2001 and 2065, in turn: every second look at the clock is in the past of the look before it
STAMPS = (1_000_000_000, 3_000_000_000)
TIMES = ("first_token_s", "total_s")


def answers(live: Live) -> tuple[list[dict[str, Any]], list[int]]:
    """What a server answers, without ids and `created`; and all values of `created`."""
    events = chunks_of(complete(live, **FIELDS, stream=True))
    found = [complete(live, **FIELDS).json(), *events]
    # chunks of two choices come in the order in which they are ready
    found.sort(key=lambda one: one["choices"][0]["index"] if "usage" not in one else -1)
    for one in found:
        one.pop("id")
    return found, [one.pop("created") for one in found]


def seconds_sums(live: Live) -> dict[str, float]:
    """The sum of every histogram of times."""
    lines = (line.split() for line in live.http.get("/metrics").text.splitlines())
    return {words[0]: float(words[-1]) for words in lines if "_seconds_sum" in words[0]}


def test_only_created_follows_the_clock_on_the_wall(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with running(AsyncEngine(make_engine()), log_requests=True) as live:
        wanted, _ = answers(live)
    caplog.clear()
    began = time.monotonic()
    with monkeypatch.context() as patch:
        patch.setattr(time, "time", map(float, itertools.cycle(STAMPS)).__next__)
        with (
            caplog.at_level("INFO"),
            running(AsyncEngine(make_engine()), log_requests=True) as live,
        ):
            found, created = answers(live)
            assert found == wanted
            assert created and set(created) <= set(STAMPS)
            assert live.http.get("/health").status_code == 200
            sums = seconds_sums(live)
    longest = time.monotonic() - began
    assert len(sums) >= 5
    # of four outputs, each no longer than all of it
    assert all(0 <= value <= 4 * longest for value in sums.values()), sums
    logged = [record.fields for record in caplog.records if record.name == "fd_dsa.requests"]
    assert len(logged) == 4
    assert all(0 <= fields[name] <= longest for fields in logged for name in TIMES), logged
