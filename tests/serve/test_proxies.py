"""HEAD, idle connections and quiet streams, as proxies in front of the server need them."""

from __future__ import annotations

import time
from typing import Any

import httpx
import pytest

from fd_dsa.client.remote import read_event
from fd_dsa.serve.flags import ServerOptions
from tests.serve.conftest import TIMEOUT_S, Live, connected, exchange, running
from tests.serve.fake_engine import WORDS, FakeEngine
from tests.serve.test_connections import ENDLESS
from tests.serve.test_guard import every_route

KEY = {"Authorization": "Bearer secret"}
FILES = ["/static/page.js", "/static/nothing.js", "/nothing", "/v1/models/nothing"]
# headers that differ between two answers
VARYING = {"date", "x-request-id", "content-length"}


@pytest.mark.parametrize("headers", [KEY, {}])
def test_head_is_get_without_a_body(headers: dict[str, str]) -> None:
    with running(FakeEngine(), api_key=["secret"]) as live:
        paths = {path for method, path in every_route(live) if method == "GET"}
        assert {"/", "/docs", "/health", "/metrics", "/openapi.json", "/server_info"} <= paths
        for path in [*sorted(paths), *FILES]:
            # over one connection: bytes of a body would be read as the next answer
            head, get = (live.http.request(m, path, headers=headers) for m in ("HEAD", "GET"))
            assert (head.status_code, head.content) == (get.status_code, b""), path
            length = int(head.headers["content-length"])
            # metrics count the requests between
            assert length == len(get.content) or (path == "/metrics" and length > 100)
            for name in {*head.headers, *get.headers} - VARYING:
                assert head.headers.get(name) == get.headers.get(name), (path, name)


def test_head_of_a_path_for_other_methods(live: Live) -> None:
    answer = live.http.head("/v1/completions")
    assert (answer.status_code, answer.headers["allow"], answer.content) == (405, "POST", b"")
    assert live.http.post("/v1/models").headers["allow"] == "GET, HEAD"


def test_head_is_refused_without_a_body() -> None:
    engine = FakeEngine(step_s=0.05, max_model_len=10_000)
    with (
        running(engine, max_connections=1) as live,
        live.http.stream("POST", "/v1/completions", json=ENDLESS),
    ):
        answer = exchange(live.url, b"HEAD /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert answer.startswith(b"HTTP/1.1 503 ") and answer.endswith(b"\r\n\r\n")
        assert answer.count(b"\r\n\r\n") == 1
        probe = exchange(live.url, b"HEAD /health HTTP/1.0\r\n\r\n")
        assert probe.startswith(b"HTTP/1.1 200 ") and probe.endswith(b"\r\n\r\n")


def test_an_idle_connection_is_kept_for_as_long_as_asked(live: Live) -> None:
    assert ServerOptions().timeout_keep_alive > 60
    with running(FakeEngine(), timeout_keep_alive=1) as other:
        kept, closed = connected(live.url), connected(other.url)
        with kept, closed:
            for connection in (kept, closed):
                connection.sendall(b"HEAD /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
                assert connection.recv(65536).startswith(b"HTTP/1.1 200 ")
            begin = time.monotonic()
            assert closed.recv(1) == b""
            assert 0.5 < time.monotonic() - begin < TIMEOUT_S / 2
            # uvicorn's own limit is 5 s
            assert live.server.config.timeout_keep_alive == 75
            kept.sendall(b"HEAD /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert kept.recv(65536).startswith(b"HTTP/1.1 200 ")


BODIES: list[tuple[str, dict[str, Any]]] = [
    ("/v1/completions", {"prompt": "a"}),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}]}),
]


@pytest.mark.parametrize(("path", "body"), BODIES)
def test_a_stream_that_waits_has_comments(path: str, body: dict[str, Any]) -> None:
    engine = FakeEngine(step_s=0.01)
    with running(engine, sse_ping_interval=0.03) as live:
        engine.is_held = True
        num_pings = 0
        with live.http.stream("POST", path, json={**body, "stream": True}) as answer:
            # the head is here, and no token
            assert answer.status_code == 200
            lines = []
            for line in answer.iter_lines():
                lines.append(line)
                num_pings += line == ": ping"
                engine.is_held = num_pings < 3
        assert num_pings >= 3
        assert lines[-2:] == ["data: [DONE]", ""]
        assert {line.partition(": ")[0] for line in lines} <= {"data", "", ": ping"}
        # each ping is an event of its own
        assert all(lines[i + 1] == "" for i, line in enumerate(lines) if line)
        chunks = [chunk for line in lines if (chunk := read_event(line)) is not None]
        texts = [c["choices"][0].get("text") or c["choices"][0].get("delta", {}) for c in chunks]
        assert "".join(t if isinstance(t, str) else t.get("content", "") for t in texts) == (
            "".join(WORDS)
        )


def test_clients_ignore_the_comments() -> None:
    engine = FakeEngine(step_s=0.03)
    with running(engine, sse_ping_interval=0.005) as live:
        stream = live.client.completions.create(model="demo", prompt="a", stream=True)
        assert "".join(chunk.choices[0].text for chunk in stream) == "".join(WORDS)
        # a client that goes away ends the request and its comments
        with httpx.Client(base_url=live.url) as http:
            body = {"prompt": "a", "stream": True, "ignore_eos": True, "max_tokens": 200}
            with http.stream("POST", "/v1/completions", json=body) as answer:
                next(answer.iter_lines())
        deadline = time.monotonic() + TIMEOUT_S
        while not engine.closed:
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_no_comments_unless_asked_for_or_needed() -> None:
    engine = FakeEngine(step_s=0.02)
    for interval_s in (0, 15):
        with running(engine, sse_ping_interval=interval_s) as live:
            answer = live.http.post("/v1/completions", json={"prompt": "a", "stream": True})
            assert "ping" not in answer.text
