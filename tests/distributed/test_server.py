"""Servers whose model is shared by processes: signals, ends, two on one machine."""

from __future__ import annotations

import os
import re
import signal
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests import proc
from tests.proc import children
from tests.serve.conftest import wait_until
from tests.serve.processes import Server, serving, started

pytestmark = pytest.mark.slow
FLAGS = ("--device", "cpu", "-tp", "2", "--max-model-len", "512", "--max-num-seqs", "4")
# of a step: neither end of an answer is near
ASKED = {"prompt": "Once upon a time", "temperature": 0, "ignore_eos": True, "max_tokens": 150}


def ask(server: Server, **more: Any) -> Any:
    answer = httpx.post(f"{server.url}/v1/completions", json={**ASKED, **more}, timeout=120)
    return answer.json()


def rank_of(server: Server) -> int:
    """The process of rank 1."""
    pids = children(server.process.pid)
    found = [pid for pid in pids if "fd_dsa.startup.rank" in proc.read(pid, "cmdline")]
    assert len(found) == 1
    return found[0]


def in_a_step(server: Server, act: Callable[[], object], after_s: float = 0.5) -> Any:
    """Answer to a request during which something is done."""
    with ThreadPoolExecutor(1) as threads:
        answer: Future[Any] = threads.submit(ask, server)
        time.sleep(after_s)
        assert not answer.done()
        act()
        return answer.result()


def nothing_is_left(pids: list[int], files: set[str]) -> None:
    """All of these processes have ended, and shared memory is as it was."""
    wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids), 10)
    assert set(os.listdir("/dev/shm")) <= files


@pytest.mark.parametrize("number", ["SIGKILL", "SIGSTOP"])
@pytest.mark.parametrize("is_busy", [False, True], ids=["idle", "in-a-step"])
def test_a_rank_that_ends_or_stops_ends_the_server(
    number: str, is_busy: bool, tmp_path: Path
) -> None:
    files = set(os.listdir("/dev/shm"))
    with serving(tmp_path, *FLAGS) as server:
        pids, rank = children(server.process.pid), rank_of(server)
        ended = []

        def act() -> None:
            os.kill(rank, signal.Signals[number])
            ended.append(time.monotonic())

        if is_busy:
            answer = in_a_step(server, act)
            assert "engine has failed" in answer["error"]["message"]
        else:
            act()
        assert server.process.wait(30) == 1
        assert time.monotonic() - ended[0] < 10
        log = server.log.read_text()
        words = "ended by signal 9 (SIGKILL)" if number == "SIGKILL" else "was stopped for 6.5 s"
        assert f"the engine has failed: rank 1 (process {rank}) {words}" in log
        assert "Traceback" not in log
        nothing_is_left(pids, files)
        # the port is free
        port = server.url.rpartition(":")[2]
        with serving(tmp_path, *FLAGS, "--port", port) as again:
            assert ask(again, max_tokens=2)["usage"]["completion_tokens"] == 2


# the engine's process, whose warm-up does not end, as a capture that waits for a rank on a GPU, and
# the rank, which dies in its own
WARMING = """
    import os, signal
    del sys.modules["fd_dsa.startup.build"]
    import fd_dsa.startup.build as real
    from fd_dsa.startup.ranks import Ranks
    from tests.distributed.test_llm import IN_WARM_UP, KILL, RANK
    program = RANK.format(patch=IN_WARM_UP.format(what=KILL))
    Ranks.COMMAND = (sys.executable, "-c", program)
    load = real.load_model
    def load_on_a_device(plan, group, progress):
        group.has_devices = True
        return load(plan, group, progress)
    real.load_model = load_on_a_device
    real.warm_up = lambda *_: time.sleep(60)
    return real.build_engine(config, progress)
"""


def test_a_rank_killed_before_it_serves_ends_the_start(tmp_path: Path) -> None:
    files = set(os.listdir("/dev/shm"))
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
    with started(tmp_path, *FLAGS, "--port", str(port), body=WARMING) as server:
        pids: set[int] = set()

        def has_ended() -> bool:
            pids.update(children(server.process.pid))
            return server.process.poll() is not None

        wait_until(has_ended, 60)
        assert server.process.returncode == 2 and len(pids) > 1
        log = server.log.read_text()
        assert re.search(r"rank 1 \(process \d+\) ended by signal 9 \(SIGKILL\)", log)
        assert "waits for a device, so it ends" in log and "Traceback" not in log
        nothing_is_left(sorted(pids), files)
    socket.create_server(("127.0.0.1", port)).close()


def test_a_rank_may_rest_for_five_seconds(tmp_path: Path) -> None:
    with serving(tmp_path, *FLAGS) as server:
        expected, rank = ask(server), rank_of(server)
        timer = threading.Timer(5, os.kill, (rank, signal.SIGCONT))

        def act() -> None:
            os.kill(rank, signal.SIGSTOP)
            timer.start()

        assert in_a_step(server, act)["choices"] == expected["choices"]
        assert ask(server)["choices"] == expected["choices"]
        server.ends()


def test_two_servers_drain_beside_each_other(tmp_path: Path) -> None:
    files = set(os.listdir("/dev/shm"))
    (tmp_path / "other").mkdir()
    with serving(tmp_path, *FLAGS) as one, serving(tmp_path / "other", *FLAGS) as other:
        assert ask(one, max_tokens=20)["choices"] == ask(other, max_tokens=20)["choices"]
        pids = children(one.process.pid)
        # a signal to a rank alone is for nobody
        os.kill(rank_of(one), signal.SIGTERM)
        answer = in_a_step(one, lambda: one.process.send_signal(signal.SIGTERM))
        assert answer["usage"]["completion_tokens"] == ASKED["max_tokens"]
        assert one.process.wait(30) == 0
        nothing_is_left(pids, files)
        assert ask(other, max_tokens=20)["usage"]["completion_tokens"] == 20
        other.ends()


def test_ranks_end_with_the_engine(tmp_path: Path) -> None:
    with serving(tmp_path, *FLAGS) as server:
        pids = children(server.process.pid)
        engine = next(pid for pid in pids if "engine_child" in proc.read(pid, "cmdline"))
        os.kill(engine, signal.SIGKILL)
        assert server.process.wait(30) == 1
        nothing_is_left(pids, set(os.listdir("/dev/shm")))
