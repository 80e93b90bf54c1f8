"""Signals and exit statuses of a real server process (the engine in it is a fake one)."""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.serve.conftest import wait_until
from tests.serve.fake_engine import WORDS

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT_S = 60


@dataclass
class Server:
    """A server process.

    Attributes:
        process: the process.
        curl: the line that it printed.
        url: taken from that line.
    """

    process: subprocess.Popen[str]
    curl: str
    url: str


@dataclass
class Background:
    """A completion that runs in a thread; `answer` or `error` is set in the end."""

    url: str
    fields: dict[str, Any] = field(default_factory=dict)
    answer: httpx.Response | None = None
    error: Exception | None = None

    def __post_init__(self) -> None:
        self.thread = threading.Thread(target=self._run)
        self.thread.start()

    def _run(self) -> None:
        body = {"prompt": "a", "max_tokens": 900, **self.fields}
        try:
            self.answer = httpx.post(f"{self.url}/v1/completions", json=body, timeout=TIMEOUT_S)
        except httpx.HTTPError as error:
            self.error = error

    def result(self) -> httpx.Response:
        """The answer, waited for."""
        self.thread.join(TIMEOUT_S)
        assert self.answer is not None, self.error
        return self.answer


@contextmanager
def server(*args: str) -> Iterator[Server]:
    """Run tests.serve.fake_server with these arguments."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.serve.fake_server", *args],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        curl = process.stdout.readline()
        match = re.search(r"http://[^/]+", curl)
        assert match is not None, process.communicate(timeout=5)
        yield Server(process, curl, match[0])
    finally:
        process.kill()
        process.communicate()


def wait_for_running(live: Server, num_requests: int) -> None:
    """Return when so many more requests are inside the engine."""
    assert live.process.stdout is not None
    for _ in range(num_requests):
        assert live.process.stdout.readline().startswith("running ")


def wait_until_draining(live: Server) -> None:
    """Return when /health is 503."""
    url = f"{live.url}/health"
    wait_until(lambda: httpx.get(url, timeout=TIMEOUT_S).status_code == 503)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_first_signal_drains(number: signal.Signals) -> None:
    with server("0.1", "120") as live:
        url = f"{live.url}/v1/completions"
        endless = {"prompt": "a", "max_tokens": 900, "ignore_eos": True, "stream": True}
        # the server cannot end before this client leaves
        with httpx.stream("POST", url, json=endless, timeout=TIMEOUT_S):
            whole = Background(live.url)
            stream = Background(live.url, {"stream": True})
            wait_for_running(live, 3)
            live.process.send_signal(number)
            wait_until_draining(live)
            refused = httpx.post(url, json={"prompt": "a"}, timeout=TIMEOUT_S)
            assert refused.status_code == 503
            assert "shutting down" in refused.json()["error"]["message"]
            choice = whole.result().json()["choices"][0]
            assert (choice["text"], choice["finish_reason"]) == ("".join(WORDS), "stop")
            assert stream.result().text.endswith("data: [DONE]\n\n")
            assert '"finish_reason":"stop"' in stream.result().text
        assert live.process.wait(TIMEOUT_S) == 0


def test_idle_server_ends_at_once() -> None:
    # a drain that waits for nobody would take longer than the test has
    with server("0", "3600") as live:
        live.process.terminate()
        assert live.process.wait(TIMEOUT_S) == 0


def test_after_the_timeout_the_rest_is_aborted_but_answered() -> None:
    with server("0.1", "0.5") as live:
        whole = Background(live.url, {"ignore_eos": True})
        stream = Background(live.url, {"ignore_eos": True, "stream": True})
        wait_for_running(live, 2)
        live.process.terminate()
        answer = whole.result().json()
        assert answer["choices"][0]["finish_reason"] == "abort"
        assert answer["choices"][0]["text"].startswith("Hello")
        assert answer["usage"]["completion_tokens"] < 900
        assert '"finish_reason":"abort"' in stream.result().text
        assert stream.result().text.endswith("data: [DONE]\n\n")
        assert live.process.wait(TIMEOUT_S) == 0


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_second_signal_ends_at_once(second: signal.Signals) -> None:
    # without the second signal it would take longer than the test has
    with server("0.1", "3600") as live:
        request = Background(live.url, {"ignore_eos": True})
        wait_for_running(live, 1)
        live.process.terminate()
        wait_until_draining(live)
        assert live.process.poll() is None
        live.process.send_signal(second)
        assert live.process.wait(TIMEOUT_S) == 128 + second
        request.thread.join(TIMEOUT_S)
        assert request.error is not None


@pytest.mark.slow
def test_a_tokenizer_that_stalls_holds_up_nothing_else() -> None:
    """As many requests hang in it as there are threads for it, and more."""
    with server("0", "0.5") as live:
        stalled = [Background(live.url, {"prompt": "stall"}) for _ in range(40)]
        assert live.process.stdout is not None
        assert live.process.stdout.readline() == "stalled\n"
        for path in ("/health", "/metrics", "/v1/models"):
            assert httpx.get(f"{live.url}{path}", timeout=TIMEOUT_S).status_code == 200
        live.process.terminate()
        assert live.process.wait(TIMEOUT_S) == 0
        for request in stalled:
            assert request.result().status_code == 503
            assert "shut down" in request.result().json()["error"]["message"]
        assert live.process.stderr is not None
        log = live.process.stderr.read()
        assert "something still runs after the shutdown" in log
        assert "Traceback" not in log


def test_engine_failure_ends_the_process_with_status_one() -> None:
    with server("0.05", "30", "2") as live:
        answer = Background(live.url).result()
        assert answer.status_code == 500
        assert live.process.wait(TIMEOUT_S) == 1
        assert live.process.stderr is not None
        assert "the engine has failed" in live.process.stderr.read()


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_printed_curl_line_works_when_pasted() -> None:
    with server("0", "1") as live:
        done = subprocess.run(
            live.curl, shell=True, capture_output=True, text=True, timeout=TIMEOUT_S, check=True
        )
        assert "".join(WORDS) in done.stdout
