"""Signals and exit statuses of a server process; the model in it is a fake one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.proc import children
from tests.serve.conftest import wait_until
from tests.serve.processes import SLOW, Server, environment, serving

TIMEOUT_S = 60
# minutes: longer than any test waits
ENDLESS = {"max_tokens": 900, "ignore_eos": True}
# a line is one write: `print` makes two, and another thread can write between them
STALLING = """
import os, time
from fd_dsa.engine.tokenizer import Tokenizer
from fd_dsa.serve import server
from fd_dsa.serve.state import ServerState
server.FORCED_EXIT_S = 8
hold = ServerState.hold
def accept(self, *args):
    hold(self, *args)
    os.write(1, b"accepted\\n")
ServerState.hold = accept
encode = Tokenizer.encode
def stall(self, text, *args, **kwargs):
    if text == "stall":
        os.write(1, b"stalled\\n")
        time.sleep(3600)
    return encode(self, text, *args, **kwargs)
Tokenizer.encode = stall
"""
FAILING = "from tests.engine.fakes import make_engine\n"
FAILING += "engine = make_engine(vocab_size=5000)\nengine.runner.fail_at = 2\nreturn engine"


@pytest.fixture
def clients() -> Iterator[ThreadPoolExecutor]:
    """Threads for requests that are answered later."""
    with ThreadPoolExecutor(40) as threads:
        yield threads


def ask(live: Server, clients: ThreadPoolExecutor, **fields: Any) -> Future[httpx.Response]:
    """The answer to a completion, which may come later."""
    url, body = f"{live.url}/v1/completions", {"prompt": "a", **fields}
    return clients.submit(httpx.post, url, json=body, timeout=TIMEOUT_S)


def wait_for_running(live: Server, num_requests: int) -> None:
    """Return when so many requests are inside the engine."""
    line = f'num_requests_running{{model_name="demo_model"}} {num_requests}.0'
    wait_until(lambda: line in httpx.get(f"{live.url}/metrics", timeout=TIMEOUT_S).text)


def wait_until_draining(live: Server) -> None:
    """Return when /health is 503."""
    url = f"{live.url}/health"
    wait_until(lambda: httpx.get(url, timeout=TIMEOUT_S).status_code == 503)


def test_first_signal_drains(tmp_path: Path, clients: ThreadPoolExecutor) -> None:
    flags = ("--shutdown-timeout", "120", "--sse-ping-interval", "0.2")
    with serving(tmp_path, *flags, body=SLOW) as live:
        url, endless = f"{live.url}/v1/completions", {"prompt": "a", **ENDLESS, "stream": True}
        # the server cannot end before this client leaves
        with httpx.stream("POST", url, json=endless, timeout=TIMEOUT_S):
            whole = ask(live, clients, max_tokens=30, ignore_eos=True)
            stream = ask(live, clients, max_tokens=30, ignore_eos=True, stream=True)
            wait_for_running(live, 3)
            # to all processes, as systemd sends it
            started = children(live.process.pid)
            assert started
            for pid in (*started, live.process.pid):
                os.kill(pid, signal.SIGTERM)
            wait_until_draining(live)
            refused = httpx.post(url, json={"prompt": "a"}, timeout=TIMEOUT_S)
            assert refused.status_code == 503
            assert "shutting down" in refused.json()["error"]["message"]
            answer = whole.result().json()
            assert answer["choices"][0]["finish_reason"] == "length"
            assert answer["usage"]["completion_tokens"] == 30
            assert '"finish_reason":"length"' in stream.result().text
            assert stream.result().text.endswith("data: [DONE]\n\n")
        assert live.process.wait(TIMEOUT_S) == 0


def test_after_the_timeout_the_rest_is_aborted_but_answered(
    tmp_path: Path, clients: ThreadPoolExecutor
) -> None:
    with serving(tmp_path, "--shutdown-timeout", "0.5", body=SLOW) as live:
        whole, stream = (ask(live, clients, **ENDLESS, stream=is_on) for is_on in (False, True))
        wait_for_running(live, 2)
        # 60 steps of 50 ms before its first token; if it came first, the others would wait for it
        prefill = ask(live, clients, prompt="a" * 960, max_tokens=9)
        wait_for_running(live, 3)
        live.process.terminate()
        answer = whole.result().json()
        assert answer["choices"][0]["finish_reason"] == "abort"
        assert 0 < answer["usage"]["completion_tokens"] < 900
        assert '"finish_reason":"abort"' in stream.result().text
        assert stream.result().text.endswith("data: [DONE]\n\n")
        answer = prefill.result().json()
        assert answer["choices"][0]["finish_reason"] == "abort"
        assert answer["usage"]["completion_tokens"] == 0
        assert live.process.wait(TIMEOUT_S) == 0


def test_second_signal_ends_at_once(tmp_path: Path, clients: ThreadPoolExecutor) -> None:
    """As Ctrl-C twice."""
    # without the second signal it would take longer than the test has
    with serving(tmp_path, "--shutdown-timeout", "3600", body=SLOW) as live:
        request = ask(live, clients, **ENDLESS)
        wait_for_running(live, 1)
        live.process.send_signal(signal.SIGINT)
        wait_until_draining(live)
        assert live.process.poll() is None
        live.ends(128 + signal.SIGINT, signal.SIGINT)
        assert isinstance(request.exception(), httpx.HTTPError)


HELD = """
import os, pathlib, time
from fd_dsa.engine.tokenizer import Tokenizer
from fd_dsa.serve import server
server.LAST_RESPONSES_S = 0.3
encode = Tokenizer.encode
def hold(self, text, *args, **kwargs):
    if text == "held":
        os.write(1, b"held\\n")
    while text == "held" and not pathlib.Path("go").exists():
        time.sleep(0.02)
    return encode(self, text, *args, **kwargs)
Tokenizer.encode = hold
"""


def test_requests_that_are_not_in_the_engine_yet_are_waited_for(
    tmp_path: Path, clients: ThreadPoolExecutor
) -> None:
    """Three in the tokenizer, and one whose body is still on its way; there are four threads."""
    with serving(tmp_path, "--shutdown-timeout", "60", body=SLOW, before=HELD) as live:
        sent, late = threading.Event(), threading.Event()

        def parts() -> Iterator[bytes]:
            yield b'{"prompt": "a", '
            sent.set()
            late.wait(TIMEOUT_S)
            yield b'"max_tokens": 3}'

        kind = {"Content-Type": "application/json"}
        url = f"{live.url}/v1/completions"
        slow = clients.submit(httpx.post, url, content=parts(), headers=kind, timeout=TIMEOUT_S)
        assert sent.wait(TIMEOUT_S)
        held = [ask(live, clients, prompt="held", max_tokens=3) for _ in range(3)]
        assert [live.line() for _ in range(3)] == ["held\n"] * 3
        live.process.terminate()
        wait_until_draining(live)
        assert ask(live, clients).result().status_code == 503
        time.sleep(0.6)
        late.set()
        assert slow.result().json()["usage"]["completion_tokens"] == 3
        (tmp_path / "go").touch()
        for request in held:
            assert request.result().json()["usage"]["completion_tokens"] == 3
        assert live.process.wait(TIMEOUT_S) == 0


@pytest.mark.slow
def test_a_tokenizer_that_stalls_holds_up_nothing_else(
    tmp_path: Path, clients: ThreadPoolExecutor
) -> None:
    """As many requests hang in it as there are threads for it, and more."""
    flags = ("--shutdown-timeout", "0.5")
    with serving(tmp_path, *flags, body=SLOW, before=STALLING) as live:
        stalled = [ask(live, clients, prompt="stall") for _ in range(40)]
        lines = Counter[str]()
        while lines["accepted\n"] < len(stalled) or not lines["stalled\n"]:
            lines[live.line()] += 1
            assert "" not in lines
        for path in ("/health", "/metrics", "/v1/models"):
            assert httpx.get(f"{live.url}{path}", timeout=TIMEOUT_S).status_code == 200
        log = live.ends()
        for request in stalled:
            assert request.result().status_code == 503
            assert "shut down" in request.result().json()["error"]["message"]
    assert "something still runs after the shutdown" in log and "Traceback" not in log


def test_engine_failure_ends_the_process_with_status_one(
    tmp_path: Path, clients: ThreadPoolExecutor
) -> None:
    with serving(tmp_path, body=FAILING) as live:
        assert ask(live, clients, **{**ENDLESS, "max_tokens": 50}).result().status_code == 500
        assert live.process.wait(TIMEOUT_S) == 1
        assert "the engine has failed" in live.log.read_text()


IN_A_CALLBACK = """
import os, signal, sys, weakref
from fd_dsa.serve import cli

def callback(_):
    os.kill(os.getpid(), {number})

def imports():
    lock = {{0}}
    kept = weakref.ref(lock, callback)
    del lock
    print("goes on")

cli.check_address_space = imports
signal.signal(signal.SIGINT, signal.default_int_handler)
from fd_dsa.cli import main
sys.exit(main(["serve"]))
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_in_a_callback_of_the_start_ends_it(number: signal.Signals) -> None:
    """Imports have such callbacks, in which Python drops exceptions."""
    program = IN_A_CALLBACK.format(number=int(number))
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    assert (done.returncode, done.stdout) == (128 + number, "")
    assert done.stderr.splitlines()[-1] == "fd_dsa: error: interrupted while starting"
