"""The server process: socket, signals, drain, exit status."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import logging
import os
import shlex
import socket
import sys
import threading
from collections.abc import Callable, Coroutine, Iterator
from typing import TYPE_CHECKING

import psutil
import uvicorn

from fd_dsa.environment import format_address
from fd_dsa.errors import ConfigError, shorten, system_reason
from fd_dsa.serve.app import create_app
from fd_dsa.serve.h11_protocol import StrictH11Protocol
from fd_dsa.serve.listener import BACKLOG, Listener
from fd_dsa.serve.metrics import log_while_busy
from fd_dsa.serve.state import ServerState
from fd_dsa.signals import exit_at_once, signals_call
from fd_dsa.startup.progress import StartupProgress

if TYPE_CHECKING:
    from fd_dsa.engine.async_engine import AsyncEngine


def describe_port_owner(port: int) -> str:
    """Return the process that listens on a port, like `process 123 (python)`, "" if hidden."""
    with contextlib.suppress(psutil.Error, OSError):
        for one in psutil.net_connections("tcp"):
            if one.status == psutil.CONN_LISTEN and one.laddr.port == port and one.pid:
                return f"process {one.pid} ({psutil.Process(one.pid).name()})"
    return ""


KEY_VARIABLE = "FD_DSA_API_KEY"
"""Environment variable with the keys of a server, and of the command that it prints."""
Load = Callable[[StartupProgress], "AsyncEngine"]

LAST_RESPONSES_S = 5
"""Time after the drain for the last bytes of aborted answers, seconds."""
FORCED_EXIT_S = 45.0
"""Time limit for the rest of the shutdown, seconds.

The step in progress may take 30 s of it.
"""
# switch interval of Python's threads: the event loop waits up to this time for the interpreter, ten
# times for each probe (Python's default is 5 ms)
_SWITCH_INTERVAL_S = 0.0005
_BIND_CURES = {
    errno.EADDRINUSE: "stop the process that has it or choose another --host or --port",
    errno.EADDRNOTAVAIL: "no interface of this machine has it; choose another --host",
    errno.EACCES: "ports below 1024 need the right to it; choose another --port",
}

logger = logging.getLogger("fd_dsa.serve")


def bind_socket(host: str, port: int) -> socket.socket:
    """Bind a socket to `host:port` without listening, so that no client connects early.

    Args:
        port: 0 lets the system choose.

    Raises:
        ConfigError: the address is not available. The message names host and port.
    """
    try:
        family, kind, proto, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (socket.gaierror, UnicodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a host name"
        raise ConfigError(
            f"--host: got {shorten(host)}, which is no address of this machine ({reason}); "
            "use 127.0.0.1, or 0.0.0.0 for all interfaces"
        ) from error
    sock = socket.socket(family, kind, proto)
    try:
        # reuse a port in TIME_WAIT
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
    except OSError as error:
        sock.close()
        raise _bind_error(host, port, error) from error
    return sock


def _bind_error(host: str, port: int, error: OSError) -> ConfigError:
    where = format_address(host, port)
    reason = system_reason(error)
    owner = describe_port_owner(port) if error.errno == errno.EADDRINUSE else ""
    by = f" by {owner}" if owner else ""
    cure = _BIND_CURES.get(error.errno or 0, "choose another --host or --port")
    return ConfigError(f"{where}: {reason}{by}; {cure}")


def curl_command(url: str, model: str, max_model_len: int, chat: bool, num_keys: int = 0) -> str:
    """Return a shell command that asks the server a question, in lines that fit a terminal.

    Args:
        max_model_len: maximum sequence length in tokens. The answer takes at most an eighth of it.
        chat: True if the model has a chat template.
        num_keys: number of API keys. With keys the command reads one from `KEY_VARIABLE`, because
            the command may end in a log.
    """
    path, asked = "/v1/completions", '"prompt": "Once upon a time"'
    if chat:
        path = "/v1/chat/completions"
        asked = '"messages": [{"role": "user", "content": "Hello! What can you do?"}]'
    limit = max(1, min(64, max_model_len // 8))
    fields = (
        f'"model": {json.dumps(model, ensure_ascii=False)}',
        asked,
        f'"max_tokens": {limit}, "temperature": 0',
    )
    headers = ["-H 'Content-Type: application/json'"]
    if num_keys:
        # a server's variable may hold several keys, separated by commas
        key = f"${KEY_VARIABLE}" if num_keys == 1 else f"${{{KEY_VARIABLE}%%,*}}"
        headers.append(f'-H "Authorization: Bearer {key}"')
    data = "{" + ",\n  ".join(fields) + "}"
    # quoted, because zsh expands the brackets of an IPv6 address
    first, last = f"curl {shlex.quote(url + path)}", f"-d {shlex.quote(data)}"
    return " \\\n  ".join([first, *headers, last])


def try_line(num_keys: int) -> str:
    """Return the line before the `curl` command of a server with a number of API keys."""
    if not num_keys:
        return "Try:"
    return f"Set {KEY_VARIABLE} to a key of this server (export {KEY_VARIABLE}=KEY), try:"


class DrainingServer(uvicorn.Server):
    """uvicorn's server, which also loads the engine, watches it, and drains on a signal.

    While the engine loads, /health answers 503 with the phase, and a signal ends the process at
    once. Later the first SIGINT or SIGTERM drains, and the second one ends the process at once.

    Args:
        load: builds the engine, not started yet, in a thread.
        shutdown_timeout_s: maximum wait for running requests after the first signal, seconds.
        on_ready: called once, when requests are served.

    Attributes:
        start_error: the exception that ended loading, or None.
        forced_exit_s: time limit of the shutdown in seconds, after which the process is killed.
            None if the process is not this server's to end.
    """

    def __init__(
        self,
        state: ServerState,
        load: Load,
        shutdown_timeout_s: float,
        on_ready: Callable[[], None],
    ) -> None:
        super().__init__(
            uvicorn.Config(
                create_app(state),
                ws="none",
                log_config=None,
                server_header=False,
                timeout_keep_alive=state.options.timeout_keep_alive,
                timeout_graceful_shutdown=LAST_RESPONSES_S,
            )
        )
        self.exit_status = 0
        self.start_error: BaseException | None = None
        self.forced_exit_s: float | None = None
        self._state = state
        self._shutdown_timeout_s = shutdown_timeout_s
        self._on_ready = on_ready
        self._load = load
        # background tasks, kept here because the event loop only has weak references
        self._tasks: set[asyncio.Task[None]] = set()
        self._listener: Listener | None = None
        self._is_draining = False

    def serve_on(self, sock: socket.socket) -> int:
        """Listen on a bound socket, load the engine, and serve until a signal or a failure.

        Returns:
            Exit status: 0 after a drain, 1 after an engine failure.

        Raises:
            ConfigError: another process has begun to listen on the address.
            Exception: any exception of `load`.
        """
        try:
            sock.listen(BACKLOG)
        except OSError as error:
            host, port = sock.getsockname()[:2]
            raise _bind_error(host, port, error) from error
        self.forced_exit_s = FORCED_EXIT_S
        sys.setswitchinterval(_SWITCH_INTERVAL_S)
        self.run(sockets=[sock])
        if self.start_error is not None:
            raise self.start_error
        return self.exit_status

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Open the port, then load the engine."""
        await super().startup(sockets=[])
        if not self.started:
            return
        assert sockets is not None
        self._listener = Listener(
            sockets[0],
            self._state.options.max_connections,
            lambda listener: StrictH11Protocol(
                self.config, self.server_state, self.lifespan.state, listener
            ),
        )
        self._listener.start()
        self._spawn(self._load_engine())

    async def _load_engine(self) -> None:
        """Load the engine in a thread, which a signal does not wait for, then serve."""
        try:
            engine = await asyncio.to_thread(self._load, self._state.startup)
            engine.start()
            self._state.loaded_engine = engine
            self._state.startup.done(f"in {self._state.startup.elapsed_s:.1f} s")
            self._on_ready()
            self._spawn(log_while_busy(engine))
        except Exception as error:
            self.start_error = error
        except SystemExit as error:
            # SystemExit would end the event loop
            self.start_error = RuntimeError(f"the engine's loading ended with SystemExit: {error}")
        else:
            return
        self.should_exit = True

    def _spawn(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def on_tick(self, counter: int) -> bool:
        """Return True to end the server. uvicorn calls it ten times a second."""
        engine = self._state.loaded_engine
        error = None if engine is None else engine.errored
        if error is not None and not self.should_exit:
            logger.error("the engine has failed: %r; shutting down", error)
            self.exit_status = 1
            self.should_exit = True
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Close within a time limit, because a hanging thread would keep the process alive."""
        if self.forced_exit_s is not None:
            timer = threading.Timer(self.forced_exit_s, self._exit_in_any_case)
            timer.daemon = True
            timer.start()
        if self._listener is not None:
            self._listener.close()
        # they wait for the engine, which is about to stop
        for task in self._tasks:
            task.cancel()
        await super().shutdown(sockets=sockets)

    def _exit_in_any_case(self) -> None:
        logger.warning("something still runs after the shutdown; ending the process all the same")
        os._exit(self.exit_status)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Handle signals in the event loop while serving."""
        with signals_call(self.handle_signal):
            yield

    def handle_signal(self, number: int) -> None:
        """Drain on the first signal. End at once on the second one, or while loading.

        Ending at once uses the shell's exit status for the signal.
        """
        if self._state.loaded_engine is None:
            exit_at_once(number, "fd_dsa: error: interrupted while starting")
        if self._is_draining:
            exit_at_once(number, "fd_dsa: second signal, stopping at once")
        self._is_draining = True
        self._spawn(self._drain_and_exit())

    async def _drain_and_exit(self) -> None:
        logger.info(
            "shutting down: %d requests running, waiting up to %g s; another signal stops at once",
            self._state.num_accepted,
            self._shutdown_timeout_s,
        )
        try:
            await self._state.drain(self._shutdown_timeout_s)
        finally:
            self.should_exit = True
