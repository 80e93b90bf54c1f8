"""The process that sends one kind of request of `tests.soak.siege_cases`.

    python -m tests.soak.attacker CASE PORT FACTS PATIENCE

A process of its own, so that making and sending requests holds up no clock of the siege. Prints
`ready` once the requests are made; then, for each line that it reads, sends them and prints `sent`
when the first is sent and one line of JSON when all are answered or PATIENCE seconds are over.
"""

from __future__ import annotations

import json
import resource
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress

from tests.soak.hostile import HostileRequest
from tests.soak.siege_cases import CASES, Case, Facts

HOST = "127.0.0.1"
DRIP_EVERY_S = 0.1


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


class Attack:
    """One pass over the requests of a case.

    Args:
        case: what is sent, and how.
        requests: of the case.
        port: of the server, on this machine.
        patience_s: after which nobody waits for an answer any more.
    """

    def __init__(
        self, case: Case, requests: Iterator[HostileRequest], port: int, patience_s: float
    ) -> None:
        self.answers: Counter[str] = Counter()
        self._case, self._requests, self._port = case, requests, port
        self._deadline = time.monotonic() + patience_s
        self._lock = threading.Lock()
        self._is_sent = False

    def run(self) -> None:
        """Send all; returns when they are answered, or when the patience is over."""
        if self._case.hold_s is not None:
            self._hold(self._case.hold_s)
            return
        clients = [threading.Thread(target=self._client) for _ in range(self._case.at_once)]
        for client in clients:
            client.start()
        for client in clients:
            client.join()

    def _client(self) -> None:
        """One request after the other."""
        while True:
            with self._lock:
                request = next(self._requests, None)
            if request is None:
                return
            status = self._ask(wire_form(request, self._port))
            with self._lock:
                self.answers[status] += 1

    def _ask(self, sent: bytes) -> str:
        """Status of the answer, which is read to its end."""
        start = b""
        try:
            with socket.create_connection((HOST, self._port), self._remaining()) as connection:
                connection.settimeout(self._remaining())
                # it may have refused before it has read all
                with suppress(BrokenPipeError, ConnectionResetError):
                    connection.sendall(sent)
                self._tell_sent()
                connection.settimeout(self._remaining())
                while part := connection.recv(1 << 20):
                    start = (start + part)[:64]
                    connection.settimeout(self._remaining())
        except TimeoutError:
            self._tell_sent()
            return "none in time"
        except ConnectionError:
            self._tell_sent()
        return start[9:12].decode("latin-1") or "closed"

    def _hold(self, seconds: float) -> None:
        """Connections that stay open, and what has come on each of them in the end."""
        connections = []
        for request in self._requests:
            connection = socket.create_connection((HOST, self._port), self._remaining())
            connections.append(connection)
            try:
                connection.sendall(wire_form(request, self._port))
            except (ConnectionError, TimeoutError):
                continue
        self._tell_sent()
        ends = time.monotonic() + seconds
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
                    self.answers["held"] += 1
                except ConnectionError:
                    self.answers["closed"] += 1
                else:
                    self.answers[start[9:12].decode("latin-1") or "closed"] += 1

    def _remaining(self) -> float:
        """Seconds of patience left; a socket's timeout of 0 would mean something else."""
        return max(self._deadline - time.monotonic(), 0.001)

    def _tell_sent(self) -> None:
        """Print once that a request has left."""
        with self._lock:
            if not self._is_sent:
                print("sent", flush=True)
            self._is_sent = True


def main() -> None:
    """Make the requests, and send them as often as a line comes."""
    case, port = CASES[sys.argv[1]], int(sys.argv[2])
    facts, patience_s = Facts(**json.loads(sys.argv[3])), float(sys.argv[4])
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    made = case.requests(facts)
    print("ready", flush=True)
    for _ in sys.stdin:
        # a list is made once; more than fits into memory comes one by one
        requests = iter(made if isinstance(made, list) else case.requests(facts))
        attack, begin = Attack(case, requests, port, patience_s), time.monotonic()
        attack.run()
        result = {"answers": attack.answers, "seconds": time.monotonic() - begin}
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
