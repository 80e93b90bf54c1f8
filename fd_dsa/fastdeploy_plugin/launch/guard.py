"""A process between the launcher and FastDeploy's server, so that nothing outlives the launcher.

Run by path (`python -I guard.py FD COMMAND...`), with the standard library alone. FD is the
reading end of a pipe: each byte is the number of a signal for the server, and its end means that
the launcher is gone, however it went. FastDeploy starts its workers in process groups of their own
(`fastdeploy/engine/engine.py`), so the guard is the reaper of orphans among its descendants, and
ends those that are left once the server has ended.
"""

from __future__ import annotations

import ctypes
import math
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

# from linux/prctl.h
_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# for the server when the launcher is gone, and for its workers when the server is
_SERVER_GRACE_S = 10.0
_ORPHAN_GRACE_S = 5.0
# after SIGKILL; a process that waits for a driver cannot be ended
_GIVE_UP_S = 60.0
_POLL_S = 0.05
_EXIT_NO_COMMAND = 127

_libc = ctypes.CDLL(None, use_errno=True)


def main(arguments: Sequence[str]) -> int:
    """Run a command and return its exit status, 128 + n if signal n ended it."""
    control, command = int(arguments[0]), arguments[1:]
    os.set_inheritable(control, False)
    _libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    woken, waker = os.pipe()
    os.set_blocking(waker, False)
    signal.set_wakeup_fd(waker)
    # a handler, not SIG_IGN, which the server would inherit
    for number in (*_SIGNALS, signal.SIGCHLD):
        signal.signal(number, lambda *_: None)
    try:
        server = subprocess.Popen(command, start_new_session=True, preexec_fn=_prepare_server)
    except OSError as error:
        sys.stderr.write(f"fd_dsa: error: {command[0]}: {error.strerror}\n")
        return _EXIT_NO_COMMAND
    status = _watch(server.pid, control, woken)
    _end_children(_ORPHAN_GRACE_S)
    return status


def _prepare_server() -> None:
    """In the server, before it starts: the usual signals, and one when the guard is killed."""
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_DFL)
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)


def _watch(server: int, control: int, woken: int) -> int:
    """Forward signals until the server ends, or the launcher is gone; returns its status."""
    deadline = math.inf
    while (status := _reap(server)) is None:
        is_alone = deadline < math.inf
        timeout_s = _POLL_S if is_alone else None
        ready, _, _ = select.select([woken] if is_alone else [control, woken], [], [], timeout_s)
        if woken in ready:
            os.read(woken, 4096)
        if control in ready:
            numbers = os.read(control, 4096)
            if not numbers:
                deadline = time.monotonic() + _SERVER_GRACE_S
            for number in numbers or [signal.SIGTERM]:
                os.kill(server, number)
        if time.monotonic() > deadline:
            os.killpg(server, signal.SIGKILL)
    return status


def _reap(server: int) -> int | None:
    """Collect the processes that have ended; the server's status if it is among them."""
    status = None
    while True:
        try:
            pid, code = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return status
        if pid == 0:
            return status
        if pid == server:
            status = os.waitstatus_to_exitcode(code)
            status = 128 - status if status < 0 else status


def _end_children(grace_s: float) -> None:
    """End what is left of the server: first by SIGTERM, after `grace_s` by SIGKILL."""
    deadline = time.monotonic() + grace_s
    asked: set[int] = set()
    while children := _children():
        if time.monotonic() > deadline + _GIVE_UP_S:
            sys.stderr.write(f"fd_dsa: error: processes that do not end: {children}\n")
            return
        for pid in children:
            if time.monotonic() > deadline:
                os.kill(pid, signal.SIGKILL)
            elif pid not in asked:
                asked.add(pid)
                os.kill(pid, signal.SIGTERM)
        time.sleep(_POLL_S)


def _children() -> list[int]:
    """Processes whose parent this one is, orphans of the server included; ended ones are reaped."""
    _reap(-1)
    own, found = os.getpid(), []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            # the name before, in brackets, may hold anything
            fields = (folder / "stat").read_bytes().rpartition(b")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == own:
            found.append(int(folder.name))
    return found


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
