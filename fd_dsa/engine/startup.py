"""How far the start of an engine has come: written while it loads, read from any thread."""

from __future__ import annotations

import logging
import time

logger = logging.getLogger(__name__)

PHASES = ("config", "weights", "kv cache", "warm-up", "ready")


class StartupProgress:
    """The phases of a start, one line of the log for each; read from any thread.

    Attributes:
        began: `time.monotonic()` of the start.
    """

    def __init__(self) -> None:
        self.began = time.monotonic()
        self._index = 0
        self._detail = ""

    @property
    def index(self) -> int:
        """Number of the phase that runs, from 0."""
        return self._index

    @property
    def phase(self) -> str:
        """The phase that runs; the last one once the engine is there."""
        return PHASES[self._index]

    @property
    def elapsed_s(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.began

    def note(self, detail: str) -> None:
        """Say how far the present phase has come."""
        self._detail = detail

    def follow(self, index: int, detail: str) -> None:
        """Take over how far the same start is in another process, which logs it."""
        self._index, self._detail = index, detail

    def done(self, text: str) -> None:
        """End the present phase with one line about it; the next one begins."""
        number, name = self._index + 1, self.phase
        logger.info("[%d/%d] %-8s %s", number, len(PHASES), name, text)
        self._detail = ""
        self._index = min(number, len(PHASES) - 1)

    def describe(self) -> str:
        """For people who ask while it runs: phase, its number, how far it is, seconds."""
        detail = f", {self._detail}" if self._detail else ""
        return (
            f"{self.phase} (phase {self._index + 1} of {len(PHASES)}{detail}), "
            f"{self.elapsed_s:.1f} s since the start"
        )
