"""FastDeploy's server as a child process, below a guard that ends it with its launcher.

`ServerProcess` is the launcher's side; `python -I server.py FD COMMAND...`, run by path and with
the standard library alone, is the guard. FD is the reading end of a pipe: each byte is the number
of a signal for the server, and its end means that the launcher is gone, however it went. FastDeploy
starts its workers in process groups of their own (`fastdeploy/engine/engine.py`), so the guard is
the reaper of orphans among its descendants, and ends those that are left once the server has ended.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import IO

_FORWARDED = (signal.SIGINT, signal.SIGTERM)
_READ_BYTES = 1 << 16
_KEPT_BYTES = 4096
# for the last output, after all processes that could write have ended
_LAST_OUTPUT_S = 5.0
# from linux/prctl.h
_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_SIGNALS = (*_FORWARDED, signal.SIGHUP)
# for the server when the launcher is gone, and for its workers when the server is
_SERVER_GRACE_S = 10.0
_ORPHAN_GRACE_S = 5.0
# after SIGKILL; a process that waits for a driver cannot be ended
_GIVE_UP_S = 60.0
_POLL_S = 0.05
_EXIT_NO_COMMAND = 127

_libc = ctypes.CDLL(None, use_errno=True)


class ServerProcess:
    """A command that runs below a guard, which ends it when this process ends in whatever way.

    Its output comes through byte for byte, on the stream it was written to. SIGINT and SIGTERM
    that this process gets while the block runs are forwarded, each once; a terminal's Ctrl-C does
    not reach the server by itself, since it runs in a session of its own.

    Attributes:
        signals: numbers of the signals forwarded so far.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        self.signals: list[int] = []
        self._command, self._environment = list(command), dict(environment)

    def __enter__(self) -> ServerProcess:
        reading, self._control = os.pipe()
        os.set_blocking(self._control, False)
        # before the start, so that no signal is lost; the pipe keeps them for the guard
        self._before = {number: signal.signal(number, self._forward) for number in _FORWARDED}
        try:
            # -I: the guard needs the standard library alone, whatever the environment says
            self._process = subprocess.Popen(
                [sys.executable, "-I", __file__, str(reading), *self._command],
                env=self._environment,
                pass_fds=(reading,),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                start_new_session=True,
            )
        except BaseException:
            self._restore()
            raise
        finally:
            os.close(reading)
        assert self._process.stdout is not None and self._process.stderr is not None
        self._tails = bytearray(), bytearray()
        sources = self._process.stdout, self._process.stderr
        streams = zip(sources, (sys.stdout, sys.stderr), self._tails, strict=True)
        self._copies = [threading.Thread(target=_copy, args=a, daemon=True) for a in streams]
        for thread in self._copies:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """End the command, if it has not ended, and pass on the rest of its output."""
        control, self._control = self._control, -1
        os.close(control)
        self._process.wait()
        self._wait_for_output()
        self._restore()

    def wait(self, timeout_s: float | None = None) -> int | None:
        """Exit status of the command, 128 + n after signal n; None if it runs after `timeout_s`."""
        try:
            status = self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return None
        # below 0 where a signal ended the guard itself; its own statuses are so already
        return 128 - status if status < 0 else status

    def last_words(self) -> str:
        """The last line that the command wrote to stderr, or else to stdout; "" without any."""
        self._wait_for_output()
        out, err = map(last_line, self._tails)
        return err or out

    def _wait_for_output(self) -> None:
        """Wait for what is still on its way."""
        for thread in self._copies:
            thread.join(_LAST_OUTPUT_S)

    def _forward(self, number: int, _: FrameType | None) -> None:
        """Hand a signal to the guard, which gives it to the server."""
        self.signals.append(number)
        # the guard has ended, and the server with it
        with contextlib.suppress(OSError):
            os.write(self._control, bytes([number]))

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


def _copy(source: IO[bytes], target: IO[str], tail: bytearray) -> None:
    """Copy a stream of the command as it comes, and keep its last bytes in `tail`."""
    while chunk := os.read(source.fileno(), _READ_BYTES):
        tail[:] = (tail + chunk)[-_KEPT_BYTES:]
        # the reader of our output is gone: the server must not stop for that
        with contextlib.suppress(OSError, ValueError):
            target.buffer.write(chunk)
            target.buffer.flush()


def last_line(output: bytes | bytearray) -> str:
    """The last line that is not empty; "" without any."""
    lines = output.decode("utf-8", "replace").splitlines()
    return next((line.strip() for line in reversed(lines) if line.strip()), "")


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
