"""Clients that do not come to the end of a request's head hold no connection for ever."""

from __future__ import annotations

import json
import select
import socket
import time

import httpx
import pytest

from fd_dsa.serve.h11_protocol import StrictH11Protocol
from tests.serve.conftest import Live, running
from tests.serve.fake_engine import FakeEngine
from tests.serve.test_errors import complete


def connected(live: Live) -> socket.socket:
    """A connection to the server."""
    url = httpx.URL(live.url)
    return socket.create_connection((url.host, url.port or 80), timeout=20)


@pytest.mark.parametrize("sent", [b"", b"POST /v1/completions HTTP/1.1\r\nHost: a\r\n"])
def test_a_head_that_does_not_come_holds_no_connection(
    monkeypatch: pytest.MonkeyPatch, sent: bytes
) -> None:
    """Bytes that come one by one do not put it off."""
    monkeypatch.setattr(StrictH11Protocol, "head_timeout_s", 0.4)
    with running(FakeEngine()) as live, connected(live) as connection:
        connection.sendall(sent)
        readable: list[socket.socket] = []
        num_more = 0
        deadline = time.monotonic() + 30
        while not readable:
            assert time.monotonic() < deadline, "the connection is still open"
            readable, _, _ = select.select([connection], [], [], 0.05)
            if sent and not readable and num_more < 4:
                connection.sendall(b"x")
                num_more += 1
        answer = connection.recv(65536)
        if not sent:
            assert answer == b""
            return
        assert answer.startswith(b"HTTP/1.1 408 Request Timeout\r\n")
        error = json.loads(answer.partition(b"\r\n\r\n")[2])["error"]
        assert "head of the request" in error["message"]


def test_a_connection_is_used_again_long_after_its_first_head(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(StrictH11Protocol, "head_timeout_s", 0.3)
    with running(FakeEngine(step_s=0.1)) as live:
        # an answer that takes longer than a head may
        assert complete(live, max_tokens=6).status_code == 200
        time.sleep(0.5)
        assert complete(live, max_tokens=1).status_code == 200
