"""The process around the application: socket, signals, drain, exit status."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import shlex
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import uvicorn

from fd_dsa.errors import ConfigError
from fd_dsa.serve.app import create_app
from fd_dsa.serve.state import ServerState

if TYPE_CHECKING:
    from fd_dsa.engine.async_engine import AsyncEngine

_BACKLOG = 2048
# after the drain: time for the last bytes of aborted answers
_LAST_RESPONSES_S = 5
_SIGNALS = (signal.SIGINT, signal.SIGTERM)

logger = logging.getLogger("fd_dsa.serve")


def bind_socket(host: str, port: int) -> socket.socket:
    """A socket that holds `host:port` but does not listen yet, so that nobody is served early.

    Args:
        host: name or address of an interface.
        port: 0 lets the system choose.

    Raises:
        ConfigError: the address cannot be had; names host and port.
    """
    try:
        family, kind, proto, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except socket.gaierror as error:
        raise ConfigError(
            f"--host: got {host!r}, which is no address of this machine ({error.strerror}); "
            "use 127.0.0.1, or 0.0.0.0 for all interfaces"
        ) from error
    sock = socket.socket(family, kind, proto)
    try:
        # a port in TIME_WAIT is free
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
    except OSError as error:
        sock.close()
        raise _bind_error(host, port, error) from error
    return sock


def _bind_error(host: str, port: int, error: OSError) -> ConfigError:
    """Why the address cannot be had."""
    where = format_address(host, port)
    reason = (error.strerror or str(error)).lower()
    return ConfigError(
        f"{where}: {reason}; stop the process that has it or choose another --host or --port"
    )


def format_address(host: str, port: int) -> str:
    """`host:port`, IPv6 addresses in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def base_url(host: str, sock: socket.socket) -> str:
    """The URL under which a client on this machine reaches the socket."""
    local = {"0.0.0.0": "127.0.0.1", "": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://{format_address(local, sock.getsockname()[1])}"


def curl_line(url: str, model: str, max_model_len: int, chat: bool) -> str:
    """A shell command which asks the server something, as it can be pasted.

    Args:
        url: of the server, without a path.
        model: a served name.
        max_model_len: of the engine; the answer takes at most an eighth of it.
        chat: the model has a chat template.
    """
    question = "Hello! What can you do?"
    body: dict[str, object] = {"model": model}
    if chat:
        path = "/v1/chat/completions"
        body["messages"] = [{"role": "user", "content": question}]
    else:
        path = "/v1/completions"
        body["prompt"] = "Once upon a time"
    body.update(max_tokens=max(1, min(64, max_model_len // 8)), temperature=0)
    data = shlex.quote(json.dumps(body, ensure_ascii=False))
    return f"curl {url}{path} -H 'Content-Type: application/json' -d {data}"


def run_server(
    engine: AsyncEngine,
    served_model_names: Sequence[str],
    sock: socket.socket,
    *,
    shutdown_timeout_s: float,
    on_ready: Callable[[], None],
    info: Callable[[], dict[str, Any]] = dict,
) -> int:
    """Serve until a signal arrives or the engine fails.

    The first SIGINT or SIGTERM drains; a second one ends the process at once.

    Args:
        engine: not started yet.
        served_model_names: names for the `model` field of requests.
        sock: bound, not listening; closed at the end.
        shutdown_timeout_s: longest wait for running requests after the first signal.
        on_ready: called once, when requests are served.
        info: what /server_info tells; called once, when it is first asked.

    Returns:
        Exit status: 0 after a drain, 1 after an engine failure.

    Raises:
        ConfigError: another process began to listen on the address in the meantime.
    """
    try:
        sock.listen(_BACKLOG)
    except OSError as error:
        host, port = sock.getsockname()[:2]
        raise _bind_error(host, port, error) from error
    app = create_app(engine, served_model_names, info)
    config = uvicorn.Config(
        app,
        log_config=None,
        backlog=_BACKLOG,
        server_header=False,
        timeout_graceful_shutdown=_LAST_RESPONSES_S,
    )
    server = DrainingServer(config, app.state.server, shutdown_timeout_s, on_ready)
    server.run(sockets=[sock])
    return server.exit_status


class DrainingServer(uvicorn.Server):
    """uvicorn's server, which drains on the first signal and watches the engine.

    Args:
        config: of uvicorn.
        state: of the application.
        shutdown_timeout_s: longest wait for running requests.
        on_ready: called once, when requests are served.
    """

    def __init__(
        self,
        config: uvicorn.Config,
        state: ServerState,
        shutdown_timeout_s: float,
        on_ready: Callable[[], None],
    ) -> None:
        super().__init__(config)
        self.exit_status = 0
        self._state = state
        self._shutdown_timeout_s = shutdown_timeout_s
        self._on_ready = on_ready
        self._drain: asyncio.Task[None] | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Open the port, then tell."""
        await super().startup(sockets=sockets)
        if self.started:
            self._on_ready()

    async def on_tick(self, counter: int) -> bool:
        """Called ten times a second; True ends the server."""
        error = self._state.engine.errored
        if error is not None and not self.should_exit:
            logger.error("the engine has failed: %r; shutting down", error)
            self.exit_status = 1
            self.should_exit = True
        return await super().on_tick(counter)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Handle signals in the event loop while serving; only the main thread can."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        loop = asyncio.get_running_loop()
        for number in _SIGNALS:
            loop.add_signal_handler(number, self.handle_signal, number)
        try:
            yield
        finally:
            for number in _SIGNALS:
                loop.remove_signal_handler(number)

    def handle_signal(self, number: int) -> None:
        """First signal: drain, then end. Second: end now, with the shell's status for it."""
        if self._drain is not None:
            logger.warning("second signal: stopping at once")
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(128 + number)
        self._drain = asyncio.get_running_loop().create_task(self._drain_and_exit())

    async def _drain_and_exit(self) -> None:
        """Drain, then let uvicorn close."""
        logger.info(
            "shutting down: %d requests running, waiting up to %g s; another signal stops at once",
            len(self._state.active),
            self._shutdown_timeout_s,
        )
        try:
            await self._state.drain(self._shutdown_timeout_s)
        finally:
            self.should_exit = True
