"""A real uvicorn server in a thread, over the fake engine."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import httpx
import openai
import pytest
import uvicorn

from fd_dsa.engine.async_engine import AsyncEngine
from fd_dsa.serve.app import create_app
from fd_dsa.serve.h11_protocol import StrictH11Protocol
from fd_dsa.serve.options import ChatSettings, ServerOptions
from fd_dsa.serve.server import DrainingServer, bind_socket
from tests.serve.fake_engine import FakeEngine


@dataclass
class Live:
    """A running server.

    Attributes:
        url: without a path.
        engine: behind it.
        client: the real OpenAI client, without retries.
        http: a plain HTTP client.
        server: the uvicorn server, in a thread of this process.
    """

    url: str
    engine: Any
    client: openai.OpenAI
    http: httpx.Client
    server: DrainingServer


@contextmanager
def running(
    engine: FakeEngine | AsyncEngine,
    names: tuple[str, ...] = ("demo", "alias"),
    info: Callable[[], dict[str, Any]] = dict,
    options: ServerOptions | None = None,
    chat_settings: ChatSettings | None = None,
) -> Iterator[Live]:
    """Serve `engine` on a free port until the block ends."""
    sock = bind_socket("127.0.0.1", 0)
    options = replace(options or ServerOptions(), chat=chat_settings or ChatSettings())
    app = create_app(engine, names, info, options)
    config = uvicorn.Config(
        app, http=StrictH11Protocol, log_config=None, timeout_graceful_shutdown=2
    )
    ready = threading.Event()
    server = DrainingServer(config, app.state.server, 1.0, ready.set)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]}, daemon=True)
    url = f"http://127.0.0.1:{sock.getsockname()[1]}"
    thread.start()
    try:
        assert ready.wait(60)
        with (
            openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client,
            httpx.Client(base_url=url, timeout=20) as http,
        ):
            yield Live(url, engine, client, http, server)
    finally:
        server.should_exit = True
        thread.join(60)
    assert not thread.is_alive()


@pytest.fixture(scope="module")
def live() -> Iterator[Live]:
    """A server for tests that leave it as it was; names `demo` and `alias`."""
    with running(FakeEngine()) as server:
        yield server


@contextmanager
def held_port() -> Iterator[int]:
    """A port of 127.0.0.1 that nobody else is given; nobody listens there, a server still can."""
    with socket.socket() as held:
        # a server that sets it too may have the port as long as this one does not listen
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.bind(("127.0.0.1", 0))
        yield int(held.getsockname()[1])


def wait_until(condition: Callable[[], bool], timeout_s: float = 20.0) -> None:
    """Return as soon as the condition holds; fail after `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true in time"
        time.sleep(0.01)
