"""Signals and standard streams of a process, and the way a command ends."""

from __future__ import annotations

import fcntl
import os
import select
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import NoReturn, TextIO


def open_missing_streams() -> None:
    """Open closed standard streams on /dev/null.

    Otherwise their numbers would be reused by the next opened files, such as a client's connection,
    and writes would go there.
    """
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w"))  # noqa: SIM115


def end_with_starter(descriptor: int) -> None:
    """Make the kernel end this process when the process that started it has ended.

    No thread is involved. So it works even during a call that holds Python's lock, such as a
    library that reads a file from a dead disk.

    Args:
        descriptor: the read end of a pipe whose only write end belongs to the starter.
    """
    fcntl.fcntl(descriptor, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(descriptor, fcntl.F_SETSIG, signal.SIGKILL)
    flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
    fcntl.fcntl(descriptor, fcntl.F_SETFL, flags | os.O_ASYNC)
    if select.select([descriptor], [], [], 0)[0]:
        # the starter has ended already
        os._exit(1)


def leave_signals_to_starter() -> None:
    """Ignore SIGINT and SIGTERM, because the process that started this one handles them.

    Both signals may go to all processes, as from systemd. Blocking them is not enough: another
    thread, for example one of NumPy's libraries, would receive them.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def discard(*streams: TextIO) -> None:
    """Redirect streams that cannot be written to /dev/null, with their buffers."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in streams:
        os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


def _flush() -> None:
    """Flush the standard streams.

    If stdout cannot be written, the interpreter tries again at its exit and reports that.

    Raises:
        BrokenPipeError: the reader of stdout is gone.
    """
    try:
        sys.stderr.flush()
    except OSError:
        # stderr cannot report its own failure; the exit status stays that of the command
        discard(sys.stderr)
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError:
        return


class Terminated(KeyboardInterrupt):
    """SIGTERM, which ends a command like Ctrl-C."""


def _terminate(*_: object) -> None:
    raise Terminated


def signal_end(stop: KeyboardInterrupt) -> tuple[str, int]:
    """Return the message and the exit status of a command ended by a signal."""
    by_term = isinstance(stop, Terminated)
    line = str(stop) or ("terminated" if by_term else "interrupted")
    return line, 128 + (signal.SIGTERM if by_term else signal.SIGINT)


def exit_at_once(number: int, line: str) -> NoReturn:
    """Write a line to stderr and end the process with the shell's status for a signal.

    Running threads are cut off.
    """
    with suppress(OSError):
        sys.stderr.write(f"{line}\n")
        sys.stderr.flush()
        sys.stdout.flush()
    os._exit(128 + number)


@contextmanager
def signals_exit_at_once(line: str) -> Iterator[None]:
    """End the process at once on SIGINT or SIGTERM in the block, even if threads work.

    Only the main thread can handle signals. In another thread the block runs unchanged.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, lambda got, _: exit_at_once(got, line)) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


@contextmanager
def command() -> Iterator[None]:
    """Run a command: signals end it with one line, and a closed stdout pipe without one.

    Raises:
        SystemExit: the shell's status for SIGPIPE if the reader of stdout is gone, as in `fd-dsa
            bench --help | head -1`. After Ctrl-C (130) and SIGTERM (143) the process ends.
    """
    open_missing_streams()
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _terminate)
    try:
        try:
            yield
        finally:
            _flush()
    except KeyboardInterrupt as stop:
        line, status = signal_end(stop)
        sys.stderr.write(f"fd_dsa: error: {line}\n")
        sys.stderr.flush()
        # the interpreter's own shutdown may hang if an import of Paddle was cut off
        os._exit(status)
    except BrokenPipeError:
        discard(sys.stdout, sys.stderr)
        raise SystemExit(128 + signal.SIGPIPE) from None
