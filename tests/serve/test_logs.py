"""Output of a server process: requests, JSON, the busy line, and nothing on a full disk."""

from __future__ import annotations

import functools
import json
import logging
import re
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from fd_dsa.engine.async_engine import AsyncEngine
from fd_dsa.serve import server as server_module
from fd_dsa.serve.logs import JsonFormatter, RepeatFilter
from fd_dsa.serve.metrics import log_while_busy
from tests.engine.fakes import make_engine
from tests.engine.threaded import threaded
from tests.serve.conftest import exchange, held_port, running, wait_until
from tests.serve.fake_engine import FakeEngine
from tests.serve.processes import FAKE, TIMEOUT_S, serving, started
from tests.serve.test_errors import complete


def request_lines(caplog: pytest.LogCaptureFixture) -> list[dict[str, Any]]:
    """Fields of the lines about requests."""
    return [vars(r)["fields"] for r in caplog.records if r.name == "fd_dsa.requests"]


def test_each_output_that_ends_is_a_line(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    with running(threaded(make_engine()), log_requests=True) as live:
        fields = {"max_tokens": 4, "ignore_eos": True}
        complete(live, prompt=[[5, 6, 7], [8]], **fields)
        lines = request_lines(caplog)
        told = ("prompt_tokens", "completion_tokens", "finish_reason")
        assert sorted(tuple(line[name] for name in told) for line in lines) == [
            (1, 4, "length"),
            (3, 4, "length"),
        ]
        assert all(0 <= line["first_token_s"] <= line["total_s"] for line in lines)
        assert len({line["request_id"] for line in lines}) == 2
        caplog.clear()
        body = {"prompt": [5], "stream": True, "max_tokens": 60, "ignore_eos": True}
        with live.http.stream("POST", "/v1/completions", json=body) as answer:
            next(answer.iter_lines())
        wait_until(lambda: len(request_lines(caplog)) == 1)
        assert request_lines(caplog)[0]["finish_reason"] in ("abort", "length")


def test_texts_and_keys_are_in_no_line(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG")
    with running(FakeEngine(), log_requests=True, api_key=("the-key",)) as live:
        headers = {"Authorization": "Bearer the-key"}
        body = {"prompt": "a secret text"}
        assert live.http.post("/v1/completions", json=body, headers=headers).status_code == 200
        live.http.post("/v1/completions", json=body, headers={"Authorization": "Bearer guess"})
    assert request_lines(caplog)
    caplog_lines = len(request_lines(caplog))
    with running(FakeEngine()) as live:
        complete(live)
    assert len(request_lines(caplog)) == caplog_lines, "no line unless asked"
    ours = [r.getMessage() for r in caplog.records if r.name.startswith(("fd_dsa", "uvicorn"))]
    for word in ("the-key", "guess", "secret text", "sparse attention"):
        assert not any(word in line for line in ours)


def test_json_of_exceptions_and_of_what_is_no_text() -> None:
    try:
        raise ValueError("\ud800 is no text")
    except ValueError:
        record = logging.LogRecord("a", 40, "f", 1, "%s", ("\ud800\n",), sys.exc_info())
    line = JsonFormatter().format(record)
    assert "\n" not in line
    told = json.loads(line)
    assert told["message"] == "\ud800\n" and told["level"] == "error"
    assert "ValueError" in told["exception"]


class Written:
    """A log of which each line is kept that the filter lets through; time stands still."""

    def __init__(self) -> None:
        self.now = 0.0
        self.filter = RepeatFilter(lambda: self.now)

    def __call__(self, name: str, level: int, text: str, *args: Any, **fields: Any) -> list[str]:
        """The line as it is written, if it is."""
        record = logging.LogRecord(name, level, "f", 1, text, args, fields.get("exc_info"))
        return [record.getMessage()] if self.filter.filter(record) else []


def test_a_line_that_repeats_is_written_once_a_second_with_the_number_left_out() -> None:
    log = Written()
    assert log("fd_dsa.serve", 30, "request %s failed", "a") == ["request a failed"]
    for name in range(500):
        log.now += 0.001
        assert log("fd_dsa.serve", 30, "request %s failed", name) == []
    # another kind of line is not held up by it
    assert log("fd_dsa.serve", 30, "other %s", 1) == ["other 1"]
    assert log("fd_dsa.serve", 40, "request %s failed", "b") == ["request b failed"]
    error = (ValueError, ValueError("x"), None)
    assert log("fd_dsa.serve", 30, "request %s failed", "c", exc_info=error)
    log.now = 1.0
    assert log("fd_dsa.serve", 30, "request %s failed", "d") == [
        "request d failed (500 lines like it were left out)"
    ]
    log.now = 2.0
    assert log("fd_dsa.serve", 30, "request %s failed", "e") == ["request e failed"]


def test_what_is_no_repetition_is_all_written() -> None:
    log = Written()
    for number in range(50):
        assert log("fd_dsa.serve", 20, "%s", f"line {number}")
        assert log("fd_dsa.serve", 30, "%s", f"line {number}")
        assert log("fd_dsa.startup.progress", 20, "[%d/%d] %s", number, 5, "phase")
        assert log("fd_dsa.requests", 20, "%s", "the same")
        access = ('%s - "%s %s HTTP/%s" %d', "127.0.0.1:1", "POST", "/v1/completions", "1.1", 200)
        assert log("uvicorn.access", 20, *access)
    for number in range(5000):
        assert log("fd_dsa.engine", 20, f"line {number}")
    assert len(log.filter.last_lines) <= 1000
    # asyncio has no arguments; its first line says what happened
    assert log("asyncio", 40, "out of resource\nsocket 1") == ["out of resource\nsocket 1"]
    assert log("asyncio", 40, "out of resource\nsocket 2") == []


def test_a_flood_of_hostile_requests_leaves_a_short_log(tmp_path: Path) -> None:
    """The lines of requests that were served are all there, each an object of JSON."""
    with serving(tmp_path, "--log-json", "--log-requests", body=FAKE) as server:
        begin = time.monotonic()
        with httpx.Client(base_url=server.url, timeout=TIMEOUT_S) as client:
            for number in range(40):
                exchange(server.url, b"nonsense\r\n\r\n")
                head = b"GET / HTTP/1.1\r\nHost: localhost\r\nContent-Length: x\r\n\r\n"
                exchange(server.url, head)
                client.get(f"/nothing/{number}")
                client.post("/v1/completions", json={"prompt": "a", "n": -number})
                client.get("/v1/models")
            for path in ("/health", "/metrics", "/livez", "/readyz", "/startupz"):
                client.get(path)
            for _ in range(20):
                client.post("/v1/completions", json={"prompt": "a", "ignore_eos": True})
        seconds = time.monotonic() - begin
        log = server.ends()
    lines = [json.loads(line) for line in log.splitlines()]
    for line in lines:
        assert {"time", "level", "logger", "message"} <= line.keys()
    ended = [line for line in lines if line["logger"] == "fd_dsa.requests"]
    told = [(line["finish_reason"], line["completion_tokens"]) for line in ended]
    assert told == [("length", 16)] * 20
    access = [line["message"] for line in lines if line["logger"] == "uvicorn.access"]
    assert sum('"POST /v1/completions HTTP/1.1" 200' in line for line in access) == 20
    # no probe has a line
    paths = {re.search(r"/\S+", line)[0] for line in access}  # type: ignore[index]
    assert "/v1/models" in paths
    assert not paths & {"/health", "/metrics", "/livez", "/readyz", "/startupz"}
    # of the 200 others four kinds are refused, and one is no POST
    assert len(lines) < 40 + 20 + 5 * (seconds + 1)


def test_a_line_while_busy_and_none_while_idle(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    looks: list[None] = []
    snapshot = AsyncEngine.snapshot

    async def watched(engine: AsyncEngine) -> Any:
        looks.append(None)
        return await snapshot(engine)

    monkeypatch.setattr(AsyncEngine, "snapshot", watched)
    often = functools.partial(log_while_busy, interval_s=0.05)
    monkeypatch.setattr(server_module, "log_while_busy", often)

    def lines_after(num_looks: int) -> list[str]:
        """All lines after so many more looks at the engine."""
        wanted = len(looks) + num_looks
        wait_until(lambda: len(looks) >= wanted)
        return [line for line in caplog.messages if line.startswith("running ")]

    with running(threaded(make_engine())) as live:
        assert lines_after(0) == []
        complete(live, prompt=[5 + i % 30 for i in range(18)], max_tokens=8, ignore_eos=True)
        # the interval in which the last step ended has its line; then there are no more
        lines = lines_after(3)
        pattern = (
            r"running \d+, waiting \d+, prefill ([\d,]+) tok/s, decode ([\d,]+) tok/s, "
            r"kv \d+ %, prefix hits (?:\d+ %|no queries)"
        )
        rates = [re.fullmatch(pattern, line).groups() for line in lines]  # type: ignore[union-attr]
        assert any(rate != ("0", "0") for rate in rates)
        assert lines_after(4) == lines


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_full_disk_under_the_log_stops_nothing(tmp_path: Path) -> None:
    """Both outputs fail to be written, from the first line on."""
    # with an empty variable what is written waits in a buffer, as it does by default
    streams: dict[str, Any] = {"redirects": "> /dev/full 2>&1", "env": {"PYTHONUNBUFFERED": ""}}
    flags = ("--log-requests", "--port")
    with held_port() as port, started(tmp_path, *flags, str(port), body=FAKE, **streams) as server:
        server.url = f"http://127.0.0.1:{port}"
        server.wait_until_healthy()
        for _ in range(3):
            body = {"prompt": "a", "ignore_eos": True}
            answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=TIMEOUT_S)
            assert answer.status_code == 200
        server.ends()
