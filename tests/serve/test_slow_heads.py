"""Clients that do not come to the end of a request's head hold no connection for ever."""

from __future__ import annotations

import contextlib
import json
import select
import socket
import time
from collections.abc import Callable
from contextlib import closing
from http.client import HTTPConnection

import httpx
import pytest

from fd_dsa.serve.h11_protocol import StrictH11Protocol
from tests.serve.conftest import TIMEOUT_S, Live, running
from tests.serve.fake_engine import WORDS, FakeEngine


def connected(live: Live) -> socket.socket:
    """A connection to the server."""
    url = httpx.URL(live.url)
    return socket.create_connection((url.host, url.port or 80), timeout=TIMEOUT_S)


def before_it_is_closed(talk: Callable[[], bytes]) -> bytes:
    """What `talk` gives; it is tried again where the connection was lost on the way.

    A client that the machine starves may itself be late, and a byte that crosses the server's last
    words makes the kernel throw these away.
    """
    for _ in range(9):
        with contextlib.suppress(ConnectionError):
            return talk()
    return talk()


@pytest.mark.parametrize("sent", [b"", b"POST /v1/completions HTTP/1.1\r\nHost: a\r\n"])
def test_a_head_that_does_not_come_holds_no_connection(
    monkeypatch: pytest.MonkeyPatch, sent: bytes
) -> None:
    """Bytes that come one by one do not put it off."""
    monkeypatch.setattr(StrictH11Protocol, "head_timeout_s", 0.4)

    def talk() -> bytes:
        with connected(live) as connection:
            connection.sendall(sent)
            deadline = time.monotonic() + TIMEOUT_S
            while not select.select([connection], [], [], 0.1)[0]:
                assert time.monotonic() < deadline, "the connection is still open"
                if sent:
                    connection.sendall(b"x")
            # head and body may come in two pieces
            return b"".join(iter(lambda: connection.recv(65536), b""))

    with running(FakeEngine()) as live:
        answer = before_it_is_closed(talk)
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
    headers = {"Content-Type": "application/json"}

    def talk() -> bytes:
        address = httpx.URL(live.url).netloc.decode()
        # unlike httpx it never opens a second connection by itself
        with closing(HTTPConnection(address, timeout=TIMEOUT_S)) as connection:
            # an answer that takes longer than a head may
            for max_tokens in (5, 1):
                body = json.dumps({"prompt": "a", "max_tokens": max_tokens})
                connection.request("POST", "/v1/completions", body, headers)
                answer = connection.getresponse().read()
                time.sleep(0.4)
            return answer

    with running(FakeEngine(step_s=0.1)) as live:
        assert json.loads(before_it_is_closed(talk))["choices"][0]["text"] == WORDS[0]
