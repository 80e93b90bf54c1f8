"""Methods and formats of values in templates, bounded by the budget of a rendering.

Every available method is in a table of this module. Other methods do not exist in templates.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from sys import getsizeof
from types import BuiltinMethodType, MethodType
from typing import Any

from jinja2 import Environment
from jinja2.exceptions import SecurityError
from jinja2.sandbox import SandboxedEscapeFormatter, SandboxedFormatter
from markupsafe import Markup

from fd_dsa.chat.budget import ESCAPED, current, join, number_of, to_list

_LINE_ENDS = "\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029"
_BLANKS = (
    _LINE_ENDS + "\t\x1f \xa0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009"
    "\u200a\u202f\u205f\u3000"
)
# bytes of a short text and its list entry
_PIECE_BYTES = 90
# length of a text that takes a while to read, characters
_LONG = 1 << 16

_Check = Callable[..., int]
"""Checks a call before it is made and returns an upper bound for its result's bytes."""


def char_bytes(*texts: object) -> int:
    """Return an upper bound for the bytes per character of texts that are joined."""
    return 1 if all(isinstance(text, str) and text.isascii() for text in texts) else 4


def count_lines(text: str) -> int:
    """Return an upper bound for the number of lines."""
    return 1 + sum(map(text.count, _LINE_ENDS))


def padded_bytes(text: str, width: object = 0, fill: object = " ") -> int:
    """Return an upper bound for the bytes of a text that is padded to a width."""
    return max(len(text), width) * char_bytes(text, fill) if isinstance(width, int) else 0


def replaced_bytes(text: str, old: object, new: object, count: object = -1) -> int:
    """Return an upper bound for the bytes of a text with replacements."""
    if not isinstance(old, str) or not isinstance(new, str) or not isinstance(count, int):
        return 0
    places = text.count(old) if count < 0 else min(count, text.count(old))
    growth = len(new) * (ESCAPED if isinstance(text, Markup) else 1) - len(old)
    return (len(text) + places * max(growth, 0)) * char_bytes(text, new)


def stripped_bytes(text: str, chars: object = None) -> int:
    """Return an upper bound for the bytes of a stripped text.

    Check the search in `chars`.
    """
    if isinstance(chars, str):
        current().check_work(len(text) * len(chars))
    return getsizeof(text)


def _times(factor: int) -> _Check:
    """Return a bound that is a multiple of the text's bytes, for any arguments."""
    return lambda text, *args, **kwargs: factor * getsizeof(text)


def _small(value: object, *args: object, **kwargs: object) -> int:
    return 0


def _expanded(text: str, tabsize: object = 8) -> int:
    size = max(tabsize, 0) if isinstance(tabsize, int) else 0
    return (len(text) + text.count("\t") * size) * char_bytes(text)


def _search_back(text: str, part: object = None, *args: object) -> int:
    """Check a search from the end, whose time grows with both lengths multiplied."""
    if isinstance(part, str):
        current().check_work(max(len(text) - len(part), 0) * len(part))
    return 0


def _split(text: str, sep: object = None, maxsplit: object = -1) -> int:
    if sep is not None and not isinstance(sep, str):
        return 0
    pieces = sum(map(text.count, _BLANKS)) if sep is None else text.count(sep)
    if isinstance(maxsplit, int) and maxsplit >= 0:
        pieces = min(pieces, maxsplit)
    return getsizeof(text) + (pieces + 1) * _PIECE_BYTES


def _split_back(text: str, sep: object = None, maxsplit: object = -1) -> int:
    _search_back(text, sep)
    return _split(text, sep, maxsplit)


def _partition(text: str, sep: object = None) -> int:
    return getsizeof(text) + 3 * _PIECE_BYTES


def _partition_back(text: str, sep: object = None) -> int:
    _search_back(text, sep)
    return _partition(text)


def _lines(text: str, keepends: object = False) -> int:
    return getsizeof(text) + count_lines(text) * _PIECE_BYTES


def _compare_ends(text: str, ends: object = None, *args: object) -> int:
    current().check_work(current().weigh(ends))
    return 0


def _find_item(items: object, item: object = None, *args: object) -> int:
    # the error for a missing item may show it
    current().check_key(item)
    current().check_work(current().weigh(items))
    return 0


def _get(items: object, key: object = None, *args: object) -> int:
    current().check_key(key)
    return 0


_OF_TEXTS: dict[str, _Check] = {
    **dict.fromkeys(("capitalize", "casefold", "lower", "swapcase", "title", "upper"), _times(3)),
    **dict.fromkeys(("center", "ljust", "rjust", "zfill"), padded_bytes),
    **dict.fromkeys(("count", "find", "index"), _small),
    **dict.fromkeys(("isalnum", "isalpha", "isascii", "isdecimal", "isdigit"), _small),
    **dict.fromkeys(("isidentifier", "islower", "isnumeric", "isprintable", "isspace"), _small),
    **dict.fromkeys(("istitle", "isupper"), _small),
    **dict.fromkeys(("endswith", "startswith"), _compare_ends),
    **dict.fromkeys(("lstrip", "rstrip", "strip"), stripped_bytes),
    **dict.fromkeys(("removeprefix", "removesuffix"), _times(1)),
    **dict.fromkeys(("rfind", "rindex"), _search_back),
    "expandtabs": _expanded,
    "partition": _partition,
    "replace": replaced_bytes,
    "rpartition": _partition_back,
    "rsplit": _split_back,
    "split": _split,
    "splitlines": _lines,
}
_OF_SEQUENCES: dict[str, _Check] = {"copy": _times(1), "count": _find_item, "index": _find_item}
_OF_DICTS: dict[str, _Check] = {
    "copy": _times(1),
    "get": _get,
    **dict.fromkeys(("items", "keys", "values"), _small),
}
_OF_NUMBERS: dict[str, _Check] = dict.fromkeys(
    ("as_integer_ratio", "bit_count", "bit_length", "conjugate", "hex", "is_integer"), _small
)
METHODS: dict[type, dict[str, _Check]] = {
    str: _OF_TEXTS,
    dict: _OF_DICTS,
    **dict.fromkeys((list, tuple, range), _OF_SEQUENCES),
    **dict.fromkeys((int, float), _OF_NUMBERS),
}
"""Checked methods, by type."""


def make_dict(pairs: Iterable[tuple[object, object]]) -> dict[Any, Any]:
    """Return a dict of pairs, each counted as a step.

    Keys with equal hashes would take quadratic time, so `check_key` refuses them.
    """
    budget = current()
    result = {}
    for key, value in pairs:
        budget.spend(128)
        result[budget.check_key(key)] = value
    return result


def from_keys(keys: Iterable[object], value: object = None) -> dict[Any, Any]:
    """Return a dict with these keys and one value for all."""
    return make_dict((key, value) for key in keys)


def _join(separator: str, items: object) -> str:
    texts = to_list(items)
    if type(separator) is str and all(type(text) is str for text in texts):
        return join(separator, texts)
    # a Markup escapes the items
    size = sum(getsizeof(text) for text in texts) + len(texts) * getsizeof(separator)
    current().check_room(4 * ESCAPED * size)
    result = separator.join(texts)
    current().spend(getsizeof(result))
    return result


def call_method(method: BuiltinMethodType | MethodType, *args: Any, **kwargs: Any) -> Any:
    """Call a method of a text, number or container.

    Raises:
        SecurityError: the method is not available to templates.
    """
    owner: Any = method.__self__
    name = method.__name__
    kind = type(owner)
    if kind not in METHODS:
        kind = next((known for known in METHODS if isinstance(owner, known)), kind)
    check = METHODS.get(kind, {}).get(name)
    if check is not None:
        size = check(owner, *args, **kwargs)
        budget = current()
        budget.check_room(size)
        result = method(*args, **kwargs)
        budget.spend(getsizeof(result) if isinstance(result, str) else size)
        if kind is str and len(owner) > _LONG:
            budget.look()
        return result
    # methods that iterate their argument are implemented here
    if kind is str and name == "join":
        return _join(owner, *args)
    if owner is dict and name == "fromkeys":
        return from_keys(*args)
    raise SecurityError(f"the method {name!r} of {type(owner).__name__!r} is not available")


class TextFormatter(SandboxedFormatter):
    """The formatter of `str.format`, with bounds on each field."""

    def format_field(self, value: object, format_spec: str) -> str:
        """Return the text of a field. Numbers in its format are widths or precisions."""
        budget = current()
        size = budget.weigh(value)
        for digits in "".join(c if c.isdigit() else " " for c in format_spec).split():
            size += int(digits)
        budget.check_room(4 * ESCAPED * size)
        text: str = super().format_field(value, format_spec)
        budget.spend(getsizeof(text))
        return text

    def convert_field(self, value: object, conversion: str | None) -> Any:
        """Return the value, or its text if a conversion asks for it."""
        if conversion is not None:
            current().check_room(ESCAPED * current().weigh(value))
        return super().convert_field(value, conversion)


class MarkupFormatter(TextFormatter, SandboxedEscapeFormatter):
    """The formatter of a Markup, which escapes its fields."""


def format_text(
    environment: Environment, text: str, args: Sequence[object], kwargs: Mapping[str, object]
) -> str:
    """Return `text.format(*args, **kwargs)`."""
    if isinstance(text, Markup):
        formatter: TextFormatter = MarkupFormatter(environment, escape=text.escape)
    else:
        formatter = TextFormatter(environment)
    result = type(text)(formatter.vformat(text, args, kwargs))
    current().spend(getsizeof(result))
    return result


def modulo(left: Any, right: Any) -> Any:
    """Apply the operator `%` to numbers, or to a format and its values."""
    if not isinstance(left, str):
        return number_of("%", left % right)
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
