"""More connections than the server can hold: idle ones make room, probes are always answered."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import select
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from fd_dsa.serve.listener import PROBE_CONNECTIONS, PROBE_PATHS
from tests.serve.conftest import TIMEOUT_S, Live, connected, exchange, running, wait_until
from tests.serve.fake_engine import FakeEngine
from tests.serve.processes import FAKE, finish, serving
from tests.serve.test_errors import complete, error_of

ENDLESS = {"prompt": "a", "max_tokens": 5000, "ignore_eos": True, "stream": True}
HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


@contextmanager
def small(limit: int) -> Iterator[Live]:
    """A server with so few connections, whose streams last for minutes."""
    engine = FakeEngine(step_s=0.05, max_model_len=10_000)
    with running(engine, max_connections=limit) as live:
        yield live


def is_closed(connection: socket.socket) -> bool:
    """Return True if the server has closed it."""
    connection.setblocking(False)
    try:
        return connection.recv(1) == b""
    except BlockingIOError:
        return False
    except ConnectionError:
        return True


@pytest.mark.parametrize("sent", [b"", HEAD])
def test_connections_without_a_request_make_room_the_oldest_first(sent: bytes) -> None:
    limit = 4
    with small(limit) as live, ExitStack() as stack:
        crowd = [stack.enter_context(connected(live.url)) for _ in range(60)]
        for connection in crowd:
            with contextlib.suppress(ConnectionError):
                connection.sendall(sent)
        # as many as there are places stay
        wait_until(lambda: sum(map(is_closed, crowd)) >= 60 - limit - PROBE_CONNECTIONS)
        closed = [is_closed(connection) for connection in crowd]
        # the kernel hands those over that send nothing as it likes
        assert not sent or closed == sorted(closed, reverse=True)
        assert complete(live, max_tokens=2).status_code == 200
        assert live.http.get("/health").status_code == 200


def test_a_probe_is_answered_before_requests_that_came_before_it() -> None:
    class Held(FakeEngine):
        """Holds the event loop when a client asks for the served models."""

        @property
        def max_model_len(self) -> int:
            if asked.is_set():
                inside.set()
                assert released.wait(TIMEOUT_S)
            return 100

        @max_model_len.setter
        def max_model_len(self, value: int) -> None:
            pass

    asked, inside, released = threading.Event(), threading.Event(), threading.Event()
    request = HEAD.replace(b"POST /v1/completions", b"GET /nowhere") + b"\r\n"
    with running(Held()) as live, ExitStack() as stack:
        asked.set()
        models = stack.enter_context(connected(live.url))
        models.sendall(request.replace(b"/nowhere", b"/v1/models"))
        assert inside.wait(TIMEOUT_S)
        crowd = [stack.enter_context(connected(live.url)) for _ in range(300)]
        for connection in crowd:
            connection.sendall(request)
        probe = stack.enter_context(connected(live.url))
        probe.sendall(request.replace(b"/nowhere", b"/health"))
        asked.clear()
        released.set()
        assert probe.recv(64).startswith(b"HTTP/1.1 200 ")
        answered, _, _ = select.select(crowd, [], [], 0)
        # more are answered if this thread sleeps after the probe; without a preference all are
        assert len(answered) < 150
        wait_until(lambda: len(select.select(crowd, [], [], 0)[0]) == 300)


def test_where_all_have_requests_in_work_others_are_a_503_and_probes_are_answered() -> None:
    with small(2) as live:
        with (
            live.http.stream("POST", "/v1/completions", json=ENDLESS),
            live.http.stream("POST", "/v1/completions", json=ENDLESS) as last,
        ):
            # more than there are places for probes
            for _ in range(3 * PROBE_CONNECTIONS):
                head, _, body = exchange(live.url, HEAD + b"\r\n").partition(b"\r\n\r\n")
                assert head.startswith(b"HTTP/1.1 503 ") and b"retry-after: 1" in head
                error = json.loads(body)["error"]
                assert error["code"] == "too_many_connections"
                assert "2 connections have a request in progress" in error["message"]
                assert "--max-connections" in error["message"]
                for path in PROBE_PATHS:
                    probe = f"GET {path}?a=b HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"
                    assert exchange(live.url, probe.encode()).startswith(b"HTTP/1.1 200 ")
            with ExitStack() as stack:
                for _ in range(40):
                    stack.enter_context(connected(live.url))
                assert httpx.get(f"{live.url}/health", timeout=TIMEOUT_S).status_code == 200
            # those with a request in progress are not touched
            assert next(last.iter_lines())
        wait_until(lambda: complete(live, max_tokens=1).status_code == 200)


def test_a_connection_is_counted_again_for_each_of_its_requests() -> None:
    with small(1) as live, httpx.Client(base_url=live.url, timeout=TIMEOUT_S) as other:
        for _ in range(5):
            # the same two connections all the time
            assert complete(live, max_tokens=1).status_code == 200
            assert other.get("/v1/models").status_code == 200
        with live.http.stream("POST", "/v1/completions", json=ENDLESS):
            error_of(other.get("/v1/models"), 503)
        wait_until(lambda: other.get("/v1/models").status_code == 200)


def test_out_of_descriptors_the_accept_loop_rests_and_recovers(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As where something else in the process holds them all."""
    accept = socket.socket.accept
    tries = 0

    def failing(self: socket.socket) -> Any:
        nonlocal tries
        tries += 1
        if tries <= 10:
            raise OSError(24, os.strerror(24))
        return accept(self)

    with small(4) as live, connected(live.url) as idle:
        wait_until(lambda: len(live.server.server_state.connections) == 1)
        monkeypatch.setattr(socket.socket, "accept", failing)
        began = time.monotonic()
        assert complete(live, max_tokens=1).status_code == 200
        assert time.monotonic() - began >= 9 * 0.02
        assert is_closed(idle)
    lines = [line for line in caplog.messages if "cannot accept connections" in line]
    assert len(lines) == 10 and "Too many open files" in lines[0]


def crowd(url: str, num: int, sent: bytes, stack: ExitStack) -> Sequence[socket.socket]:
    """Clients that send this and then nothing."""
    clients = []
    for _ in range(num):
        client = stack.enter_context(connected(url))
        clients.append(client)
        with contextlib.suppress(ConnectionError):
            client.sendall(sent)
    return clients


def test_idle_clients_keep_no_probe_out_and_fill_no_log(tmp_path: Path) -> None:
    # bodies that do not come are given up after this time
    before = "from fd_dsa.serve import server\nserver.LAST_RESPONSES_S = 0.5"
    how: dict[str, Any] = {"body": FAKE, "before": before, "open_files": 64}
    with serving(tmp_path, **how) as server, ExitStack() as stack:
        for sent in (b"", HEAD, HEAD + b"Content-Length: 5\r\n\r\n"):
            crowd(server.url, 100, sent, stack)
            for path in PROBE_PATHS:
                assert httpx.get(f"{server.url}{path}", timeout=TIMEOUT_S).status_code == 200
        log = server.ends()
    assert "Traceback" not in log
    assert len(log.splitlines()) < 20, log


def test_the_soft_limit_is_raised_and_no_more_is_promised_than_it_allows(tmp_path: Path) -> None:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    code = (
        "import resource, sys\nfrom fd_dsa.serve.listener import connection_limit\n"
        "from fd_dsa.errors import ConfigError\n"
        "soft, hard, asked = map(int, sys.argv[1:])\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))\n"
        "try:\n    limit = connection_limit(asked or None)\n"
        "except ConfigError as error:\n    sys.exit(str(error))\n"
        "print(limit, *resource.getrlimit(resource.RLIMIT_NOFILE))"
    )

    def tried(*numbers: int, status: int = 0) -> subprocess.CompletedProcess[str]:
        return finish(tmp_path, [sys.executable, "-c", code, *map(str, numbers)], status)

    def limits(soft: int, hard: int) -> list[int]:
        return [int(word) for word in tried(soft, hard, 0).stdout.split()]

    assert limits(30, hard)[1:] == [hard, hard]
    few, *files = limits(20, 200)
    assert files == [200, 200] and 100 < few < 160
    assert limits(5000, 5000)[0] == 4096
    for numbers, text in (
        ((200, 200, 190), "--max-connections: got 190, allowed: at most 1"),
        ((30, 30, 0), "ulimit -n: the process may open 30 files, the server keeps"),
    ):
        assert tried(*numbers, status=1).stderr.startswith(text)


def _post(body: dict[str, Any], version: bytes = b"1.1") -> bytes:
    content = json.dumps(body).encode()
    head = HEAD.replace(b"HTTP/1.1", b"HTTP/" + version)
    return head + b"Content-Length: %d\r\n\r\n" % len(content) + content


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_has_ended_its_sending_gets_its_answer(stream: bool) -> None:
    with running(FakeEngine(step_s=0.02)) as live, connected(live.url) as connection:
        connection.sendall(_post({"prompt": "a", "stream": stream}))
        connection.shutdown(socket.SHUT_WR)
        # the server closes the connection after its answer
        answer = b"".join(iter(lambda: connection.recv(65536), b""))
        interim, _, answer = answer.partition(b"\r\n\r\n")
        assert interim == b"HTTP/1.1 100 Continue"
        assert answer.startswith(b"HTTP/1.1 200 OK\r\n") and b'"finish_reason":"stop"' in answer
        assert live.engine.closed == []


def test_a_stream_without_tokens_ends_when_its_client_has_left() -> None:
    silent = FakeEngine(step_s=3600)
    with running(silent, sse_ping_interval=3600) as live:
        with connected(live.url) as connection:
            connection.sendall(_post({"prompt": "a", "stream": True}))
            wait_until(lambda: bool(live.engine.requests))
            assert connection.recv(65536).startswith(b"HTTP/1.1 200 OK\r\n")
        wait_until(lambda: len(live.engine.closed) == 1)


def test_half_a_request_of_a_client_that_sends_no_more_is_dropped() -> None:
    with running(FakeEngine()) as live, connected(live.url) as connection:
        connection.sendall(_post({"prompt": "a"})[:-1])
        connection.shutdown(socket.SHUT_WR)
        assert connection.recv(1) == b""


def test_a_client_of_http_1_0_that_has_ended_its_sending_has_left() -> None:
    """It knows no interim response, which would tell the two apart."""
    with running(FakeEngine(step_s=0.02, max_model_len=10_000)) as live:
        with connected(live.url) as connection:
            connection.sendall(_post({**ENDLESS, "stream": False}, b"1.0"))
            wait_until(lambda: bool(live.engine.requests))
            connection.shutdown(socket.SHUT_WR)
            assert connection.recv(1) == b""
        wait_until(lambda: len(live.engine.closed) == 1)
