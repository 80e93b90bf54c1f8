"""Cancellation of work in a thread, which checks if its result is still needed."""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import islice
from typing import TypeVar

from fd_dsa.errors import FdDsaError

_T = TypeVar("_T")
# items between two checks, for loops that take up to 20 us an item
_CHECKED_ITEMS = 4096
_stop: ContextVar[threading.Event | None] = ContextVar("stop", default=None)


class Cancelled(FdDsaError):
    """The result of this work is no longer needed."""


@contextmanager
def cancelled_by(stop: threading.Event) -> Iterator[None]:
    """Cancel the work inside when another thread sets `stop`. See `check_cancelled`."""
    token = _stop.set(stop)
    try:
        yield
    finally:
        _stop.reset(token)


def check_cancelled() -> None:
    """End the work of this thread if its result is no longer needed.

    Long loops call this between pieces of at most a few tenths of a second.

    Raises:
        Cancelled: the event of `cancelled_by` is set.
    """
    stop = _stop.get()
    if stop is not None and stop.is_set():
        raise Cancelled("the client has closed the connection")


def cancellable(items: Collection[_T]) -> Iterable[_T]:
    """Pass items to a loop, with `check_cancelled` before the first and regularly after."""
    check_cancelled()
    return items if len(items) <= _CHECKED_ITEMS else _checked(iter(items))


def _checked(items: Iterator[_T]) -> Iterator[_T]:
    while some := tuple(islice(items, _CHECKED_ITEMS)):
        check_cancelled()
        yield from some
