"""Keys, hosts, limits of bodies and of concurrency: what is refused before a route is reached."""

from __future__ import annotations

import contextlib
import json
import socket
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from fd_dsa.serve.errors import ApiError, is_anthropic
from fd_dsa.serve.guard import OPEN_PATHS, host_rule
from tests.serve.conftest import Live, exchange, running, wait_until
from tests.serve.fake_engine import FakeEngine
from tests.serve.test_errors import complete, error_of
from tests.serve.test_heads import before_it_is_closed, dripped

KEYS = ("first-key", "zweiter-schlüssel")


@pytest.fixture(scope="module")
def guarded() -> Iterator[Live]:
    """A server with two keys."""
    with running(FakeEngine(), api_key=KEYS) as live:
        yield live


def every_route(live: Live) -> list[tuple[str, str]]:
    """Method and path of every route that the application has, hidden ones included."""
    routes = live.server.config.app.routes  # type: ignore[union-attr]
    found = [(m, r.path) for r in _flat(routes) for m in (getattr(r, "methods", None) or ())]
    assert len(found) > 12
    return [(method, path.replace("{name:path}", "demo")) for method, path in found]


def _flat(routes: Any) -> Iterator[Any]:
    """Routes, those of included routers too."""
    for route in routes:
        inner = getattr(route, "routes", None) or getattr(
            getattr(route, "original_router", None), "routes", None
        )
        if inner:
            yield from _flat(inner)
        else:
            yield route


def test_every_route_but_the_open_ones_asks_for_a_key(guarded: Live) -> None:
    paths = set()
    for method, path in every_route(guarded):
        answer = guarded.http.request(method, path)
        paths.add(path)
        if path in OPEN_PATHS:
            assert answer.status_code == 200, path
        elif method == "HEAD":
            assert answer.status_code == 401
        elif is_anthropic(path):
            assert (answer.status_code, answer.json()["type"]) == (401, "error"), path
        else:
            error = error_of(answer, 401)
            assert (error["type"], error["code"]) == ("authentication_error", "invalid_api_key")
            assert answer.headers["www-authenticate"] == "Bearer"
    assert {"/v1/completions", "/tokenize", "/server_info", "/v1/models/demo"} <= paths


@pytest.mark.parametrize(
    "path",
    ["/v1/embeddings", "/nothing", "//v1/models", "/v1/completions/", "/metrics/", "/HEALTH"],
)
def test_paths_that_are_no_routes_ask_too(guarded: Live, path: str) -> None:
    error_of(guarded.http.post(path), 401)
    error_of(guarded.http.get(path), 401)


@pytest.mark.parametrize(
    "header",
    [
        "Bearer wrong",
        "Bearer",
        "Bearer first-ke",
        "Bearer first-key2",
        "Basic first-key",
        "first-key",
        "Bearer first-key,zweiter-schlüssel",
    ],
)
def test_wrong_keys_are_refused(guarded: Live, header: str) -> None:
    body = {"prompt": "a"}
    headers = {"Authorization": header.encode()}
    answer = guarded.http.post("/v1/completions", json=body, headers=headers)
    assert "Bearer KEY" in error_of(answer, 401)["message"]
    assert "first-key" not in answer.text
    assert not guarded.engine.requests


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("scheme", ["Bearer", "bearer"])
def test_each_key_opens(guarded: Live, key: str, scheme: str) -> None:
    headers = {"Authorization": f"{scheme} {key}".encode()}
    answer = guarded.http.post("/tokenize", json={"prompt": "a"}, headers=headers)
    assert answer.status_code == 200


def body_of(num_bytes: int) -> bytes:
    """A completion of so many bytes."""
    head = b'{"prompt": "a", "user": "'
    return head + b"x" * (num_bytes - len(head) - 2) + b'"}'


def test_long_bodies_are_refused_with_and_without_a_length() -> None:
    with running(FakeEngine(), max_body_size=1000) as live:
        for path in ("/v1/completions", "/v1/chat/completions", "/tokenize"):
            for content in (body_of(1001), iter([body_of(700), b" " * 700])):
                answer = live.http.post(path, content=content, headers=JSON)
                error = error_of(answer, 413)
                assert "1000 bytes, the --max-body-size" in error["message"]
                assert error["type"] == "invalid_request_error"
        for content in (body_of(1000), iter([body_of(900), b" " * 100])):
            answer = live.http.post("/v1/completions", content=content, headers=JSON)
            assert answer.status_code == 200


JSON = {"Content-Type": "application/json"}


@pytest.mark.parametrize("is_chunked", [False, True], ids=["a length", "chunks"])
def test_a_client_that_sends_before_it_reads_gets_its_413(is_chunked: bool) -> None:
    """A close while bytes arrive would reset the connection, and the answer would be lost."""
    body = body_of(32 << 20)
    length = f"Content-Length: {len(body)}"
    if is_chunked:
        length, body = "Transfer-Encoding: chunked", b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)
    head = f"POST /v1/completions HTTP/1.1\r\nHost: a\r\n{length}\r\n"
    sent = head.encode() + b"Content-Type: application/json\r\n\r\n" + body
    with running(FakeEngine(), max_body_size=1000) as live:
        host, _, port = live.url.removeprefix("http://").partition(":")
        with socket.create_connection((host, int(port)), timeout=30) as client:
            client.sendall(sent)
            assert client.recv(1 << 16).startswith(b"HTTP/1.1 413 ")
            # the server dropped the rest of the body
            client.sendall(b"GET /version HTTP/1.1\r\nHost: a\r\n\r\n")
            assert client.recv(1 << 16).startswith(b"HTTP/1.1 200 ")


def test_a_body_that_does_not_end_is_a_408() -> None:
    """Bytes that come one by one do not put it off."""
    with running(FakeEngine(), body_timeout_s=0.3) as live:
        head = (
            b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
            b"Content-Length: 100\r\n\r\n{"
        )
        answer = before_it_is_closed(lambda: dripped(live, head))
        assert answer.startswith(b"HTTP/1.1 408 ")
        error = json.loads(answer.partition(b"\r\n\r\n")[2])["error"]
        assert "did not come within 0.3 s" in error["message"]
        # what it held is given back
        wait_until(lambda: live.state.num_admitted == 0)


def test_more_than_the_limit_is_a_429_and_then_served_again() -> None:
    with running(FakeEngine(step_s=0.05, max_model_len=10_000), max_concurrency=2) as live:
        # minutes: both are there until their clients leave
        endless = {"prompt": "a", "max_tokens": 5000, "ignore_eos": True, "stream": True}
        with live.http.stream("POST", "/v1/completions", json=endless):
            with live.http.stream("POST", "/v1/completions", json=endless):
                for path in ("/v1/completions", "/v1/chat/completions"):
                    body = {"prompt": "a", "messages": [{"role": "user", "content": "a"}]}
                    answer = live.http.post(path, json=body)
                    error = error_of(answer, 429)
                    assert (error["type"], error["code"]) == (
                        "rate_limit_error",
                        "too_many_requests",
                    )
                    assert "--max-concurrency is 2" in error["message"]
                    assert int(answer.headers["retry-after"]) >= 1
                with pytest.raises(openai.RateLimitError):
                    live.client.completions.create(model="demo", prompt="a")
                # what computes nothing is served all the time
                assert live.http.get("/health").status_code == 200
                assert live.http.get("/v1/models").status_code == 200
            wait_until(lambda: complete(live).status_code == 200)


def test_every_prompt_of_a_request_counts() -> None:
    with running(FakeEngine(), max_concurrency=3) as live:
        assert len(complete(live, prompt=["a", "b", "c"]).json()["choices"]) == 3
        error = error_of(complete(live, prompt=["a", "b", "c", "d"]), 400)
        assert error["param"] == "prompt"
        assert "4 outputs, --max-concurrency is 3" in error["message"]
        assert error_of(complete(live, prompt=["a", "b"], n=2), 400)["param"] == "n"
        chat = {"messages": [{"role": "user", "content": "a"}], "n": 4}
        assert error_of(live.http.post("/v1/chat/completions", json=chat), 400)["param"] == "n"
        # refused and failed ones hold nothing
        for fields in ({"temperature": -1}, {"prompt": [999]}, {"model": "other"}, {"prompt": []}):
            for _ in range(4):
                assert complete(live, **fields).status_code in (400, 404)
        wait_until(lambda: live.state.num_admitted == 0)


@pytest.fixture(scope="module")
def local() -> Iterator[Live]:
    """A server on 127.0.0.1 that was started with a name of its own."""
    rule = host_rule("localhost", "127.0.0.1", ["Box.Example", "[fe80::1]"])
    with running(FakeEngine(), hosts=rule) as live:
        yield live


@pytest.mark.parametrize(
    "host",
    [
        *("localhost", "LOCALHOST:1", "localhost.", "127.0.0.1", "127.1.2.3:8000", "[::1]:80"),
        *("box.example", "box.example.:443", "BOX.EXAMPLE:", "[fe80::1]:8000"),
    ],
)
def test_names_of_this_machine_are_served_with_any_port(local: Live, host: str) -> None:
    for path in ("/v1/models", "/health"):
        assert local.http.get(path, headers={"Host": host}).status_code == 200


@pytest.mark.parametrize(
    "host",
    [
        *("evil.com", "evil.com:8000", "localhost.evil.com", "127.0.0.1.evil.com", "", ":80"),
        *("localhost:80:80", "localhost@evil.com", "user@localhost", "a/localhost", "0.0.0.0"),
        *("192.168.1.2", "[::2]", "::1", "[localhost]", "127.0.0.1, evil.com", "x" * 3000, "*"),
    ],
)
def test_other_names_are_refused_on_every_path(local: Live, host: str) -> None:
    for path in ("/v1/models", "/health", "/", "/metrics", "/nothing"):
        error = error_of(local.http.get(path, headers={"Host": host}), 403)
        assert error["code"] == "host_not_allowed"
        assert error["message"].startswith(f'Host: got "{host[:50]}')
        assert "--allowed-host" in error["message"]
        assert len(error["message"]) < 250
    refused = {"Host": host}
    error_of(local.http.post("/v1/completions", json={"prompt": "a"}, headers=refused), 403)
    assert not local.engine.requests


@pytest.mark.parametrize(
    ("host", "bound", "allowed", "value", "served"),
    [
        ("127.0.0.1", "127.0.0.1", (), "evil.com", False),
        ("127.0.0.1", "127.0.0.1", ("*",), "evil.com", True),
        ("::1", "::1", (), "[::1]:8000", True),
        ("::1", "::1", (), "evil.com", False),
        ("myhost", "127.0.1.1", (), "myhost:8000", True),
        # on an interface that others reach there is no check unless it is asked for
        ("0.0.0.0", "0.0.0.0", (), "evil.com", True),
        ("0.0.0.0", "0.0.0.0", ("api.example",), "evil.com", False),
        ("0.0.0.0", "0.0.0.0", ("api.example",), "api.example", True),
        # as an orchestrator probes
        ("0.0.0.0", "0.0.0.0", ("api.example",), "10.1.2.3:8000", True),
        ("::", "::", ("api.example",), "[2001:db8::1]:8000", True),
    ],
)
def test_what_is_checked_follows_the_address(
    host: str, bound: str, allowed: tuple[str, ...], value: str, served: bool
) -> None:
    rule = host_rule(host, bound, allowed)
    with contextlib.nullcontext() if served else pytest.raises(ApiError, match="Host: got"):
        if rule is not None:
            rule(value)


def test_a_client_of_http_1_0_needs_no_host(local: Live) -> None:
    assert exchange(local.url, b"GET /health HTTP/1.0\r\n\r\n").startswith(b"HTTP/1.1 200 ")
    answer = exchange(local.url, b"GET /health HTTP/1.0\r\nHost: evil.com\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 403 ")
