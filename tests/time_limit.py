"""The time after which a session begins no more tests.

CI has 90 minutes. A machine of the usual speed needs half of them. A slower one ends in time with
fewer tests, and says how many it did not begin.
"""

from __future__ import annotations

import os
import time
import zlib

import pytest

VARIABLE = "TESTS_BEGIN_BEFORE"
"""Environment variable with that time, in seconds since 1970. Without it all tests run."""
REASON = "not begun in time"


def _last_begin() -> float | None:
    """The time after which no test begins."""
    text = os.environ.get(VARIABLE)
    return float(text) if text else None


def skip_if_late() -> None:
    """Skip a test that would begin too late."""
    last = _last_begin()
    if last is not None and time.time() > last:
        pytest.skip(REASON)


def half_of_the_rest() -> dict[str, str]:
    """The variable for a session inside a test, which gets half of the time that is left."""
    last = _last_begin()
    return {} if last is None else {VARIABLE: str((time.time() + last) / 2)}


def turn(path: str) -> int:
    """Place of a file among others of its kind, another one for every time limit.

    Without a limit all are 0. So a slow machine leaves out other files each time.
    """
    limit = os.environ.get(VARIABLE)
    # not `hash`, which differs between worker processes
    return zlib.crc32(f"{limit} {path}".encode()) if limit else 0
