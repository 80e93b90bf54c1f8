"""Signals and standard streams of a process, and the way a command ends."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
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
def signals_exit_at_once(line: str = "") -> Iterator[None]:
    """End the process at once on SIGINT or SIGTERM in the block, even if threads work.

    Only the main thread can handle signals. In another thread the block runs unchanged.

    Args:
        line: line for stderr, "" = the one of `command`.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    stops = {signal.SIGINT: KeyboardInterrupt(), signal.SIGTERM: Terminated()}
    before = {number: signal.getsignal(number) for number in stops}

    def stop(number: int, _: object) -> None:
        word = signal_end(stops[signal.Signals(number)])[0]
        exit_at_once(number, line or f"fd_dsa: error: {word}")

    # a job in the background of a script ignores SIGINT
    changed = [number for number, handler in before.items() if handler is not signal.SIG_IGN]
    for number in changed:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number in changed:
            signal.signal(number, before[number])


@contextmanager
def signals_call(handle: Callable[[int], None]) -> Iterator[None]:
    """Make SIGINT and SIGTERM call `handle` in the event loop. Only the main thread can."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    import asyncio

    loop, numbers = asyncio.get_running_loop(), (signal.SIGINT, signal.SIGTERM)
    for number in numbers:
        loop.add_signal_handler(number, handle, number)
    try:
        yield
    finally:
        for number in numbers:
            loop.remove_signal_handler(number)


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
        if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
            signal.signal(signal.SIGINT, signal.default_int_handler)
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
