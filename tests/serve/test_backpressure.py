"""Clients that leave or do not read: what they held is given back, and buffers stay bounded."""

from __future__ import annotations

import contextlib
import gc
import http.client
import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest

from fd_dsa.serve import generation
from fd_dsa.serve.h11_protocol import StrictH11Protocol
from tests.serve.conftest import TIMEOUT_S, Live, connected, running, wait_until
from tests.serve.fake_engine import FakeEngine
from tests.serve.test_errors import complete

# longer than any machine needs to leave
TWO_ENDLESS = {"ignore_eos": True, "max_tokens": 9000, "prompt": ["a", "b"]}


@pytest.fixture
def slow() -> Iterator[Live]:
    """A server whose replies take minutes."""
    with running(FakeEngine(step_s=0.02, max_model_len=10_000)) as live:
        yield live


def test_closing_a_stream_aborts_all_its_prompts(slow: Live) -> None:
    slow.client.completions.create(model="demo", prompt="a", max_tokens=3)
    assert slow.engine.closed == [] and not slow.state.active
    body = {**TWO_ENDLESS, "stream": True}
    with slow.http.stream("POST", "/v1/completions", json=body) as answer:
        # held: dropping the iterator closes the connection
        lines = answer.iter_lines()
        assert next(lines).startswith('data: {"id"')
        assert len(slow.state.active) == 2
    wait_until(lambda: len(slow.engine.closed) == 2)
    wait_until(lambda: not slow.state.active)
    assert slow.http.get("/health").status_code == 200


def test_a_client_that_stops_waiting_aborts(slow: Live) -> None:
    with closing(http.client.HTTPConnection(urlsplit(slow.url).netloc)) as connection:
        headers = {"Content-Type": "application/json"}
        connection.request("POST", "/v1/completions", json.dumps(TWO_ENDLESS), headers)
        wait_until(lambda: len(slow.engine.requests) == 2)
    wait_until(lambda: len(slow.engine.closed) == 2)
    wait_until(lambda: not slow.state.active)
    assert slow.http.get("/health").status_code == 200


def num_connections() -> int:
    """Return the number of connections of the server that are in memory."""
    return sum(type(found) is StrictH11Protocol for found in gc.get_objects())


def test_closed_connections_need_no_garbage_collection() -> None:
    engine = FakeEngine(step_s=0.02, max_model_len=1_000_000)
    with running(engine) as live:
        gc.collect()
        gc.disable()
        try:
            with httpx.Client() as client, connected(live.url), silent_client(live.url):
                client.post(f"{live.url}/v1/completions", json={"prompt": "a", "max_tokens": 3})
                wait_until(lambda: len(engine.requests) == 2)
                assert num_connections() >= 2
            wait_until(lambda: not num_connections(), 20)
        finally:
            gc.enable()


LONG = ("x" * 20_000,)
ENDLESS = {"prompt": "a", "max_tokens": 900_000, "ignore_eos": True, "stream": True}


@contextmanager
def silent_client(url: str) -> Iterator[socket.socket]:
    """A client that has asked for a stream without an end and reads nothing of it."""
    parts = httpx.URL(url)
    body = json.dumps(ENDLESS)
    with socket.socket() as connection:
        # else the kernels would hold megabytes
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.settimeout(TIMEOUT_S)
        connection.connect((parts.host, parts.port))
        connection.sendall(
            (
                "POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
                f"Content-Length: {len(body)}\r\n\r\n{body}"
            ).encode()
        )
        yield connection


def resident_bytes() -> int:
    """Memory of this process, in which the server runs."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


def test_a_client_that_does_not_read_is_aborted_and_told_why_when_it_reads(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(generation, "MAX_UNREAD_OUTPUTS", 50)
    with running(FakeEngine(max_model_len=1_000_000, words=LONG)) as live:
        before = resident_bytes()
        with silent_client(live.url) as client:
            wait_until(lambda: len(live.engine.closed) == 1)
            assert "its client has not read 50 outputs" in caplog.text
            # without a bound it would have gone on
            assert resident_bytes() - before < 100 << 20
            assert complete(live, max_tokens=2).status_code == 200
            text = b""
            while not text.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n"):
                part = client.recv(1 << 20)
                assert part, "the stream has no end"
                text = text[-2000:] + part
            assert b'"code":"client_too_slow"' in text
        wait_until(lambda: live.state.num_admitted == 0)


def test_a_stalled_connection_is_closed_and_its_place_given_back(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(StrictH11Protocol, "stalled_s", 0.5)
    engine = FakeEngine(step_s=0.001, max_model_len=1_000_000, words=LONG)
    with running(engine) as live, silent_client(live.url) as client:
        wait_until(lambda: len(live.engine.requests) == 1)
        wait_until(lambda: live.state.num_admitted == 0)
        assert "has not read for 0.5 s" in caplog.text
        wait_until(lambda: len(live.engine.closed) == 1)
        text = b""
        with contextlib.suppress(ConnectionResetError):
            while part := client.recv(1 << 20):
                text = text[-100:] + part
        assert not text.endswith(b"\r\n0\r\n\r\n")


def test_a_slow_but_steady_reader_is_served_to_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(StrictH11Protocol, "stalled_s", 1.0)
    fields = {**ENDLESS, "max_tokens": 60}
    with running(FakeEngine(max_model_len=1_000_000, words=LONG)) as live:
        with live.http.stream("POST", "/v1/completions", json=fields) as answer:
            lines = []
            for line in answer.iter_lines():
                time.sleep(0.005)
                lines.append(line)
        assert lines[-2] == "data: [DONE]"
        assert threading.active_count() < 50
