"""Limits of the renderings of one prompt: length, and processor time.

Each loop, macro and piece of output of a template is a step. A step now and then checks the clock
and the client.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from jinja2.exceptions import SecurityError

from fd_dsa.cancellation import check_cancelled

DEFAULT_MAX_CHARS = 16 << 20
"""Maximum prompt length in characters if the caller sets no limit."""
MAX_SECONDS = 10.0
"""Maximum processor time of the renderings of one prompt, seconds."""
# a step takes about a microsecond
_CHECKED_STEPS = 16


class OverBudget(SecurityError, ValueError):
    """A template would exceed a limit of its rendering."""


class PromptTooLong(OverBudget):
    """The prompt would exceed its maximum length."""


class Budget:
    """The remaining processor time of the renderings of one prompt, in one thread.

    Args:
        max_chars: maximum length of each prompt, characters.
        max_seconds: maximum processor time, seconds.
    """

    def __init__(self, max_chars: int, max_seconds: float) -> None:
        self.max_chars = max_chars
        self._max_seconds = max_seconds
        self._end = time.thread_time() + max_seconds
        self._num_steps = 0

    @property
    def left_s(self) -> float:
        """Remaining processor time, seconds."""
        return self._end - time.thread_time()

    def spend(self, seconds: float) -> None:
        """Count processor time of another process, and check the rest.

        Raises:
            OverBudget: the time is used up.
            Cancelled: the client has disconnected.
        """
        self._end -= seconds
        check_cancelled()
        if self.left_s <= 0:
            raise OverBudget(f"takes more than {self._max_seconds:g} s of processor time")

    def step(self) -> None:
        """Count a step, and check the time and the client now and then. See `spend`."""
        self._num_steps += 1
        if not self._num_steps % _CHECKED_STEPS:
            self.spend(0)


_active: ContextVar[Budget] = ContextVar("budget")
current = _active.get
"""The budget of the rendering that runs in this thread."""


@contextmanager
def bounded_rendering(
    max_chars: int | None = None, max_seconds: float | None = None
) -> Iterator[None]:
    """Render the templates inside with one budget.

    Args:
        max_chars: maximum length of each prompt, characters. None keeps the caller's budget, or
            uses `DEFAULT_MAX_CHARS` without one.
        max_seconds: maximum processor time, seconds. None = `MAX_SECONDS`.
    """
    if max_chars is None and _active.get(None) is not None:
        yield
        return
    chars = DEFAULT_MAX_CHARS if max_chars is None else max_chars
    token = _active.set(Budget(chars, MAX_SECONDS if max_seconds is None else max_seconds))
    try:
        yield
    finally:
        _active.reset(token)
