"""Operators of templates, bounded by the budget of a rendering.

An operation whose result may be much larger than its operands is checked in advance, by a bound
that the sizes of the operands give. The sizes of all results are counted.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from sys import getsizeof
from typing import Any

from fd_dsa.chat.budget import OverBudget, current

NUMBERS = (int, float)
_SMALL = (str, int, float)
_MAX_BITS = 1 << 12
_SMALL_NUMBER = 1 << 60
# bytes counted for a step of an iterator
_ITEM_BYTES = 128
# shorter results are counted without a check in advance
_SHORT = 1 << 16
ESCAPED = 6
"""Maximum bytes of an escaped byte, as in `\\u0000`."""


def to_text(value: object) -> str:
    """Return `str(value)`, counted."""
    if type(value) is str:
        return value
    budget = current()
    if not isinstance(value, NUMBERS):
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
    if isinstance(left, NUMBERS) and isinstance(right, NUMBERS):
        return _number("+", left + right)
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
    if not isinstance(left, NUMBERS) or not isinstance(right, NUMBERS):
        raise TypeError(f"'-' takes numbers, not {type(left).__name__} and {type(right).__name__}")
    return _number("-", left - right)


def multiply(left: Any, right: Any) -> Any:
    """Apply the operator `*`."""
    budget = current()
    if isinstance(left, int) and isinstance(right, int):
        _check_bits("*", left.bit_length() + right.bit_length())
        return _number("*", left * right)
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
    return _number("**", left**right)


def negate(value: Any) -> Any:
    """Apply the unary operator `-`."""
    return _number("-", -value)


def divide(left: Any, right: Any) -> Any:
    """Apply the operator `//`."""
    return _number("//", left // right)


def _number(name: str, value: object) -> Any:
    """Return a new number, counted."""
    if type(value) is int and not -_SMALL_NUMBER < value < _SMALL_NUMBER:
        _check_bits(name, value.bit_length())
        current().spend(getsizeof(value))
    return value


def _check_bits(name: str, bits: int) -> None:
    if bits > _MAX_BITS:
        raise OverBudget(f"{name!r} would make a number of more than {_MAX_BITS} bits")


def modulo(left: Any, right: Any) -> Any:
    """Apply the operator `%` to numbers, or to a format and its values."""
    if not isinstance(left, str):
        return _number("%", left % right)
    budget = current()
    values = right if isinstance(right, tuple) else (right,)
    # each conversion takes a while, and a number with a fraction has up to 310 digits
    budget.check_room(1000 * left.count("%"))
    specs = list(_percent_specs(left))
    size = ESCAPED * budget.weigh(values) + 400 * len(specs)
    if isinstance(right, Mapping):
        # each conversion may show the whole mapping
        size *= len(specs) + 1
    size += sum(number for spec in specs for number in spec if number is not None)
    if any(None in spec for spec in specs):
        size += sum(abs(value) for value in values if isinstance(value, int))
    budget.check_room(4 * (len(left) + size))
    result = left % right
    budget.spend(getsizeof(result))
    return result


_SPEC = re.compile(r"[#0\- +]*(\d+|\*)?(?:\.(\d+|\*)?)?")


def _percent_specs(text: str) -> Iterator[tuple[int | None, ...]]:
    """Yield width and precision of each `%` of a format. None = `*`."""
    place = text.find("%")
    while place >= 0:
        place += 1
        if text[place : place + 1] == "(":
            # a name with balanced parentheses
            depth, place = 1, place + 1
            while depth and place < len(text):
                depth += {"(": 1, ")": -1}.get(text[place], 0)
                place += 1
        found = _SPEC.match(text, place)
        assert found is not None, "the pattern matches the empty text"
        yield tuple(None if group == "*" else int(group or 0) for group in found.groups())
        place = text.find("%", found.end() + 1)


def slice_of(value: Any, start: object, stop: object, step: object) -> Any:
    """Apply the operator `[start:stop:step]`."""
    result = value[start:stop:step]
    current().spend(getsizeof(result))
    return result


def compared(value: object) -> Any:
    """Return an operand of a comparison after a check of its size."""
    if isinstance(value, _SMALL) or value is None:
        return value
    budget = current()
    budget.check_work(budget.weigh(value))
    return value


def finalize(value: object) -> Any:
    """Return the text of a value in the output, counted."""
    return value if type(value) is str else to_text(value)
