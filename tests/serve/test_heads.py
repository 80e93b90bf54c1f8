"""Heads that a proxy could read otherwise than the server, long ones, and ones without an end."""

from __future__ import annotations

import contextlib
import json
import re
import select
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from http.client import HTTPConnection
from random import Random

import httpx
import pytest

from fd_dsa.serve.guard import host_rule
from fd_dsa.serve.h11_connection import MAX_HEAD_BYTES, MAX_HEADERS
from fd_dsa.serve.h11_protocol import StrictH11Protocol
from tests.serve.conftest import TIMEOUT_S, Live, connected, exchange, running, wait_until
from tests.serve.fake_engine import WORDS, FakeEngine
from tests.soak.fuzz import check_error

POST = b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
GET = b"GET /health HTTP/1.1\r\nHost: a\r\n"
BODY = b'{"prompt": "a"}'
CHUNKED = b"%x\r\n%s\r\n0\r\n\r\n" % (len(BODY), BODY)
# answered where the request before it was not refused
SMUGGLED = b"GET /version HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"


@pytest.fixture(scope="module")
def live() -> Iterator[Live]:
    """A server of its own: a broken head must not change what others are answered."""
    with running(FakeEngine()) as server:
        yield server


def statuses(answer: bytes) -> list[int]:
    """Statuses of all responses."""
    return [int(status) for status in re.findall(rb"HTTP/1\.1 (\d{3}) ", answer)]


def refusal(live: Live, sent: bytes, status: int) -> str:
    """The message of the only answer to these bytes; the connection is closed after it."""
    answer = exchange(live.url, sent)
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 %d " % status), answer
    assert b"connection: close" in head.lower()
    assert len(statuses(answer)) == 1
    error = json.loads(body)["error"]
    assert error["type"] == "invalid_request_error"
    return str(error["message"])


LENGTH = POST + b"Content-Length: "
CODING = b"Transfer-Encoding: chunked\r\n\r\n"
# why -> heads that are refused for it
REFUSED: dict[str, list[bytes]] = {
    "content-length and transfer-encoding; send one": [LENGTH + b"15\r\n" + CODING + CHUNKED],
    "transfer-encoding and content-length; send one": [
        POST + b"transfer-encoding: chunked\r\nCONTENT-LENGTH:15\r\n\r\n" + CHUNKED
    ],
    "content-length and content-length; send one": [
        LENGTH + b"15\r\nContent-Length: %d\r\n\r\n" % second + BODY for second in (15, 5)
    ],
    "Content-Length": [
        LENGTH + value + b"\r\n\r\n" + BODY
        for value in (b"15, 15", b"+15", b"-1", b"1e3", b"9" * 5000, b"", b"0x10", b"\xb2")
    ],
    "illegal chunk": [
        POST + CODING + size + b"\r\n" + BODY for size in (b"zz\r\n", b"-1\r\n", b"0" * 99, b"\r\n")
    ],
    "Transfer-Encoding came with HTTP/1.0": [POST.replace(b"1.1", b"1.0") + CODING + CHUNKED],
    "Only Transfer-Encoding": [POST + b"Transfer-Encoding: gzip, chunked\r\n\r\n" + CHUNKED],
    "after the body": [
        POST + CODING + CHUNKED[:-2] + trailer for trailer in (b"X: a\n\n", b"X: a\r\n\r\n")
    ],
    "LF only": [
        GET.replace(b"\r\n", b"\n") + b"\n",
        b"GET /health HTTP/1.1\nHost: a\r\n\r\n",
        *(GET + rest for rest in (b"X: a\nY: b\r\n\r\n", b"X: a\r\n\n")),
    ],
    "folded": [
        GET + b"X: a\r\n%s\r\n\r\n" % line for line in (b" b", b"\tTransfer-Encoding: chunked")
    ],
    "control character": [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        *(GET + b"X: a%cb\r\n\r\n" % char for char in b"\r\0\1\x7f"),
        GET + b"X\x00: a\r\n\r\n",
    ],
    "illegal header line": [
        POST + b"Content-Length : 15\r\n\r\n" + BODY,
        GET + b"no colon\r\n\r\n",
    ],
    "illegal request line": [b"GET /health?\xff=%zz HTTP/1.1\r\nHost: a\r\n\r\n"],
    "no HTTP/1.1 or HTTP/1.0": [
        line + b"\r\nHost: a\r\n\r\n"
        for line in (
            *(b"nonsense", b"GET /health", b"GET /health HTTP/"),
            *(b"GET /health HTTP/2.0", b"GET /health HTTP/2", b"GET /health HTTP/0.9"),
        )
    ],
    "the target is no URL such as http://HOST:PORT/PATH; send a path": [
        b"GET %s HTTP/1.1\r\nHost: a\r\n\r\n" % target
        for target in (
            *(
                b"http:///health",
                b"http:",
                b"http:/health",
                b"http://user@a/health",
                b"http://:80/",
            ),
            *(b"http://a:b/health", b"http://[::1/health", b"http://a#b"),
        )
    ],
    "the target does not begin with /; send a path such as /v1/models": [
        b"%s HTTP/1.1\r\nHost: a\r\n\r\n" % line
        for line in (b"CONNECT a:80", b"GET ftp://a/health", b"GET health", b"GET *health")
    ],
    "the target * is only for OPTIONS; send a path": [
        b"%s * HTTP/1.1\r\nHost: a\r\n\r\n" % method for method in (b"GET", b"POST", b"HEAD")
    ],
    "multiple Host": [GET + b"Host: a\r\n\r\n"],
    "mandatory Host": [b"GET /health HTTP/1.1\r\n\r\n"],
}


@pytest.mark.parametrize(
    ("reason", "sent"), [(why, sent) for why, heads in REFUSED.items() for sent in heads]
)
def test_a_head_of_two_meanings_is_refused_with_all_after_it(
    live: Live, reason: str, sent: bytes
) -> None:
    message = refusal(live, sent + SMUGGLED, 400)
    assert "no valid HTTP/1.1" in message and reason in message
    assert httpx.get(f"{live.url}/health").status_code == 200


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"OPTIONS * HTTP/1.1\r\nHost: a\r\n\r\n", 200),
        (b"OPTIONS http://a HTTP/1.1\r\nHost: a\r\n\r\n", 200),
        (b"OPTIONS http://a/ HTTP/1.1\r\nHost: a\r\n\r\n", 405),
        (b"GET http://other/health HTTP/1.1\r\nHost: a\r\n\r\n", 200),
        (b"GET HTTPS://[::1]:80/health?a=http://b HTTP/1.0\r\n\r\n", 200),
        (b"GET http://a:/v1/models HTTP/1.1\r\nHost: a\r\n\r\n", 200),
        (b"HEAD http://a HTTP/1.1\r\nHost: a\r\n\r\n", 200),
        (b"GET http://a?b HTTP/1.1\r\nHost: a\r\n\r\n", 200),
        (b"GET http://a//health HTTP/1.1\r\nHost: a\r\n\r\n", 404),
        (GET + b"Upgrade: websocket\r\nConnection: Upgrade, close\r\n\r\n", 200),
    ],
)
def test_requests_of_proxies_are_answered(live: Live, sent: bytes, status: int) -> None:
    assert exchange(live.url, sent + SMUGGLED).startswith(b"HTTP/1.1 %d " % status)


def test_a_whole_url_is_a_path_with_its_own_host(live: Live) -> None:
    with running(FakeEngine(), hosts=host_rule("127.0.0.1", "127.0.0.1", ())) as guarded:
        for host, status in ((b"localhost", 200), (b"127.0.0.1:8000", 200), (b"evil.test", 403)):
            sent = b"GET http://%s/v1/models HTTP/1.1\r\nHost: %s\r\n\r\n"
            for other in (b"localhost", b"evil.test"):
                answer = exchange(guarded.url, sent % (host, other) + SMUGGLED)
                assert answer.startswith(b"HTTP/1.1 %d " % status), answer
    url = live.url.encode()
    sent = POST.replace(b"/v1", url + b"/v1") + b"Content-Length: %d\r\n\r\n" % len(BODY) + BODY
    assert statuses(exchange(live.url, sent + SMUGGLED)) == [200, 200]


def test_options_of_the_server_are_its_methods() -> None:
    with running(FakeEngine(), api_key=["key"]) as guarded:
        sent = b"OPTIONS * HTTP/1.1\r\nHost: a\r\n"
        assert statuses(exchange(guarded.url, sent + b"\r\n" + SMUGGLED)) == [401, 200]
        answer = exchange(guarded.url, sent + b"Authorization: Bearer key\r\n\r\n" + SMUGGLED)
        assert statuses(answer) == [200, 200]
        assert b"\r\nallow: GET, HEAD, POST, OPTIONS\r\n" in answer.partition(b"\r\n\r\n")[0]


def test_random_damage_is_answered_by_an_error_object(live: Live) -> None:
    whole = POST + b"Content-Length: %d\r\n\r\n" % len(BODY) + BODY
    num_errors = 0
    for seed in range(150):
        draw = Random(seed)
        place = draw.randrange(len(whole))
        noise = draw.randbytes(draw.choice([1, 3, 30]))
        with connected(live.url) as connection:
            connection.sendall(whole[:place] + noise + whole[place + 1 :])
            connection.shutdown(socket.SHUT_WR)
            answer = b"".join(iter(lambda: connection.recv(65536), b""))
        if found := statuses(answer):
            assert all(status < 500 for status in found), (seed, answer)
            if found[0] >= 400:
                num_errors += 1
                body = answer.partition(b"\r\n\r\n")[2].decode()
                check_error(json.JSONDecoder().raw_decode(body)[0], "")
    assert num_errors > 30


def test_a_broken_head_after_a_good_request_is_refused_too(live: Live) -> None:
    answer = exchange(live.url, GET + b"\r\n" + GET + b"X: a\r\n b\r\n\r\n" + SMUGGLED)
    assert statuses(answer) == [200, 400]


@pytest.mark.parametrize(
    "sent",
    [
        POST + b"content-length:15\r\n\r\n" + BODY,
        POST + b"Content-Length: \t15 \r\n\r\n" + BODY,
        POST + b"Transfer-Encoding: CHUNKED\r\n\r\n" + CHUNKED,
        GET + b"X: content-length: 5\ttransfer-encoding: \xff\r\n\r\n",
        GET + b"Content-Length: 0\r\n\r\n",
        # so long that it takes several reads
        GET + b"X: %s\r\n\r\n" % (b"x" * (MAX_HEAD_BYTES - len(GET) - 7)),
        GET + b"X: a\r\n" * (MAX_HEADERS - 2) + b"\r\n",
    ],
)
def test_good_heads_are_served_and_the_next_request_with_them(live: Live, sent: bytes) -> None:
    answer = exchange(live.url, sent + SMUGGLED)
    assert statuses(answer) == [200, 200], answer


@pytest.mark.parametrize("rest", [b"\r\n\r\n", b""])
def test_long_heads_are_a_431_that_names_the_limit(live: Live, rest: bytes) -> None:
    for size in (MAX_HEAD_BYTES, 500_000):
        message = refusal(live, GET + b"X: " + b"x" * size + rest, 431)
        assert f"longer than {MAX_HEAD_BYTES} bytes" in message
    message = refusal(live, GET + b"X: a\r\n" * 3000 + b"\r\n" + SMUGGLED, 431)
    assert message.startswith(f"the request has 3001 headers, allowed: {MAX_HEADERS}")
    refusal(live, b"GET /" + b"a" * MAX_HEAD_BYTES + b" HTTP/1.1\r\nHost: a\r\n\r\n", 431)


def test_a_body_in_chunks_of_a_byte_is_refused(live: Live) -> None:
    """Each takes the server as long as a chunk of any size."""
    head = POST + b"Transfer-Encoding: chunked\r\n\r\n"
    message = refusal(live, head + b"1\r\n \r\n" * 5000 + b"0\r\n\r\n", 400)
    assert "more than 1024 chunks, and they are shorter than 256 bytes" in message
    chunks = b"%x\r\n%s\r\n" % (1, b" ") * 1000 + CHUNKED
    assert statuses(exchange(live.url, head + chunks + SMUGGLED)) == [200, 200]
    chunks = b"%x\r\n%s\r\n" % (256, b" " * 256) * 5000 + CHUNKED
    assert statuses(exchange(live.url, head + chunks + SMUGGLED)) == [200, 200]


def test_a_refused_client_that_still_sends_reads_its_answer(live: Live) -> None:
    """A server that closes at once makes the client's kernel throw the answer away."""
    for _ in range(20):
        with connected(live.url) as connection:
            connection.sendall(GET + b"X: a\r\n b\r\n\r\n")
            connection.sendall(b"x" * 300_000)
            assert connection.recv(65536).startswith(b"HTTP/1.1 400 ")


def test_the_rest_of_an_answered_body_has_its_time_too(
    live: Live, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is read, so that the connection can be used again, but only for a limited time."""
    monkeypatch.setattr(StrictH11Protocol, "head_timeout_s", 0.4)
    head = POST.replace(b"/v1/completions", b"/health") + b"Content-Length: 1000000\r\n\r\n"

    def is_closed() -> bool:
        try:
            connection.sendall(b"x")
        except ConnectionError:
            return True
        return False

    with connected(live.url) as connection:
        connection.sendall(head)
        assert connection.recv(65536).startswith(b"HTTP/1.1 405 ")
        wait_until(is_closed)


def test_an_early_answer_to_a_client_that_waits_closes_the_connection(live: Live) -> None:
    """The client may leave out its body, and its next request would be read as that body."""
    head = POST + b"Expect: 100-continue\r\nContent-Length: %d\r\n\r\n"
    answer = exchange(live.url, head % (1 << 30))
    assert statuses(answer) == [413] and b"\r\nconnection: close\r\n" in answer.lower()
    with connected(live.url) as connection:
        connection.sendall(head % len(BODY))
        assert connection.recv(65536) == b"HTTP/1.1 100 Continue\r\n\r\n"
        connection.sendall(BODY + SMUGGLED)
        answer = b"".join(iter(lambda: connection.recv(65536), b""))
        assert statuses(answer) == [200, 200]


def test_a_client_of_tls_is_refused_before_its_head_ends(live: Live) -> None:
    assert "illegal request line" in refusal(live, b"\x16\x03\x01\x02\x00\x01", 400)


def test_requests_ahead_of_an_answer_take_a_bounded_memory(live: Live) -> None:
    """They wait in the kernels; what is served comes whole and in order."""
    body = json.dumps({"prompt": "a", "user": "x" * 900}).encode()
    one = POST + b"Content-Length: %d\r\n\r\n" % len(body) + body
    num_requests = 1000
    most, received = 0, b""
    with connected(live.url) as connection, ThreadPoolExecutor(1) as sender:
        sent = sender.submit(connection.sendall, one * num_requests + SMUGGLED)
        while part := connection.recv(65536):
            received += part
            for protocol in tuple(live.server.server_state.connections):
                most = max(most, len(protocol.conn.trailing_data[0]))  # type: ignore[union-attr]
        sent.result(TIMEOUT_S)
    assert statuses(received) == [200] * (num_requests + 1)
    # the rest of one read of asyncio's and what may come with it
    assert 0 < most <= 512 << 10


def before_it_is_closed(talk: Callable[[], bytes]) -> bytes:
    """Return the result of `talk`, which is tried again where the connection was lost on the way.

    A client that the machine starves may itself be late, and a byte that crosses the server's last
    words makes the kernel throw these away.
    """
    for _ in range(9):
        with contextlib.suppress(ConnectionError):
            return talk()
    return talk()


def dripped(live: Live, sent: bytes) -> bytes:
    """The answer to a client that sends this, and then, if it was anything, a byte at a time."""
    with connected(live.url) as connection:
        connection.sendall(sent)
        deadline = time.monotonic() + TIMEOUT_S
        while not select.select([connection], [], [], 0.1)[0]:
            assert time.monotonic() < deadline, "the connection is still open"
            if sent:
                connection.sendall(b"x")
        # head and body may come in two pieces
        return b"".join(iter(lambda: connection.recv(65536), b""))


@pytest.mark.parametrize("sent", [b"", b"POST /v1/completions HTTP/1.1\r\nHost: a\r\n"])
def test_a_head_that_does_not_come_holds_no_connection(
    monkeypatch: pytest.MonkeyPatch, sent: bytes
) -> None:
    """Bytes that come one by one do not put it off."""
    monkeypatch.setattr(StrictH11Protocol, "head_timeout_s", 0.4)

    with running(FakeEngine()) as live:
        answer = before_it_is_closed(lambda: dripped(live, sent))
    if not sent:
        assert answer == b""
        return
    assert answer.startswith(b"HTTP/1.1 408 Request Timeout\r\n")
    error = json.loads(answer.partition(b"\r\n\r\n")[2])["error"]
    assert "head of the request" in error["message"]


def test_a_connection_is_used_again_long_after_its_first_head(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(StrictH11Protocol, "head_timeout_s", 0.3)
    headers = {"Content-Type": "application/json"}

    def talk() -> bytes:
        address = httpx.URL(live.url).netloc.decode()
        # unlike httpx it never opens a second connection by itself
        with closing(HTTPConnection(address, timeout=TIMEOUT_S)) as connection:
            # an answer that takes longer than a head may
            for max_tokens in (5, 1):
                body = json.dumps({"prompt": "a", "max_tokens": max_tokens})
                connection.request("POST", "/v1/completions", body, headers)
                answer = connection.getresponse().read()
                time.sleep(0.4)
            return answer

    with running(FakeEngine(step_s=0.1)) as live:
        assert json.loads(before_it_is_closed(talk))["choices"][0]["text"] == WORDS[0]
