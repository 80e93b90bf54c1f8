"""The client of OpenAI-compatible servers, against good ones, bad ones and none."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter
from typing import Any

import pytest

from fd_dsa.client.load import Sender
from fd_dsa.client.questions import Answer, Question, ask
from fd_dsa.client.remote import examine_server, normal_base_url
from fd_dsa.errors import ConfigError, RemoteError
from tests.client.scripted import MODELS, Reply, asked, chat, scripted
from tests.serve.conftest import TIMEOUT_S, held_port, wait_until


def questions(count: int) -> list[Question]:
    """Questions that ask for their key."""
    return [
        Question(f"q{i}", ({"role": "user", "content": f"q{i}"},), max_tokens=7)
        for i in range(count)
    ]


def collect(
    sender: Sender, count: int, kept: list[Answer] | None = None, **settings: Any
) -> list[Answer]:
    """All answers, in the order of their keys."""
    found = [] if kept is None else kept

    async def run() -> None:
        async for answer in ask(sender, "demo", questions(count), settings):
            found.append(answer)

    asyncio.run(run())
    return sorted(found, key=lambda answer: int(answer.key[1:]))


def echo(body: dict[str, Any]) -> Reply:
    """The question itself."""
    return chat(asked(body))


def test_every_question_gets_its_answer_and_no_more_than_asked_are_in_flight() -> None:
    full = threading.Event()

    def slow(body: dict[str, Any]) -> Reply:
        # the first ones stay until the third is there, or is not to come
        if server.most >= 3:
            full.set()
        full.wait(TIMEOUT_S)
        full.set()
        time.sleep(0.02)
        return chat(asked(body), reason="length")

    with scripted(slow) as server:
        fields: dict[str, Any] = {"temperature": 0.25, "seed": 5, "thinking": False}
        answers = collect(Sender(server.base_url, concurrency=3), 10, **fields)
    assert [a.text for a in answers] == [f"q{i}" for i in range(10)]
    assert {(a.finish_reason, a.prompt_tokens, a.completion_tokens) for a in answers} == {
        ("length", 2, 3)
    }
    assert all(a.error is None and a.seconds >= 0.02 for a in answers)
    assert server.most == 3
    assert server.bodies[0] == {
        "model": "demo",
        "messages": [{"role": "user", "content": asked(server.bodies[0])}],
        "max_tokens": 7,
        "temperature": 0.25,
        "seed": 5,
        "chat_template_kwargs": {"thinking": False, "enable_thinking": False},
    }


@pytest.mark.parametrize(
    "bad",
    [
        (503, {}, {"error": {"message": "shutting down"}}),
        (500, {}, b"<html>"),
        (429, {"Retry-After": "0"}, {}),
        (200, {}, b"not json"),
        (200, {}, {"choices": []}),
        chat("half of it", reason="abort"),
    ],
)
def test_failures_that_pass_are_asked_again(bad: Reply) -> None:
    tries: Counter[str] = Counter()

    def answer(body: dict[str, Any]) -> Reply:
        tries[asked(body)] += 1
        return bad if tries[asked(body)] <= 2 else chat(asked(body))

    with scripted(answer) as server:
        sender = Sender(server.base_url, retries=2, delay_s=0.001)
        answers = collect(sender, 3)
    assert [(a.text, a.error) for a in answers] == [(f"q{i}", None) for i in range(3)]
    assert set(tries.values()) == {3}


def test_attempts_are_bounded_and_the_run_goes_on() -> None:
    bad: dict[str, Reply] = {
        "q1": (502, {}, {"detail": "bad\ngateway"}),
        # its own fault, so it is not asked again
        "q2": (400, {}, {"error": {"message": "prompt has 9 tokens"}}),
    }
    with scripted(lambda body: bad.get(asked(body)) or echo(body)) as server:
        answers = collect(Sender(server.base_url, retries=3, delay_s=0.001), 4)
    assert Counter(map(asked, server.bodies)) == {"q0": 1, "q1": 4, "q2": 1, "q3": 1}
    assert [a.error for a in answers] == [
        *(None, "status 502: bad gateway (4 attempts)"),
        *("status 400: prompt has 9 tokens", None),
    ]
    assert (answers[1].text, answers[1].finish_reason, answers[1].completion_tokens) == (
        "",
        None,
        None,
    )


def test_retry_after_is_honoured() -> None:
    times: list[float] = []

    def answer(body: dict[str, Any]) -> Reply:
        times.append(time.monotonic())
        return (429, {"Retry-After": "1"}, {}) if len(times) == 1 else echo(body)

    with scripted(answer) as server:
        assert collect(Sender(server.base_url, delay_s=0.001), 1)[0].error is None
    assert times[1] - times[0] >= 1


def test_a_server_that_refuses_everything_ends_the_run() -> None:
    refusal: Reply = (400, {}, {"error": {"message": "chat_template_kwargs: not supported"}})
    kept: list[Answer] = []
    with scripted(lambda body: refusal) as server:
        sender = Sender(server.base_url, concurrency=4)
        with pytest.raises(RemoteError, match="answers no question: status 400: chat_template_k"):
            collect(sender, 100, kept)
    # eight refusals end it; of those asked at that moment, some may have reached the server
    assert 8 <= len(kept) < 12
    assert len(kept) <= len(server.bodies) < len(kept) + 4


@pytest.mark.parametrize("status", [401, 403, 404])
def test_refusals_of_key_and_model_end_the_run(status: int) -> None:
    refused = pytest.raises(RemoteError, match=str(status))
    with scripted(lambda body: (status, {}, {"error": {"message": "no"}})) as server, refused:
        collect(Sender(server.base_url, concurrency=1), 5)
    assert len(server.bodies) == 1


def test_a_server_that_goes_away_ends_the_run_and_keeps_what_came() -> None:
    refused = pytest.raises(RemoteError, match=r"any more: connection refused \(3 attempts\)")
    with held_port() as port, refused:
        collect(Sender(f"http://127.0.0.1:{port}", retries=2, delay_s=0.001), 3)
    kept: list[Answer] = []

    def answer(body: dict[str, Any]) -> Reply:
        if asked(body) == "q0":
            return echo(body)
        wait_until(lambda: bool(kept))
        return 401, {}, {}

    with scripted(answer) as server, pytest.raises(RemoteError, match="401"):
        collect(Sender(server.base_url, concurrency=3), 3, kept)
    assert [a.text for a in kept] == ["q0"]


def test_what_is_in_flight_is_given_up_in_time_or_dropped() -> None:
    release = threading.Event()

    def answer(body: dict[str, Any]) -> Reply:
        if asked(body) == "q1":
            release.wait(TIMEOUT_S)
        return echo(body)

    async def run(sender: Sender) -> list[str]:
        found = []
        async for one in ask(sender, "demo", questions(3), {}):
            found.append(one.key)
            if len(found) == 2:
                break
        return found

    with scripted(answer) as server:
        try:
            sender = Sender(server.base_url, retries=0, timeout_s=0.1)
            errors = [a.error for a in collect(sender, 3)]
            assert errors == [None, "no reply in time", None]
            assert sorted(asyncio.run(run(Sender(server.base_url)))) == ["q0", "q2"]
        finally:
            release.set()


def test_texts_that_are_none_or_broken() -> None:
    texts = {"q0": None, "q1": "", "q2": "a\ud83d b"}
    with scripted(lambda body: chat(texts[asked(body)], reason=None)) as server:
        answers = collect(Sender(server.base_url), 3)
    assert [a.text for a in answers] == ["", "", "a\ufffd b"]
    assert {a.finish_reason for a in answers} == {None}


def test_the_key_of_the_environment_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "k-123")
    with scripted(echo) as server:
        collect(Sender(server.base_url), 1)
        monkeypatch.delenv("OPENAI_API_KEY")
        collect(Sender(server.base_url), 1)
    assert server.headers[0]["authorization"] == "Bearer k-123"
    assert "authorization" not in server.headers[1]


def test_preflight_tells_model_and_facts() -> None:
    info: Reply = (200, {}, {"version": "1.2", "device": "gpu:0", "secret": 1, "dtype": None})
    with scripted(echo, {"/server_info": info}) as server:
        found = examine_server(server.base_url, None)
    assert found.model == "demo"
    assert found.max_model_len == 2048
    assert (found.facts["version"], found.facts["device"]) == ("1.2", "gpu:0")
    assert found.facts["dtype"] is found.facts["commit"] is None
    assert "secret" not in found.facts


TWO: Reply = (200, {}, {"data": [{"id": "one"}, {"id": "two"}]})
OURS: Reply = (200, {}, {"data": [{"id": n, "owned_by": "fd_dsa"} for n in ("name", "alias")]})


@pytest.mark.parametrize(
    ("models", "asked_for", "found"),
    [
        (TWO, "two", "two"),
        (OURS, None, "name"),
        (OURS, "alias", "alias"),
        ((404, {}, {}), "any", "any"),
    ],
)
def test_preflight_finds_the_model(models: Reply, asked_for: str | None, found: str) -> None:
    with scripted(echo, {"/v1/models": models}) as server:
        assert examine_server(server.base_url, asked_for).model == found


@pytest.mark.parametrize(
    ("models", "asked_for", "text"),
    [
        (MODELS, "dem", "--model: got 'dem'; the server at URL has demo"),
        (TWO, None, "--model: name one of several; the server at URL has one, two"),
        (
            (404, {}, {}),
            None,
            "--base-url: URL/models answers with status 404 and no list of models; give the base "
            "URL of an OpenAI-compatible server, which mostly ends in /v1",
        ),
        ((200, {}, b"<html>"), "demo", "answers with status 200 and no list of models"),
        ((200, {}, {"data": []}), "demo", "answers with status 200 and no list of models"),
        ((401, {}, {}), None, "URL answers with status 401: OPENAI_API_KEY is not set"),
    ],
)
def test_preflight_is_one_clear_line(
    monkeypatch: pytest.MonkeyPatch, models: Reply, asked_for: str | None, text: str
) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with scripted(echo, {"/v1/models": models}) as server, pytest.raises(ConfigError) as caught:
        examine_server(server.base_url, asked_for)
    assert text in str(caught.value).replace(server.base_url, "URL")
    assert "\n" not in str(caught.value)
    assert server.bodies == []
    # it is gone
    with pytest.raises(ConfigError) as caught:
        examine_server(server.base_url, None)
    assert str(caught.value) == (
        f"--base-url: {server.base_url} cannot be reached (connection refused); start a server "
        "there, or leave the flag out and one is started for the run"
    )


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("OPENAI_API_KEY", "\u00e9", "OPENAI_API_KEY: has characters beyond ASCII"),
        ("OPENAI_API_KEY", "se\r\ncret", "OPENAI_API_KEY: has a line end or another control"),
        ("HTTP_PROXY", "ftp://h", "ALL_PROXY cannot be used (Unknown scheme for proxy URL"),
        ("ALL_PROXY", "socks9://h", "ALL_PROXY cannot be used (Unknown scheme for proxy URL"),
    ],
)
def test_variables_that_no_request_can_use_are_named(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, text: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError) as caught:
        examine_server("http://192.0.2.1/v1", None)
    assert text in str(caught.value)
    assert "cret" not in str(caught.value)


def test_errors_hide_the_password_of_the_url_and_name_failures_of_tls() -> None:
    with pytest.raises(ConfigError) as caught:
        normal_base_url("http://user:secret@h/v1?x=1")
    assert "'http://h/v1?x=1'" in str(caught.value)
    with scripted(echo) as server:
        address = server.base_url.removeprefix("http://")
        with pytest.raises(ConfigError) as caught:
            examine_server(f"http://user:secret@{address}", "absent")
        assert f"the server at http://{address} has demo" in str(caught.value)
        with pytest.raises(ConfigError) as caught:
            examine_server(f"https://user:secret@{address}", None)
    # the number of the error is none of the system, where it is "operation not permitted"
    assert f"https://{address} cannot be reached (TLS: wrong version number)" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "url"),
    [
        ("http://h:1", "http://h:1/v1"),
        ("http://h:1/", "http://h:1/v1"),
        ("https://h/v1/", "https://h/v1"),
        ("http://h/openai/v3", "http://h/openai/v3"),
    ],
)
def test_base_urls(text: str, url: str) -> None:
    assert normal_base_url(text) == url


@pytest.mark.parametrize(
    "text",
    [
        *("", "h:1", "127.0.0.1:8000/v1", "ftp://h", "http://", "http://h:x", "http://h?a=b"),
        *("http://a..b", "http://\u00e9..b", f"http://{'a' * 64}"),
    ],
)
def test_base_urls_that_are_none(text: str) -> None:
    with pytest.raises(ConfigError, match=r"--base-url: got .*; allowed is a URL such as"):
        normal_base_url(text)
