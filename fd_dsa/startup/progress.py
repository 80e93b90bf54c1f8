"""Progress of a start: phases and loaded bytes, for the log and for `/health`."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TimeRemainingColumn

from fd_dsa.startup.memory import format_bytes

logger = logging.getLogger(__name__)

_LINE_PERCENT = 25
# a quick load has only the line at its end
_LINE_EVERY_S = 5.0
_TELL_EVERY_S = 0.1
PHASES = ("config", "weights", "kv cache", "warm-up", "ready")


class StartupProgress:
    """Phases of a start, each with a line of the log. Any thread may read it.

    Args:
        tell: gets the index and detail of the phase, when a phase ends and a few times a second
            during a phase.

    Attributes:
        began: `time.monotonic()` of the start, seconds.
        index: number of the present phase, from 0.
    """

    def __init__(self, tell: Callable[[int, str], object] = lambda index, detail: None) -> None:
        self.began, self._told_at = time.monotonic(), 0.0
        self.index = 0
        self._detail, self._tell = "", tell

    @property
    def phase(self) -> str:
        """Name of the present phase, the last one after the start."""
        return PHASES[self.index]

    @property
    def elapsed_s(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.began

    def note(self, detail: str) -> None:
        """Set the detail of the present phase, such as the bytes loaded so far."""
        self._detail, now = detail, time.monotonic()
        if now - self._told_at >= _TELL_EVERY_S:
            self._told_at = now
            self._tell(self.index, detail)

    def follow(self, index: int, detail: str) -> None:
        """Copy the progress of the same start in another process, which logs it."""
        self.index, self._detail = index, detail

    def done(self, text: str) -> None:
        """Log a line about the present phase, and begin the next phase."""
        number, name = self.index + 1, self.phase
        logger.info("[%d/%d] %-8s %s", number, len(PHASES), name, text)
        self._detail = ""
        self.index = min(number, len(PHASES) - 1)
        self._tell(self.index, "")

    def describe(self) -> str:
        """Describe the progress for people: phase, its number, its detail, seconds."""
        detail = f", {self._detail}" if self._detail else ""
        return (
            f"{self.phase} (phase {self.index + 1} of {len(PHASES)}{detail}), "
            f"{self.elapsed_s:.1f} s since the start"
        )


class LoadProgress:
    """Progress of the weights: a bar on a terminal, or else a line of the log for each quarter.

    Use it as a context manager and pass it as `progress` to `load_weights`.

    Args:
        startup: gets the details of its present phase.
        stream: terminal for the bar; None = stderr. Other streams get no bar.

    Attributes:
        total_bytes: bytes of all weights, 0 before the first call.
    """

    def __init__(self, startup: StartupProgress, stream: TextIO | None = None) -> None:
        self._startup = startup
        self.total_bytes = 0
        self._stream = sys.stderr if stream is None else stream
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._next_percent = _LINE_PERCENT
        self._logged_at = time.monotonic()

    def __enter__(self) -> LoadProgress:
        if self._stream.isatty():
            self._bar = Progress(
                "weights",
                BarColumn(),
                "{task.percentage:>3.0f} %",
                DownloadColumn(binary_units=True),
                TimeRemainingColumn(),
                console=Console(file=self._stream),
            )
            self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, done_bytes: int, total_bytes: int) -> None:
        """Note that `done_bytes` of `total_bytes` are loaded."""
        self.total_bytes = total_bytes
        done, total = format_bytes(done_bytes), format_bytes(total_bytes)
        self._startup.note(f"{done} of {total}")
        if self._bar is not None:
            if self._task is None:
                self._task = self._bar.add_task("weights", total=total_bytes)
            self._bar.update(self._task, completed=done_bytes)
            return
        percent = 100 * done_bytes // max(total_bytes, 1)
        if percent >= self._next_percent:
            self._next_percent = percent - percent % _LINE_PERCENT + _LINE_PERCENT
            now = time.monotonic()
            if percent < 100 and now - self._logged_at >= _LINE_EVERY_S:
                self._logged_at = now
                logger.info("weights %d %% %s of %s", percent, done, total)
