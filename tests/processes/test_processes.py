"""Child processes: how they start, are watched, and end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fd_dsa.processes.parent import ChildProcess
from tests.proc import is_alive

ROOT = Path(__file__).parents[2]
# says that it has started, then obeys
PROGRAM = """
import os, time
from fd_dsa.processes.child import connect_to_parent
connection = connect_to_parent()
connection.send(os.getpid())
exec(connection.recv())
"""
TIMEOUT_S = 20.0


@pytest.fixture
def child() -> Iterator[ChildProcess]:
    process = ChildProcess((sys.executable, "-c", PROGRAM))
    try:
        assert process.connection.recv() == process.pid
        yield process
    finally:
        process.join(0.0)


def until(is_so: Callable[[], bool]) -> None:
    end = time.monotonic() + TIMEOUT_S
    while not is_so():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("work", "expected"),
    [
        ("os._exit(3)", ("ended with status 3", "")),
        (
            "os.kill(os.getpid(), 9)",
            ("ended by signal 9 (SIGKILL)", "; the system may have been out of memory"),
        ),
        ("os.kill(os.getpid(), 11)", ("ended by signal 11 (SIGSEGV)", "")),
    ],
)
def test_the_end_of_a_child_is_described(
    child: ChildProcess, work: str, expected: tuple[str, str]
) -> None:
    assert child.is_running
    child.connection.send(work)
    assert child.how_ended() == expected
    assert not child.is_running


def test_a_child_that_only_ends_its_connection_is_described(
    child: ChildProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    child.connection.send("connection.close(); time.sleep(60)")
    with pytest.raises(EOFError):
        child.connection.recv()
    wait = subprocess.Popen.wait
    with monkeypatch.context() as patch:
        # a hundredth of the time that a child has to end
        patch.setattr(subprocess.Popen, "wait", lambda process, time_s: wait(process, time_s / 100))
        assert child.how_ended() == ("ended its connection but not itself", "")
    assert child.is_running


def test_signals_to_all_processes_are_the_parents(child: ChildProcess) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        os.kill(child.pid, number)
    child.connection.send("connection.send(os.getsid(0))")
    # a session of its own: Ctrl-C of a terminal does not reach it
    assert child.connection.recv() == child.pid


def test_a_stopped_child_is_seen_and_killed_after_the_time(child: ChildProcess) -> None:
    assert not child.is_stopped
    os.kill(child.pid, signal.SIGSTOP)
    until(lambda: child.is_stopped)
    begin = time.monotonic()
    child.join(0.2)
    assert not child.is_running
    assert 0.2 <= time.monotonic() - begin < 5.0


def test_a_child_and_what_it_has_forked_end_with_the_parent() -> None:
    program = f"""
import os, signal, sys
from fd_dsa.processes.parent import ChildProcess
child = ChildProcess((sys.executable, "-c", {PROGRAM!r}))
child.connection.recv()
child.connection.send("pid = os.fork(); connection.send(pid) if pid else None; time.sleep(60)")
print(child.pid, child.connection.recv(), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, timeout=60
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    pids = [int(pid) for pid in done.stdout.split()]
    assert len(pids) == 2
    until(lambda: not any(map(is_alive, pids)))


def test_a_process_that_the_parent_has_forked_keeps_no_child() -> None:
    program = f"""
import os, signal, sys, time
from fd_dsa.processes.parent import ChildProcess
child = ChildProcess((sys.executable, "-c", {PROGRAM!r}))
child.connection.recv()
forked = os.fork()
if not forked:
    for stream in (1, 2):
        os.close(stream)
    time.sleep(60)
    os._exit(0)
# the end of a copy is not that of the parent
time.sleep(0.1)
child.connection.send("connection.send('runs'); time.sleep(60)")
print(child.pid, forked, child.connection.recv(), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, timeout=30
    )
    pid, forked, answer = done.stdout.split()
    assert (done.returncode, answer) == (-signal.SIGKILL, "runs"), done.stderr
    try:
        until(lambda: not is_alive(int(pid)))
        assert is_alive(int(forked))
    finally:
        os.kill(int(forked), signal.SIGKILL)


def test_a_child_without_its_object_ends() -> None:
    process = ChildProcess((sys.executable, "-c", PROGRAM))
    connection, pid = process.connection, process.pid
    connection.recv()
    with pytest.warns(ResourceWarning, match="still running"):
        del process
    until(lambda: not is_alive(pid))


def test_a_command_that_does_not_exist_leaves_no_file_open() -> None:
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(FileNotFoundError):
        ChildProcess(("/nonexistent/program",))
    assert len(os.listdir("/proc/self/fd")) == before
