"""Bodies that come slowly, compressed, or with many values, in the way of nobody."""

from __future__ import annotations

import gzip
import json
from contextlib import ExitStack
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fd_dsa.serve import body
from fd_dsa.serve.body import CONTAINER_WEIGHT, MAX_DEPTH, check_values
from fd_dsa.serve.errors import ApiError
from tests.serve.conftest import Live, connected, running, wait_until
from tests.serve.fake_engine import FakeEngine
from tests.serve.test_connections import HEAD
from tests.serve.test_errors import complete, error_of
from tests.serve.test_guard import JSON, body_of

NUM_SLOW = 60


def trickle(live: Live, stack: ExitStack, num_bytes: int, first: bytes = b"{") -> Any:
    """Many clients that announce so many bytes and send the first ones."""
    clients = [stack.enter_context(connected(live.url)) for _ in range(NUM_SLOW)]
    for client in clients:
        client.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % num_bytes + first)
    return clients


def test_slow_bodies_take_no_place_of_max_concurrency() -> None:
    with running(FakeEngine(), max_concurrency=2) as live, ExitStack() as stack:
        clients = trickle(live, stack, 15)
        wait_until(lambda: len(live.server.server_state.tasks) == NUM_SLOW)
        assert live.state.num_admitted == 0
        assert complete(live).status_code == 200
        # and are served when they are there after all
        clients[0].sendall(b'"prompt": "a"}')
        assert clients[0].recv(65536).startswith(b"HTTP/1.1 200 ")


def test_bodies_together_take_a_bounded_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(body, "MAX_LONG_BODIES", 3)
    size = 1 << 20
    with running(FakeEngine(), max_body_size=size) as live:

        def post(num_bytes: int) -> httpx.Response:
            content = body_of(num_bytes)
            return live.http.post("/v1/completions", content=content, headers=JSON)

        with ExitStack() as stack:
            for _ in range(3):
                client = stack.enter_context(connected(live.url))
                client.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % size + b" " * (size - 1))
            counted = 3 * (size - 1 - (64 << 10))
            wait_until(lambda: live.state.num_body_bytes == counted)
            # one body of just what is left, and one that is a byte longer
            left = 3 * size - counted + (64 << 10)
            assert post(left).is_success
            wait_until(lambda: live.state.num_body_bytes == counted)
            answer = post(left + 1)
            error = error_of(answer, 429)
            assert error["code"] == "too_many_bytes"
            assert f"allowed: {3 * size}, 3 times --max-body-size" in error["message"]
            assert answer.headers["retry-after"] == "1"
            # a body of a usual size is served all the same
            assert post(60_000).is_success
        wait_until(lambda: live.state.num_body_bytes == 0)
        assert post(size).is_success


def test_a_client_that_leaves_in_its_body_gives_its_memory_back(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(body, "MAX_LONG_BODIES", 1)
    size = 1 << 20
    with running(FakeEngine(), max_body_size=size) as live:
        for _ in range(10):
            with connected(live.url) as client:
                client.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % size + b" " * (size - 1))

        def is_served() -> bool:
            content = body_of(size)
            return live.http.post("/v1/completions", content=content, headers=JSON).is_success

        wait_until(is_served)
        wait_until(is_served)
    assert not [r for r in caplog.records if r.exc_info]


def test_a_compressed_body_is_a_415_and_is_never_unpacked(live: Live) -> None:
    content = gzip.compress(json.dumps({"prompt": "a" * (32 << 20)}).encode())
    for encoding in ("gzip", "deflate", "br", "gzip, gzip", "x" * 500):
        headers = {**JSON, "Content-Encoding": encoding}
        error = error_of(live.http.post("/v1/completions", content=content, headers=headers), 415)
        assert error["message"].startswith(f'Content-Encoding: got "{encoding[:50]}')
        assert "send the body as it is" in error["message"]


def test_identity_is_no_compression(live: Live) -> None:
    for encoding in ("Identity", ""):
        headers = {"Content-Encoding": encoding}
        answer = live.http.post("/v1/completions", json={"prompt": "a"}, headers=headers)
        assert answer.status_code == 200


ANY = 1 << 62
JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda children: st.lists(children) | st.dictionaries(st.text(), children),
    max_leaves=12,
)
# bytes that matter, often next to each other
HOSTILE_BYTES = st.lists(
    st.sampled_from([b'"', b"\\", b"\\\\", b'\\"', b"[", b"]", b"{", b"}", b",", b"a", b"\xff"])
).map(b"".join)


def refusal(content: bytes, most: int) -> ApiError:
    """Reason to refuse a body that holds more."""
    with pytest.raises(ApiError) as caught:
        check_values(content, most)
    return caught.value


def weight_of(value: Any) -> int:
    """Return the weight of a value."""
    if isinstance(value, dict):
        return CONTAINER_WEIGHT * len(value) + weight_of(list(value.values()))
    if isinstance(value, list):
        return CONTAINER_WEIGHT + max(len(value) - 1, 0) + sum(map(weight_of, value))
    return CONTAINER_WEIGHT * isinstance(value, str)


@given(JSON_VALUES, st.booleans())
def test_values_count_what_they_are(value: Any, is_ascii: bool) -> None:
    content = json.dumps(value, ensure_ascii=is_ascii).encode("utf-8", "replace")
    weight = weight_of(value)
    check_values(content, weight)
    assert refusal(content, weight - 1).status == 413


@given(HOSTILE_BYTES)
def test_bytes_that_are_no_json_are_counted_by_the_same_rules(content: bytes) -> None:
    weight = depth = deepest = 0
    in_text = is_escaped = False
    # an escape matters before a quotation mark or a backslash alone
    for char in content.decode("latin-1"):
        if is_escaped and char in '"\\':
            is_escaped = False
            continue
        is_escaped = char == "\\"
        if char == '"':
            in_text = not in_text
            weight += CONTAINER_WEIGHT * in_text
        elif not in_text:
            weight += CONTAINER_WEIGHT * (char in "[{") + (char == ",")
            depth += (char in "[{") - (char in "]}")
            deepest = max(deepest, depth)
    # 64 levels are a refusal of their own
    if deepest <= MAX_DEPTH:
        check_values(content, weight)
        assert refusal(content, weight - 1).status == 413


def test_the_limits_of_values_and_depth_are_named() -> None:
    content = b'{"a": [1, 2, "b"]}'
    weight = weight_of(json.loads(content))
    message = str(refusal(content, weight - 1))
    assert f"more than {weight - 1} values, the --max-body-values" in message
    check_values(b"[" * MAX_DEPTH + b"]" * MAX_DEPTH, ANY)
    check_values(b"[]" * 1000 + b'"' + b"[" * 1000 + b'"', ANY)
    for deep in (b'{"a":' * (MAX_DEPTH + 1), b"[],[" + b"[" * MAX_DEPTH + b"]" * 9999):
        error = refusal(deep, ANY)
        assert error.status == 400 and f"more than {MAX_DEPTH} lists and objects" in str(error)
