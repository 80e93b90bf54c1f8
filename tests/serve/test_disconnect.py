"""A client that goes away frees what its request had."""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator
from contextlib import closing
from urllib.parse import urlsplit

import pytest

from tests.serve.conftest import Live, active, running, wait_until
from tests.serve.fake_engine import FakeEngine

# longer than any machine needs to leave
ENDLESS = {"ignore_eos": True, "max_tokens": 9000, "prompt": ["a", "b"]}


@pytest.fixture
def slow() -> Iterator[Live]:
    """A server whose replies take minutes."""
    with running(FakeEngine(step_s=0.02, max_model_len=10_000)) as live:
        yield live


def test_closing_a_stream_aborts_all_its_prompts(slow: Live) -> None:
    slow.client.completions.create(model="demo", prompt="a", max_tokens=3)
    assert slow.engine.closed == [] and not active(slow)
    body = {**ENDLESS, "stream": True}
    with slow.http.stream("POST", "/v1/completions", json=body) as answer:
        # held: dropping the iterator closes the connection
        lines = answer.iter_lines()
        assert next(lines).startswith('data: {"id"')
        assert len(active(slow)) == 2
    wait_until(lambda: len(slow.engine.closed) == 2)
    wait_until(lambda: not active(slow))
    assert slow.http.get("/health").status_code == 200


def test_a_client_that_stops_waiting_aborts(slow: Live) -> None:
    with closing(http.client.HTTPConnection(urlsplit(slow.url).netloc)) as connection:
        headers = {"Content-Type": "application/json"}
        connection.request("POST", "/v1/completions", json.dumps(ENDLESS), headers)
        wait_until(lambda: len(slow.engine.requests) == 2)
    wait_until(lambda: len(slow.engine.closed) == 2)
    wait_until(lambda: not active(slow))
    assert slow.http.get("/health").status_code == 200
