"""Host headers: what a page that resolves its name to this machine must not reach."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from fd_dsa.serve.errors import ApiError
from fd_dsa.serve.guard import host_rule
from tests.serve.conftest import Live, exchange, running
from tests.serve.fake_engine import FakeEngine
from tests.serve.processes import FAKE, serving
from tests.serve.test_errors import error_of


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
            rule.check(value)


def test_a_client_of_http_1_0_needs_no_host(local: Live) -> None:
    assert exchange(local.url, b"GET /health HTTP/1.0\r\n\r\n").startswith(b"HTTP/1.1 200 ")
    answer = exchange(local.url, b"GET /health HTTP/1.0\r\nHost: evil.com\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 403 ")


def test_the_flag_of_a_process(tmp_path: Path) -> None:
    with serving(tmp_path, "--allowed-host", "box.example", body=FAKE) as server:
        for host, status in (("evil.com", 403), ("box.example", 200), ("localhost:1", 200)):
            answer = httpx.get(f"{server.url}/v1/models", headers={"Host": host}, timeout=60)
            assert answer.status_code == status
