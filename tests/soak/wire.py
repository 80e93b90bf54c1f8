"""Bytes that are no HTTP, or hardly: what a client library would never let through.

    python -m tests.soak.wire --requests 5000
    python -m tests.soak.wire --first 4711 --requests 1

Against a real server process on the demo model. Whatever comes back must be an HTTP response
without a 5xx, an error object where it is an error, and the server must go on.
"""

from __future__ import annotations

import json
import random
import socket
import tempfile
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx

from tests.serve.processes import serving
from tests.soak import report
from tests.soak.fuzz import check_error

READ_TIMEOUT_S = 60.0
# then the client closes its half: the server may wait for more, or for the next request
PATIENCE_S = 0.3
NUM_CLIENTS = 16
FLAGS = ("--max-model-len", "128", "--num-gpu-blocks-override", "64")
BODY = b'{"prompt": "a", "max_tokens": 1}'
HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


def draw_bytes(number: int) -> bytes:
    """The bytes of that number; all that a client sends before it waits for an answer."""
    draw = random.Random(number)
    whole = HEAD + b"Content-Length: %d\r\n\r\n" % len(BODY) + BODY
    place = draw.randrange(len(whole))
    chunk = b"%x\r\n%s\r\n" % (len(BODY), BODY)
    size = draw.choice([b"zz", b"-1", b"ffffffffffffffffff", b"0" * 5000, b"", b"5;a=b"])
    length = draw.choice([b"-1", b"1e3", b"9" * 30, b"9" * 5000, b"", b"0x10", b"\xb2", b"5, 6"])
    kinds: list[Callable[[], bytes]] = [
        lambda: draw.randbytes(draw.randrange(1, 600)),
        lambda: whole[:place] + draw.randbytes(draw.choice([1, 3, 30])) + whole[place + 1 :],
        lambda: whole[:place],
        lambda: whole * draw.choice([2, 20]),
        lambda: HEAD + b"Content-Length: " + length + b"\r\n\r\n" + BODY,
        lambda: HEAD + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\n" + BODY,
        lambda: HEAD + b"Content-Length: 10000\r\n\r\n" + BODY,
        lambda: HEAD + b"Content-Length: 99999999\r\n\r\n" + BODY,
        lambda: HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + chunk + b"0\r\n\r\n",
        lambda: HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + size + b"\r\n" + BODY + b"\r\n",
        lambda: HEAD + b"Transfer-Encoding: gzip, chunked\r\n\r\n" + chunk,
        lambda: HEAD + b"Transfer-Encoding: chunked\r\nContent-Length: 3\r\n\r\n" + chunk,
        lambda: HEAD + b"X: " + b"a" * draw.choice([1000, 70_000, 500_000]) + b"\r\n\r\n",
        lambda: HEAD + b"X: a\r\n" * draw.choice([100, 20_000]) + b"\r\n",
        lambda: HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + b"1\r\n \r\n" * 20_000 + chunk,
        lambda: HEAD + b"Content-Length: 5\r\nContent-Length: 5\r\n\r\n" + BODY,
        lambda: HEAD + b"Content-Encoding: gzip\r\nContent-Length: 32\r\n\r\n" + BODY,
        lambda: HEAD + b"X\x00Y: a\r\n\r\n",
        lambda: HEAD + b" folded: a\r\n\r\n",
        lambda: whole.replace(b"\r\n", b"\n"),
        lambda: whole.replace(b"localhost", draw.choice([b"evil.com", b"", b"[::1", b"a b"])),
        lambda: HEAD + b"Expect: 100-continue\r\nContent-Length: 3\r\n\r\n",
        lambda: b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\n"
        b"Connection: Upgrade\r\nSec-WebSocket-Key: a\r\nSec-WebSocket-Version: 13\r\n\r\n",
        lambda: b"GET /%s HTTP/1.1\r\nHost: localhost\r\n\r\n"
        % (b"a" * draw.choice([3000, 100_000])),
        lambda: b"GET http://other/v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n",
        lambda: b"GET /v1/models?\xff=%zz HTTP/1.1\r\nHost: localhost\r\n\r\n",
        lambda: b"GET /v1/models HTTP/%s\r\n\r\n" % draw.choice([b"0.9", b"1.0", b"2", b""]),
        lambda: b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        lambda: b"OPTIONS * HTTP/1.1\r\nHost: localhost\r\n\r\n",
        lambda: b"CONNECT a:80 HTTP/1.1\r\nHost: localhost\r\n\r\n",
        lambda: b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + draw.randbytes(200),
        lambda: b"GET /health\r\n\r\n",
        lambda: b"\r\n" * 500,
    ]  # fmt: skip
    return draw.choice(kinds)()


def talk(host: str, port: int, sent: bytes, closes_at_once: bool) -> bytes:
    """What the server answers until it closes; nothing where the client leaves before."""
    received = b""
    with socket.create_connection((host, port), READ_TIMEOUT_S) as connection:
        try:
            connection.sendall(sent)
            if closes_at_once:
                return b""
            connection.settimeout(PATIENCE_S)
            while part := _receive(connection):
                received += part
        except (BrokenPipeError, ConnectionResetError):
            # it has refused before it had read all
            pass
    return received


def _receive(connection: socket.socket) -> bytes:
    """The next bytes; where none come, those that come once the client has closed its half."""
    try:
        return connection.recv(1 << 16)
    except TimeoutError:
        connection.shutdown(socket.SHUT_WR)
        connection.settimeout(READ_TIMEOUT_S)
        return connection.recv(1 << 16)


def check_bytes(received: bytes) -> int | None:
    """Status of the first response; AssertionError unless it is one that a client may rely on."""
    if not received:
        return None
    assert received.startswith(b"HTTP/1.1 "), received[:200]
    head, _, rest = received.partition(b"\r\n\r\n")
    status = int(head[9:12])
    assert status < 500, received[:2000]
    if status >= 400 and b"transfer-encoding: chunked" not in head.lower():
        check_error(json.JSONDecoder().raw_decode(rest.decode())[0])
    return status


def run(url: str, first: int, count: int) -> Counter[str]:
    """Send the bytes `first` .. `first + count - 1`, some clients at a time."""
    parts = httpx.URL(url)

    def client(number: int) -> str:
        sent = draw_bytes(number)
        try:
            status = check_bytes(talk(parts.host, parts.port or 80, sent, number % 5 == 0))
        except Exception:
            again = f"python -m tests.soak.wire --first {number} --requests 1"
            print(f"{sent[:300]!r}\nagain: {again}", flush=True)
            raise
        return "closed without an answer" if status is None else f"status {status}"

    with ThreadPoolExecutor(NUM_CLIENTS) as clients:
        counts = Counter(clients.map(client, range(first, first + count)))
    assert httpx.get(f"{url}/health", timeout=READ_TIMEOUT_S).status_code == 200
    return counts


def run_server(first: int, count: int) -> Counter[str]:
    """Start a server and send it the bytes; it must go on, and have nothing to complain of."""
    with tempfile.TemporaryDirectory() as folder, serving(Path(folder), *FLAGS) as server:
        counts = run(server.url, first, count)
        assert server.process.poll() is None
        assert "Traceback" not in server.log.read_text(), server.log.read_text()
    return counts


if __name__ == "__main__":
    report.main(__doc__, "requests", 5000, run_server)
