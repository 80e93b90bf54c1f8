"""Bodies that come slowly, in the way of nobody, and bodies that come compressed."""

from __future__ import annotations

import gzip
import json
import socket
import time
from contextlib import ExitStack
from typing import Any

import httpx
import pytest

from fd_dsa.serve import body, guard
from fd_dsa.serve.body import BodyReader
from fd_dsa.serve.h11_protocol import StrictH11Protocol
from fd_dsa.serve.options import ServerOptions
from tests.serve.conftest import Live, connected, num_admitted, running, wait_until
from tests.serve.fake_engine import FakeEngine
from tests.serve.test_connections import HEAD
from tests.serve.test_errors import complete, error_of
from tests.serve.test_guard import JSON, body_of

NUM_SLOW = 60


def trickle(live: Live, stack: ExitStack, num_bytes: int, first: bytes = b"{") -> Any:
    """Many clients that announce so many bytes and send the first ones."""
    clients = [stack.enter_context(connected(live)) for _ in range(NUM_SLOW)]
    for client in clients:
        client.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % num_bytes + first)
    return clients


def send_until_closed(clients: list[socket.socket]) -> bytes:
    """Send a byte on each, again and again, until all are closed; what the first was answered."""
    answer = b""
    left = list(clients)
    while left:
        for client in tuple(left):
            client.setblocking(False)
            try:
                client.send(b"x")
                answer += (part := client.recv(65536)) if client is clients[0] else b""
                if client is clients[0] and not part:
                    left.remove(client)
            except BlockingIOError:
                pass
            except ConnectionError:
                left.remove(client)
        time.sleep(0.05)
    return answer


def test_slow_bodies_take_no_place_of_max_concurrency() -> None:
    options = ServerOptions(max_concurrency=2)
    with running(FakeEngine(), options=options) as live, ExitStack() as stack:
        clients = trickle(live, stack, 15)
        wait_until(lambda: len(live.server.server_state.tasks) == NUM_SLOW)
        assert num_admitted(live) == 0
        assert complete(live).status_code == 200
        # and are served when they are there after all
        clients[0].sendall(b'"prompt": "a"}')
        assert clients[0].recv(65536).startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize("sent", [HEAD, HEAD + b"Content-Length: 9999\r\n\r\n{"])
def test_many_that_send_a_byte_at_a_time_are_closed_at_the_limit(
    monkeypatch: pytest.MonkeyPatch, sent: bytes
) -> None:
    monkeypatch.setattr(StrictH11Protocol, "head_timeout_s", 1.0)
    options = ServerOptions(body_timeout_s=1.0)
    with running(FakeEngine(), options=options) as live, ExitStack() as stack:
        clients = [stack.enter_context(connected(live)) for _ in range(NUM_SLOW)]
        for client in clients:
            client.sendall(sent)
        answer = send_until_closed(clients)
        wait_until(lambda: len(live.server.server_state.connections) == 0)
        # a byte that crosses the server's last words may take them away
        assert not answer or answer.startswith(b"HTTP/1.1 408 ")
        assert complete(live).status_code == 200
        wait_until(lambda: num_admitted(live) == 0)


def test_bodies_together_take_a_bounded_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(body, "_LONG_BODIES", 3)
    size = 1 << 20
    made: list[BodyReader] = []
    monkeypatch.setattr(guard, "BodyReader", lambda o: made.append(BodyReader(o)) or made[0])
    with running(FakeEngine(), options=ServerOptions(max_body_bytes=size)) as live:

        def post(num_bytes: int) -> httpx.Response:
            content = body_of(num_bytes)
            return live.http.post("/v1/completions", content=content, headers=JSON)

        with ExitStack() as stack:
            for _ in range(3):
                client = stack.enter_context(connected(live))
                client.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % size + b" " * (size - 1))
            wait_until(lambda: made[0].num_bytes == 3 * (size - 1 - (64 << 10)))
            answer = post(size)
            error = error_of(answer, 429)
            assert error["code"] == "too_many_bytes"
            assert f"allowed: {3 * size}, 3 times --max-body-size" in error["message"]
            assert answer.headers["retry-after"] == "1"
            # a body of a usual size is served all the same
            assert post(60_000).is_success
        wait_until(lambda: made[0].num_bytes == 0)
        assert post(size).is_success


def test_a_client_that_leaves_in_its_body_gives_its_memory_back(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(body, "_LONG_BODIES", 1)
    size = 1 << 20
    with running(FakeEngine(), options=ServerOptions(max_body_bytes=size)) as live:
        for _ in range(10):
            with connected(live) as client:
                client.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % size + b" " * (size - 1))

        def is_served() -> bool:
            content = body_of(size)
            return live.http.post("/v1/completions", content=content, headers=JSON).is_success

        wait_until(is_served)
        wait_until(is_served)
    assert not [r for r in caplog.records if r.exc_info]


@pytest.mark.parametrize("encoding", ["gzip", "deflate", "br", "gzip, gzip", "x" * 500])
def test_a_compressed_body_is_a_415_and_is_never_unpacked(live: Live, encoding: str) -> None:
    content = gzip.compress(json.dumps({"prompt": "a" * (32 << 20)}).encode())
    headers = {**JSON, "Content-Encoding": encoding}
    error = error_of(live.http.post("/v1/completions", content=content, headers=headers), 415)
    assert error["message"].startswith(f'Content-Encoding: got "{encoding[:50]}')
    assert "send the body as it is" in error["message"]


def test_identity_is_no_compression(live: Live) -> None:
    for encoding in ("Identity", ""):
        headers = {"Content-Encoding": encoding}
        answer = live.http.post("/v1/completions", json={"prompt": "a"}, headers=headers)
        assert answer.status_code == 200
