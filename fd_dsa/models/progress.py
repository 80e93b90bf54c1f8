"""Shows how far the loading of weights has come."""

from __future__ import annotations

import logging
import sys
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TimeRemainingColumn

from fd_dsa.models.memory_plan import format_bytes

logger = logging.getLogger(__name__)

_LINE_PERCENT = 25


class LoadProgress:
    """A bar on a terminal, elsewhere one line of the log for each quarter.

    Use it as a context manager and pass it as `progress` to `load_weights`.

    Args:
        stream: where a bar is drawn, if it is a terminal; None is stderr.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = sys.stderr if stream is None else stream
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._next_percent = _LINE_PERCENT

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
        """Take note that `done_bytes` of `total_bytes` are loaded."""
        if self._bar is not None:
            if self._task is None:
                self._task = self._bar.add_task("weights", total=total_bytes)
            self._bar.update(self._task, completed=done_bytes)
            return
        percent = 100 * done_bytes // max(total_bytes, 1)
        if percent >= self._next_percent:
            self._next_percent = percent - percent % _LINE_PERCENT + _LINE_PERCENT
            done, total = format_bytes(done_bytes), format_bytes(total_bytes)
            logger.info("weights %d %% %s of %s", percent, done, total)
