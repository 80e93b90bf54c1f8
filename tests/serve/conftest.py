"""A real uvicorn server in a thread, over the fake engine."""

from __future__ import annotations

import asyncio
import functools
import json
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import openai
import pytest

from fd_dsa.engine.async_engine import AsyncEngine
from fd_dsa.serve.flags import ServerOptions
from fd_dsa.serve.server import DrainingServer, bind_socket
from fd_dsa.serve.state import Info, ServerState
from tests.serve.fake_engine import FakeEngine

# far longer than anything takes that a test waits for, also on a machine that starves it
TIMEOUT_S = 60.0
# each client reads the certificates of all authorities, which takes 50 ms of processor time
ssl.create_default_context = functools.cache(ssl.create_default_context)


class PromptServer(DrainingServer):
    """A server that looks ten times as often whether it has to end."""

    async def main_loop(self) -> None:
        """Tick until the end."""
        while not await self.on_tick(0):
            await asyncio.sleep(0.01)


@dataclass
class Live:
    """A running server.

    Attributes:
        url: without a path.
        engine: that it serves.
        client: the real OpenAI client, without retries.
        http: a plain HTTP client.
        server: the uvicorn server, in a thread of this process.
        state: of its application.
    """

    url: str
    engine: Any
    client: openai.OpenAI
    http: httpx.Client
    server: DrainingServer
    state: ServerState


@contextmanager
def running(
    engine: FakeEngine | AsyncEngine,
    names: tuple[str, ...] = ("demo", "alias"),
    info: Info | None = None,
    **options: Any,
) -> Iterator[Live]:
    """Serve `engine` on a free port until the block ends; `options` are fields of ServerOptions."""
    sock = bind_socket("127.0.0.1", 0)
    state = ServerState(names, info, ServerOptions(**options))
    ready = threading.Event()
    server = PromptServer(state, lambda _: engine, 1.0, ready.set)
    server.config.timeout_graceful_shutdown = 2
    thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]}, daemon=True)
    url = f"http://127.0.0.1:{sock.getsockname()[1]}"
    thread.start()
    try:
        assert ready.wait(TIMEOUT_S)
        with (
            openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client,
            httpx.Client(base_url=url, timeout=TIMEOUT_S) as http,
        ):
            yield Live(url, engine, client, http, server, state)
    finally:
        server.should_exit = True
        thread.join(TIMEOUT_S)
    assert not thread.is_alive()


@pytest.fixture(scope="module")
def live() -> Iterator[Live]:
    """A server for tests that leave it as it was; names `demo` and `alias`."""
    with running(FakeEngine()) as server:
        yield server


@pytest.fixture(scope="module")
def v32() -> Iterator[Live]:
    """A server of DeepSeek-V3.2's encoding."""
    # the module imports this one
    from tests.serve.test_tool_calls import V32, engine_of

    with running(engine_of(V32)) as server:
        yield server


@contextmanager
def held_port() -> Iterator[int]:
    """A port of 127.0.0.1 that nobody else is given; nobody listens there, a server still can."""
    with socket.socket() as held:
        # a server that sets it too may have the port as long as this one does not listen
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.bind(("127.0.0.1", 0))
        yield int(held.getsockname()[1])


def wait_until(condition: Callable[[], bool], timeout_s: float = TIMEOUT_S) -> None:
    """Return as soon as the condition holds; fail after `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true in time"
        time.sleep(0.01)


def connected(url: str) -> socket.socket:
    """A connection to the server at this URL."""
    parts = httpx.URL(url)
    return socket.create_connection((parts.host, parts.port or 80), timeout=TIMEOUT_S)


def exchange(url: str, data: bytes) -> bytes:
    """Return a server's answer to bytes, until it closes the connection."""
    with connected(url) as connection:
        connection.sendall(data)
        answer = b""
        while part := connection.recv(65536):
            answer += part
    return answer


def stream_data(text: str) -> list[str]:
    """The data of a stream's events, without the pings that a busy server sends."""
    events = [event for event in text.strip().split("\n\n") if not event.startswith(":")]
    assert all("data: " in event for event in events), events
    return [event.partition("data: ")[2] for event in events]


def chunks_of(answer: httpx.Response) -> list[dict[str, Any]]:
    """The chunks of a stream that came to its end."""
    *chunks, end = stream_data(answer.text)
    assert end == "[DONE]"
    return [json.loads(chunk) for chunk in chunks]
