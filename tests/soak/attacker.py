"""Sends one kind of request of `tests.soak.siege_cases`, in a worker of `benchmarks._harness`.

A process of its own, so that making and sending requests holds up no clock of the siege.
"""

from __future__ import annotations

import resource
import socket
import threading
import time
from collections import Counter
from contextlib import suppress

from tests.soak.hostile import HostileRequest
from tests.soak.siege_cases import CASES
from tests.soak.siege_requests import Facts

HOST = "127.0.0.1"
DRIP_EVERY_S = 0.1
INTERIM = b"HTTP/1.1 100 Continue\r\n\r\n"


def wire_form(request: HostileRequest, port: int) -> bytes:
    """The bytes of a request; none where it has no method."""
    if not request.method:
        return b""
    headers = [(b"host", b"%s:%d" % (HOST.encode(), port)), (b"connection", b"close")]
    headers += request.headers
    if not any(name == b"content-length" for name, _ in headers):
        headers.append((b"content-length", b"%d" % len(request.body)))
    lines = b"".join(b"%b: %b\r\n" % header for header in headers)
    start = f"{request.method} {request.path} HTTP/1.1\r\n".encode()
    return start + lines + b"\r\n" + request.body


class Attacker:
    """The requests of a case, sent as often as `start` is called.

    Args:
        case: a name of `CASES`.
        port: of the server, on this machine.
        facts: fields of `Facts`.
        patience_s: after which nobody waits for an answer any more.
    """

    def __init__(self, case: str, port: int, facts: dict[str, int], patience_s: float) -> None:
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
        self._case, self._facts = CASES[case], Facts(**facts)
        self._port, self._patience_s = port, patience_s
        self._made = self._case.requests(self._facts)
        self._lock = threading.Lock()

    def ready(self) -> bool:
        """Answered once the requests are made."""
        return True

    def start(self) -> bool:
        """Begin to send; True once the first request has left, at the latest after a second."""
        # a list is made once; more than fits into memory comes one by one
        is_list = isinstance(self._made, list)
        self._requests = iter(self._made if is_list else self._case.requests(self._facts))
        self._answers: Counter[str] = Counter()
        self._sent = threading.Event()
        self._begin = time.monotonic()
        target = self._client if self._case.hold_s is None else self._hold
        self._threads = [
            threading.Thread(target=target, daemon=True) for _ in range(self._case.at_once)
        ]
        for thread in self._threads:
            thread.start()
        return self._sent.wait(1.0)

    def result(self) -> dict[str, int]:
        """Wait until all are answered, or the patience is over; what was answered."""
        for thread in self._threads:
            thread.join()
        return dict(self._answers)

    def _client(self) -> None:
        """One request after the other."""
        while True:
            with self._lock:
                request = next(self._requests, None)
            if request is None:
                return
            status = self._ask(wire_form(request, self._port))
            with self._lock:
                self._answers[status] += 1

    def _ask(self, sent: bytes) -> str:
        """Status of the answer, which is read to its end."""
        start = b""
        try:
            with socket.create_connection((HOST, self._port), self._remaining()) as connection:
                connection.settimeout(self._remaining())
                # it may have refused before it has read all
                with suppress(BrokenPipeError, ConnectionResetError):
                    connection.sendall(sent)
                self._sent.set()
                if self._case.leaves_s is not None:
                    time.sleep(self._case.leaves_s)
                    return "left"
                if self._case.ends_sending:
                    connection.shutdown(socket.SHUT_WR)
                connection.settimeout(self._remaining())
                while part := connection.recv(1 << 20):
                    start = (start + part)[:64]
                    connection.settimeout(self._remaining())
        except TimeoutError:
            self._sent.set()
            return "none in time"
        except ConnectionError:
            self._sent.set()
        # a client that has ended its sending gets an interim response first
        return start.removeprefix(INTERIM)[9:12].decode("latin-1") or "closed"

    def _hold(self) -> None:
        """Connections that stay open, and what has come on each of them in the end."""
        connections = []
        for request in self._requests:
            connection = socket.create_connection((HOST, self._port), self._remaining())
            connections.append(connection)
            try:
                connection.sendall(wire_form(request, self._port))
            except (ConnectionError, TimeoutError):
                continue
        self._sent.set()
        ends = time.monotonic() + (self._case.hold_s or 0)
        while time.monotonic() < ends:
            time.sleep(DRIP_EVERY_S)
            for connection in connections if self._case.drip else ():
                try:
                    connection.send(self._case.drip)
                except ConnectionError:
                    continue
        for connection in connections:
            with connection:
                connection.setblocking(False)
                try:
                    start = connection.recv(64)
                except BlockingIOError:
                    self._answers["held"] += 1
                except ConnectionError:
                    self._answers["closed"] += 1
                else:
                    self._answers[start[9:12].decode("latin-1") or "closed"] += 1

    def _remaining(self) -> float:
        """Seconds of patience left; a socket's timeout of 0 would mean something else."""
        return max(self._begin + self._patience_s - time.monotonic(), 0.001)
