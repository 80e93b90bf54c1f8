"""Budget of one rendering: bytes of values, characters of output, processor time."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Mapping, ValuesView
from collections.abc import Set as AbstractSet
from contextlib import contextmanager
from contextvars import ContextVar
from sys import getsizeof, hash_info
from typing import Any, TypeVar

from jinja2.exceptions import SecurityError

from fd_dsa.cancellation import cancellable, check_cancelled
from fd_dsa.chat.parser import Arguments

DEFAULT_MAX_CHARS = 16 << 20
"""Characters of a prompt if the caller sets no limit."""
MAX_SECONDS = 10.0
"""Processor time of one rendering."""
# Bytes of values that a rendering may make: a base, and some for each character of the prompt.
# A template may copy each message a dozen times, a character takes up to 4 bytes, and a template
# that collects the prompt in a variable copies it with each message.
_BASE_BYTES, _BYTES_PER_CHAR, _MAX_BYTES = 16 << 20, 64, 256 << 20
# the source of a compiled template holds its constants, and takes a hundred times their bytes
_CONSTANT_BYTES = 1 << 16
# bytes between two looks at the clock and the client; a step takes 32 or more
_LOOK_BYTES = 1 << 12
# Bytes that one comparison or sort may read: about 0.2 s.
_MAX_WORK = 1 << 28
_MAX_KEY_BYTES = 1 << 16
_SCALARS = (str, int, float, bool, type(None))
_CONTAINERS = (list, tuple, Mapping, AbstractSet, ValuesView)
SCALAR_BYTES = 32
"""Bytes of a number; each value has as many or more."""


_T = TypeVar("_T")


class OverBudget(SecurityError, ValueError):
    """A template would make or do more than a rendering may."""


class PromptTooLong(OverBudget):
    """The prompt has more characters than it may."""


class Budget:
    """The bytes and the time that one rendering has left.

    Bytes count what a template has made, not what it still holds, so they bound the memory in use
    and the work.

    Args:
        max_chars: characters of the prompt.
        max_bytes: bytes of all values.
    """

    def __init__(self, max_chars: int, max_bytes: int) -> None:
        self.max_chars = max_chars
        self._max_bytes = self._left = max_bytes
        self._next_look = self._left
        self._begin = time.thread_time()
        self._next_clock = time.monotonic() + MAX_SECONDS
        # by id, with the object, so that no other gets its id
        self._weights: dict[int, tuple[Any, int]] = {}

    def spend(self, num_bytes: int) -> None:
        """Count bytes of values that were made, or of a step; look at the client now and then.

        Raises:
            OverBudget: the bytes or the processor time are used up; so does each later call.
            Cancelled: the client has left.
        """
        self._left -= num_bytes
        if self._left < self._next_look:
            self.look()

    def check_room(self, num_bytes: int) -> None:
        """Refuse a value before it is made; `num_bytes` is a bound of its size."""
        if num_bytes > self._left:
            self._left = -1
            self.look()

    def look(self) -> None:
        """Look at the bytes, the time and the client."""
        if self._left < 0:
            raise OverBudget(f"would make texts and lists of more than {self._max_bytes} bytes")
        self._next_look = self._left - _LOOK_BYTES
        check_cancelled()
        if time.monotonic() > self._next_clock:
            left = self._begin + MAX_SECONDS - time.thread_time()
            if left <= 0:
                raise OverBudget(f"takes more than {MAX_SECONDS:g} s of processor time")
            self._next_clock = time.monotonic() + left

    def check_work(self, num_bytes: int) -> None:
        """Refuse an operation that would read more bytes than one operation may."""
        self.look()
        if num_bytes > _MAX_WORK:
            raise OverBudget(f"would compare or search more than {_MAX_WORK} bytes at once")

    def check_key(self, value: _T) -> _T:
        """Return a value that is hashed, or shown in an error; refuse one that takes long."""
        if isinstance(value, int):
            # larger ones may all have one hash
            if value.bit_length() >= hash_info.modulus.bit_length():
                raise OverBudget("would look up a number of more than 60 bits")
        elif not isinstance(value, _SCALARS):
            if self.weigh(value) > _MAX_KEY_BYTES:
                raise OverBudget(f"would look up a key of more than {_MAX_KEY_BYTES} bytes")
            if isinstance(value, tuple):
                for item in value:
                    self.check_key(item)
        return value

    def weigh(self, value: object) -> int:
        """Bytes of a value with all values inside, each as often as it occurs.

        A list that holds another one twice, which does the same again, has few objects but a
        text without end. Each object is visited once.

        Raises:
            RecursionError: the value nests too deeply.
        """
        if isinstance(value, str):
            return getsizeof(value)
        if isinstance(value, int):
            return SCALAR_BYTES + value.bit_length() // 3
        if not isinstance(value, _CONTAINERS):
            return SCALAR_BYTES
        known = self._weights.get(id(value))
        if known is not None:
            return known[1]
        weight = getsizeof(value) + (getsizeof(str(value)) if isinstance(value, Arguments) else 0)
        items: Collection[Any] = value
        if isinstance(value, Mapping):
            items = [*value, *value.values()]
        for item in cancellable(items):
            # the most frequent type first
            weight += getsizeof(item) if type(item) is str else self.weigh(item)
        self._weights[id(value)] = value, weight
        return weight


_active: ContextVar[Budget] = ContextVar("budget")
current = _active.get
"""The budget of the rendering that runs in this thread."""


@contextmanager
def bounded_rendering(max_chars: int | None = None) -> Iterator[None]:
    """Render the templates inside with one budget.

    Args:
        max_chars: characters of each prompt. None keeps the budget of the caller; without one it
            is `DEFAULT_MAX_CHARS`.
    """
    if max_chars is None and _active.get(None) is not None:
        yield
        return
    chars = DEFAULT_MAX_CHARS if max_chars is None else max_chars
    num_bytes = min(_BASE_BYTES + _BYTES_PER_CHAR * chars, _MAX_BYTES)
    with _active_budget(Budget(chars, num_bytes)):
        yield


@contextmanager
def bounded_compilation() -> Iterator[None]:
    """Compile templates inside; constants of more bytes are computed by each rendering."""
    with _active_budget(Budget(0, _CONSTANT_BYTES)):
        yield


@contextmanager
def _active_budget(budget: Budget) -> Iterator[None]:
    token = _active.set(budget)
    try:
        yield
    finally:
        _active.reset(token)
