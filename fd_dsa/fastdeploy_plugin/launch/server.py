"""FastDeploy's server as a child process: its output passed on, signals forwarded."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import IO

from fd_dsa.fastdeploy_plugin.launch.probe import last_line

_GUARD = Path(__file__).with_name("guard.py")
_FORWARDED = (signal.SIGINT, signal.SIGTERM)
_READ_BYTES = 1 << 16
_KEPT_BYTES = 4096
# for the last output, after all processes that could write have ended
_LAST_OUTPUT_S = 5.0


class ServerProcess:
    """A command that runs below a guard, which ends it when this process ends in whatever way.

    Its output comes through byte for byte, on the stream it was written to. SIGINT and SIGTERM
    that this process gets while the block runs are forwarded, each once; a terminal's Ctrl-C does
    not reach the server by itself, since it runs in a session of its own.

    Args:
        command: program and arguments.
        environment: of the command.

    Attributes:
        signals: numbers of the signals forwarded so far.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        self.signals: list[int] = []
        self._command, self._environment = list(command), dict(environment)

    def __enter__(self) -> ServerProcess:
        """Start the command."""
        reading, self._control = os.pipe()
        os.set_blocking(self._control, False)
        # before the start, so that no signal is lost; the pipe keeps them for the guard
        self._before = {number: signal.signal(number, self._forward) for number in _FORWARDED}
        try:
            # -I: the guard needs the standard library alone, whatever the environment says
            self._process = subprocess.Popen(
                [sys.executable, "-I", str(_GUARD), str(reading), *self._command],
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
        self._streams = (
            _Stream(self._process.stdout, sys.stdout),
            _Stream(self._process.stderr, sys.stderr),
        )
        return self

    def __exit__(self, *_: object) -> None:
        """End the command, if it has not ended, and pass on the rest of its output."""
        control, self._control = self._control, -1
        os.close(control)
        self._process.wait()
        for stream in self._streams:
            stream.finish()
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
        for stream in reversed(self._streams):
            stream.finish()
            if words := last_line(stream.tail):
                return words
        return ""

    def _forward(self, number: int, _: FrameType | None) -> None:
        """Hand a signal to the guard, which gives it to the server."""
        self.signals.append(number)
        # the guard has ended, and the server with it
        with contextlib.suppress(OSError):
            os.write(self._control, bytes([number]))

    def _restore(self) -> None:
        """Put the signal handlers back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)


class _Stream:
    """One stream of the command, copied in a thread as it comes."""

    def __init__(self, source: IO[bytes], target: IO[str]) -> None:
        self._source, self._target = source, target
        self.tail = b""
        self._thread = threading.Thread(target=self._copy, daemon=True)
        self._thread.start()

    def _copy(self) -> None:
        while chunk := os.read(self._source.fileno(), _READ_BYTES):
            self.tail = (self.tail + chunk)[-_KEPT_BYTES:]
            # the reader of our output is gone: the server must not stop for that
            with contextlib.suppress(OSError, ValueError):
                self._target.buffer.write(chunk)
                self._target.buffer.flush()

    def finish(self) -> None:
        """Wait for what is still on its way."""
        self._thread.join(_LAST_OUTPUT_S)
