"""The listening socket, which limits connections and closes waiting ones to make room.

When a process runs out of descriptors, asyncio's own accept loop tries and logs once for each
connection of the backlog. This listener stops accepting before that, when no connection can be
closed.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import resource
import socket
import sys
from collections import deque
from collections.abc import Callable
from typing import Protocol

from fd_dsa.errors import ConfigError
from fd_dsa.serve.flags import DEFAULT_MAX_CONNECTIONS

PROBE_PATHS = frozenset({"/health", "/livez", "/readyz", "/startupz"})
"""Paths of an orchestrator's probes, which are answered in every state of the server."""
BACKLOG = 2048
"""Connections that the kernel holds until they are accepted."""
PROBE_CONNECTIONS = 8
"""Connections beyond the limit, on which probes are still answered."""
# files of the model, pipes of the engine, and compilers
_KEPT_DESCRIPTORS = 40
# connections accepted in one turn of the loop; accepting one takes 20 us
_ACCEPTS_AT_ONCE = 64
_PEEKED_BYTES = 64
_PROBE_TARGETS = frozenset(path.encode() for path in PROBE_PATHS)
_RETRY_S = 0.02

logger = logging.getLogger("fd_dsa.serve")


class ClientConnection(Protocol):
    """Connection of a client, as the listener sees it."""

    @property
    def transport(self) -> asyncio.Transport:
        """Transport of the connection."""

    @property
    def has_unread(self) -> bool:
        """True if the client has sent bytes that were not read."""


class Listener:
    """Accepts and counts connections. Only the event loop may call it.

    A connection waits while none of its requests is in progress: it is new, it is between two
    requests, or the head or the rest of a refused request is arriving. `limit` connections may have
    a request in progress. `PROBE_CONNECTIONS` more are accepted. Beyond that, each new connection
    replaces the one that has waited longest. A probe overtakes accepted connections that are not
    opened yet.

    Args:
        make_protocol: creates the protocol of a new connection, which reports to this listener.
    """

    def __init__(
        self,
        sock: socket.socket,
        limit: int,
        make_protocol: Callable[[Listener], asyncio.Protocol],
    ) -> None:
        self.limit = limit
        self._sock = sock
        self._make_protocol = make_protocol
        self._loop = asyncio.get_running_loop()
        # accepted connections, in the order in which they are opened
        self._accepted: deque[socket.socket] = deque()
        # the connection that has waited longest comes first
        self._waiting: dict[ClientConnection, None] = {}
        self._working: set[ClientConnection] = set()
        self._opening: set[asyncio.Task[object]] = set()
        self._is_open = self._is_paused = False

    @property
    def is_full(self) -> bool:
        """True if the limit of connections with a request in progress is reached."""
        return len(self._working) >= self.limit

    def is_probe(self, target: bytes) -> bool:
        """Return True if the target of a request, with or without a query, is a probe."""
        return target.partition(b"?")[0] in _PROBE_TARGETS

    def start(self) -> None:
        self._sock.setblocking(False)
        # Accept a connection with its first bytes, or a second later without any. In a flood of
        # idle connections, a probe is then not among those that wait for their request.
        self._sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_DEFER_ACCEPT, 1)
        self._sock.listen(BACKLOG)
        self._loop.add_reader(self._sock.fileno(), self._accept)
        self._is_open = True

    def close(self) -> None:
        """Stop accepting connections. The caller closes the socket."""
        if self._is_open:
            self._is_open = False
            self._loop.remove_reader(self._sock.fileno())
            while self._accepted:
                self._accepted.popleft().close()

    def add(self, connection: ClientConnection) -> None:
        self._waiting[connection] = None
        if not self._is_open:
            # it was being opened when the server began to close
            connection.transport.abort()

    def count_waiting(self, connection: ClientConnection) -> None:
        """Count a connection without a request in progress."""
        self._working.discard(connection)
        self._waiting.setdefault(connection)
        self._resume()

    def count_working(self, connection: ClientConnection) -> None:
        """Count a connection with a request in progress."""
        self._waiting.pop(connection, None)
        self._working.add(connection)

    def remove(self, connection: ClientConnection) -> None:
        self._waiting.pop(connection, None)
        self._working.discard(connection)
        self._resume()

    def _accept(self) -> None:
        for _ in range(_ACCEPTS_AT_ONCE):
            oldest = None
            num_connections = len(self._waiting) + len(self._working)
            num_connections += len(self._accepted) + len(self._opening)
            if num_connections >= self.limit + PROBE_CONNECTIONS:
                oldest = self._oldest()
                if oldest is None:
                    self._pause()
                    return
            try:
                sock, _ = self._sock.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:
                # the kernel continues to report a connection that could not be accepted
                logger.warning("cannot accept connections: %s; trying again", error)
                self._drop(self._oldest())
                self._pause()
                return
            sock.setblocking(False)
            self._drop(oldest)
            if self._asks_for_probe(sock):
                self._open(sock)
                continue
            self._accepted.append(sock)
            if len(self._accepted) == 1:
                self._loop.call_soon(self._open_accepted)

    def _asks_for_probe(self, sock: socket.socket) -> bool:
        """Return True if the first bytes of a new connection ask for a probe."""
        try:
            target = sock.recv(_PEEKED_BYTES, socket.MSG_PEEK).partition(b" ")[2]
        except OSError:
            return False
        return self.is_probe(target.partition(b" ")[0])

    def _open_accepted(self) -> None:
        """Open the next connection, and the others in later turns of the loop.

        A turn also begins one request (`Turns`). So few opened connections, which take memory, wait
        for their request.
        """
        if self._accepted:
            self._open(self._accepted.popleft())
        if self._accepted:
            self._loop.call_soon(self._open_accepted)

    def _open(self, sock: socket.socket) -> None:
        opening = self._loop.connect_accepted_socket(lambda: self._make_protocol(self), sock)
        task: asyncio.Task[object] = self._loop.create_task(opening)
        self._opening.add(task)
        task.add_done_callback(self._opened)

    def _opened(self, task: asyncio.Task[object]) -> None:
        """Forget an opening whose protocol has reported itself or whose client has left."""
        self._opening.discard(task)
        if not task.cancelled():
            # otherwise asyncio would log that the exception was never retrieved
            task.exception()

    def _oldest(self) -> ClientConnection | None:
        """Return the connection that has waited longest, preferably one that is not sending."""
        sending = None
        for connection in self._waiting:
            if connection.has_unread:
                continue
            # the kernel has every byte of its last answer
            if not connection.transport.get_write_buffer_size():
                return connection
            sending = sending or connection
        return sending

    def _drop(self, connection: ClientConnection | None) -> None:
        if connection is not None:
            del self._waiting[connection]
            connection.transport.abort()

    def _pause(self) -> None:
        """Stop accepting for a moment, or until a connection ends or waits."""
        self._is_paused = True
        self._loop.remove_reader(self._sock.fileno())
        self._loop.call_later(_RETRY_S, self._resume)

    def _resume(self) -> None:
        if self._is_open and self._is_paused:
            self._is_paused = False
            self._loop.add_reader(self._sock.fileno(), self._accept)


def connection_limit(requested: int | None) -> int:
    """Raise RLIMIT_NOFILE to its hard limit and divide the descriptors.

    Args:
        requested: value of --max-connections, or None without it.

    Returns:
        `requested`, or `DEFAULT_MAX_CONNECTIONS`, or fewer if the process may not open that many
        files.

    Raises:
        ConfigError: the process may not open as many files as `requested` needs, or as the
            server keeps.
    """
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    # the kernel refuses a hard limit above fs.nr_open
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if files == resource.RLIM_INFINITY:
        files = sys.maxsize
    kept = len(os.listdir("/proc/self/fd")) + _KEPT_DESCRIPTORS + PROBE_CONNECTIONS
    if files <= kept:
        raise ConfigError(
            f"ulimit -n: the process may open {files} files, the server keeps {kept} of them for "
            "files other than connections; raise the limit"
        )
    if requested is not None and requested > files - kept:
        raise ConfigError(
            f"--max-connections: got {requested}, allowed: at most {files - kept}, as the process "
            f"may open {files} files and keeps {kept} of them for other things; raise ulimit -n"
        )
    return requested or min(DEFAULT_MAX_CONNECTIONS, files - kept)
