"""Budget of one rendering: bytes of values, characters of output, processor time.

The operators of templates spend it. If the result of an operator may be much larger than its
operands, its size is bounded in advance by the sizes of the operands. The sizes of all results are
counted.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence, ValuesView
from collections.abc import Set as AbstractSet
from contextlib import contextmanager
from contextvars import ContextVar
from sys import getsizeof, hash_info
from typing import Any, TypeVar

from jinja2.exceptions import SecurityError

from fd_dsa.cancellation import cancellable, check_cancelled
from fd_dsa.chat.parser import Arguments

DEFAULT_MAX_CHARS = 16 << 20
"""Maximum prompt length in characters if the caller sets no limit."""
MAX_SECONDS = 10.0
"""Maximum processor time of one rendering, seconds."""
# Maximum bytes of the values of a rendering: a base, and a share for each prompt character. A
# template may copy each message a dozen times, a character takes up to 4 bytes, and a template that
# collects the prompt in a variable copies it with each message.
_BASE_BYTES, _BYTES_PER_CHAR, _MAX_BYTES = 16 << 20, 64, 256 << 20
# the source of a compiled template contains its constants and takes a hundred times their bytes
_CONSTANT_BYTES = 1 << 16
# bytes between two checks of the clock and the client; a step counts at least 32
_LOOK_BYTES = 1 << 12
# Maximum bytes that one comparison or sort may read, about 0.2 s.
_MAX_WORK = 1 << 28
_MAX_KEY_BYTES = 1 << 16
_SCALARS = (str, int, float, bool, type(None))
_CONTAINERS = (list, tuple, Mapping, AbstractSet, ValuesView)
SCALAR_BYTES = 32
"""Bytes of a number, and the minimum for any value."""
ESCAPED = 6
"""Maximum bytes of an escaped byte, as in `\\u0000`."""
_NUMBERS = (int, float)
_MAX_BITS = 1 << 12
_SMALL_NUMBER = 1 << 60
# bytes counted for a step of an iterator
_ITEM_BYTES = 128
# shorter results are counted without a check in advance
_SHORT = 1 << 16
_T = TypeVar("_T")


class OverBudget(SecurityError, ValueError):
    """A template would exceed the budget of its rendering."""


class PromptTooLong(OverBudget):
    """The prompt would exceed its maximum length."""


class Budget:
    """The remaining bytes and time of one rendering.

    The bytes count everything that a template has made, even if it is freed. So they bound both
    memory and work.

    Args:
        max_chars: maximum length of the prompt, characters.
        max_bytes: maximum bytes of all values.
    """

    def __init__(self, max_chars: int, max_bytes: int) -> None:
        self.max_chars = max_chars
        self._max_bytes = self._left = max_bytes
        self._next_look = self._left
        self._begin = time.thread_time()
        self._next_clock = time.monotonic() + MAX_SECONDS
        # by id, with the object itself, so that no other object gets the same id
        self._weights: dict[int, tuple[Any, int]] = {}

    def spend(self, num_bytes: int) -> None:
        """Count the bytes of new values or of a step, and check the client now and then.

        Raises:
            OverBudget: bytes or processor time are used up. Every later call raises it too.
            Cancelled: the client has disconnected.
        """
        self._left -= num_bytes
        if self._left < self._next_look:
            self.look()

    def check_room(self, num_bytes: int) -> None:
        """Refuse a value before it is made. `num_bytes` is an upper bound of its size."""
        if num_bytes > self._left:
            self._left = -1
            self.look()

    def look(self) -> None:
        """Check the bytes, the time and the client."""
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
        """Refuse an operation that would read more than `_MAX_WORK` bytes."""
        self.look()
        if num_bytes > _MAX_WORK:
            raise OverBudget(f"would compare or search more than {_MAX_WORK} bytes at once")

    def check_key(self, value: _T) -> _T:
        """Return a value used as a key or shown in an error.

        Refuse one that is slow to hash.
        """
        if isinstance(value, int):
            # larger numbers may all have the same hash
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
        """Return the bytes of a value with all nested values, each as often as it occurs.

        Nested lists that hold the same list twice have few objects but endless text. Each object is
        visited once.

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
            # strings are tested before other types, because most items are strings
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
        max_chars: maximum length of each prompt, characters. None keeps the caller's budget, or
            uses `DEFAULT_MAX_CHARS` without one.
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
    """Compile the templates inside. Larger constants are computed by each rendering."""
    with _active_budget(Budget(0, _CONSTANT_BYTES)):
        yield


@contextmanager
def _active_budget(budget: Budget) -> Iterator[None]:
    token = _active.set(budget)
    try:
        yield
    finally:
        _active.reset(token)


def to_text(value: object) -> str:
    """Return `str(value)`, counted."""
    if type(value) is str:
        return value
    budget = current()
    if not isinstance(value, _NUMBERS):
        budget.check_room(ESCAPED * budget.weigh(value))
    text = str(value)
    budget.spend(getsizeof(text))
    return text


def to_list(value: Any) -> Any:
    """Return a list or tuple unchanged, and a list of the items of any other iterable."""
    if isinstance(value, list | tuple):
        return value
    budget = current()
    size = 0
    if isinstance(value, str) and not value.isascii():
        size = 80 * len(value)
        budget.check_room(size)
    result = list(value)
    budget.spend(size + getsizeof(result))
    return result


def counted(items: Iterable[object]) -> Iterator[Any]:
    """Yield the items and count each as a step of the rendering."""
    budget = current()
    for item in items:
        budget.spend(_ITEM_BYTES + (getsizeof(item) if isinstance(item, list) else 0))
        yield item


def join(separator: str, texts: Sequence[str]) -> str:
    """Join texts, after a check of their length."""
    budget = current()
    length = sum(map(len, texts)) + len(separator) * len(texts)
    if length > _SHORT:
        is_ascii = separator.isascii() and all(map(str.isascii, texts))
        budget.check_room(length if is_ascii else 4 * length)
    result = separator.join(texts)
    budget.spend(getsizeof(result))
    return result


def concat(pieces: Iterable[str]) -> str:
    """Join the output of a block, macro or loop."""
    texts = pieces if isinstance(pieces, list) else list(pieces)
    return texts[0] if len(texts) == 1 and type(texts[0]) is str else join("", texts)


def concat_values(*values: object) -> str:
    """Apply the operator `~`."""
    return join("", [value if type(value) is str else to_text(value) for value in values])


def add(*values: Any) -> Any:
    """Apply the operator `+` to a chain of values. Texts are joined once."""
    if all(type(value) is str for value in values):
        return join("", values)
    result, *others = values
    for value in others:
        result = _add(result, value)
    return result


def _add(left: Any, right: Any) -> Any:
    if isinstance(left, _NUMBERS) and isinstance(right, _NUMBERS):
        return number_of("+", left + right)
    budget = current()
    size = getsizeof(left) + getsizeof(right)
    # a Markup escapes the other text, and the sum uses the wider of both character sizes
    budget.check_room(4 * ESCAPED * size if isinstance(left, str) else size)
    result = left + right
    budget.spend(getsizeof(result))
    return result


def subtract(left: object, right: object) -> Any:
    """Apply the operator `-` to numbers.

    Other types that have it, such as sets, are refused.
    """
    if not isinstance(left, _NUMBERS) or not isinstance(right, _NUMBERS):
        raise TypeError(f"'-' takes numbers, not {type(left).__name__} and {type(right).__name__}")
    return number_of("-", left - right)


def multiply(left: Any, right: Any) -> Any:
    """Apply the operator `*`."""
    budget = current()
    if isinstance(left, int) and isinstance(right, int):
        _check_bits("*", left.bit_length() + right.bit_length())
        return number_of("*", left * right)
    for value, times in ((left, right), (right, left)):
        if isinstance(times, int) and isinstance(value, (str, list, tuple)):
            is_narrow = isinstance(value, str) and value.isascii()
            budget.check_room((1 if is_narrow else 8) * len(value) * max(times, 0))
    result = left * right
    budget.spend(getsizeof(result))
    return result


def power(left: Any, right: Any) -> Any:
    """Apply the operator `**`."""
    if isinstance(left, int) and isinstance(right, int):
        _check_bits("**", left.bit_length() * right)
    return number_of("**", left**right)


def negate(value: Any) -> Any:
    """Apply the unary operator `-`."""
    return number_of("-", -value)


def divide(left: Any, right: Any) -> Any:
    """Apply the operator `//`."""
    return number_of("//", left // right)


def number_of(name: str, value: object) -> Any:
    """Return the number that an operator has made, counted."""
    if type(value) is int and not -_SMALL_NUMBER < value < _SMALL_NUMBER:
        _check_bits(name, value.bit_length())
        current().spend(getsizeof(value))
    return value


def _check_bits(name: str, bits: int) -> None:
    if bits > _MAX_BITS:
        raise OverBudget(f"{name!r} would make a number of more than {_MAX_BITS} bits")


def slice_of(value: Any, start: object, stop: object, step: object) -> Any:
    """Apply the operator `[start:stop:step]`."""
    result = value[start:stop:step]
    current().spend(getsizeof(result))
    return result


def compared(value: object) -> Any:
    """Return an operand of a comparison after a check of its size."""
    if isinstance(value, _SCALARS):
        return value
    budget = current()
    budget.check_work(budget.weigh(value))
    return value


def finalize(value: object) -> Any:
    """Return the text of a value in the output, counted."""
    return value if type(value) is str else to_text(value)
