"""Filters of templates, bounded by the budget of a rendering.

Every available filter is in a table of this module. Other filters of Jinja do not exist.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from functools import wraps
from sys import getsizeof
from typing import Any

from jinja2 import Environment
from jinja2.filters import FILTERS, make_attrgetter
from jinja2.utils import pass_environment

from fd_dsa.chat.budget import (
    ESCAPED,
    SCALAR_BYTES,
    OverBudget,
    add,
    counted,
    current,
    join,
    to_list,
    to_text,
)
from fd_dsa.chat.methods import (
    char_bytes,
    count_lines,
    modulo,
    padded_bytes,
    replaced_bytes,
    stripped_bytes,
)

_MAX_DIGITS = 4300
_MAX_PRECISION = 1000
_MAX_ATTRIBUTE_BYTES = 512
# maximum bytes of all values of a filter with quadratic time or result
_MAX_SLOW_BYTES = 1 << 12
# bytes of a short text, such as a word
_WORD_BYTES = 60
_ENCODER = json.JSONEncoder(ensure_ascii=False)

_Filter = Callable[..., Any]


def _first(function: _Filter) -> int:
    """Return the position of the value: some functions take an environment before it."""
    return 1 if getattr(function, "jinja_pass_arg", None) else 0


def _of_text(name: str, factor: int) -> _Filter:
    """Return a text filter whose result has at most `factor` times its input's bytes."""
    function = FILTERS[name]

    @wraps(function)
    def guarded(value: object, *args: object, **kwargs: object) -> Any:
        budget = current()
        text = value if isinstance(value, str) else to_text(value)
        budget.check_room(factor * getsizeof(text))
        result = function(text, *args, **kwargs)
        budget.spend(getsizeof(result))
        return result

    return guarded


def _slow(name: str) -> _Filter:
    """Return a filter for short values, because its time or result is quadratic."""
    function = FILTERS[name]
    first = _first(function)

    @wraps(function)
    def guarded(*args: object, **kwargs: object) -> Any:
        budget = current()
        values = (*args[first:], *kwargs.values())
        if any(isinstance(value, Iterator) for value in values):
            raise OverBudget(f"{name!r} takes no iterator; make a list of it")
        if sum(map(budget.weigh, values)) > _MAX_SLOW_BYTES:
            raise OverBudget(f"{name!r} takes values of at most {_MAX_SLOW_BYTES} bytes")
        result = function(*args, **kwargs)
        budget.spend(getsizeof(result))
        return result

    return guarded


def _lazy(name: str) -> _Filter:
    """Return a filter whose items are counted while they are read."""
    function = FILTERS[name]

    @wraps(function)
    def guarded(context: object, value: Any, *args: object, **kwargs: object) -> Any:
        # the name of a filter, test or attribute
        current().check_key((args[:1], kwargs.get("attribute")))
        # a selection reads more items than it yields, so its input counts; None is not iterated
        items = counted(value) if value else value
        return counted(function(context, items, *args, **kwargs))

    return guarded


def _copying(name: str) -> _Filter:
    """Return a filter whose result is not larger than its values."""
    function = FILTERS[name]

    @wraps(function)
    def guarded(*args: object, **kwargs: object) -> Any:
        result = function(*args, **kwargs)
        current().spend(getsizeof(result))
        return result

    return guarded


def _check_sorting(
    environment: Environment, items: Any, attribute: str | int | None, others: object
) -> Any:
    """Check the cost of comparing all items and of their lower-case copies.

    Returns:
        The values that are compared.
    """
    budget = current()
    keys = items
    if attribute is not None:
        if budget.weigh(attribute) > _MAX_ATTRIBUTE_BYTES:
            raise OverBudget(f"takes an attribute of at most {_MAX_ATTRIBUTE_BYTES} bytes")
        names = attribute.split(",") if isinstance(attribute, str) else [attribute]
        getters = [make_attrgetter(environment, name) for name in names]
        keys = [getter(item) for item in counted(items) for getter in getters]
    weight = budget.weigh(keys) + len(items) * budget.weigh(others)
    budget.check_room(weight)
    budget.check_work(weight * max(len(items).bit_length(), 1))
    return keys


def _sorting(name: str, place: int) -> _Filter:
    """Return a filter that compares all items.

    Args:
        place: position of the attribute among the arguments after the value.
    """
    function = FILTERS[name]

    @wraps(function)
    def guarded(environment: Environment, value: object, *args: object, **kwargs: object) -> Any:
        items = to_list(value)
        attribute: Any = kwargs.get("attribute", args[place] if len(args) > place else None)
        keys = _check_sorting(environment, items, attribute, (*args, *kwargs.values()))
        if name == "unique":
            for key in keys:
                current().check_key(key)
        result = function(environment, items, *args, **kwargs)
        if isinstance(result, list):
            # each group has its own list
            current().spend(4 * getsizeof(result))
        return result if name != "unique" else counted(result)

    return guarded


def _dictsort(value: Mapping[Any, object], *args: object, **kwargs: object) -> Any:
    budget = current()
    weight = budget.weigh(value)
    budget.check_room(weight)
    budget.check_work(weight * max(len(value).bit_length(), 1))
    result = FILTERS["dictsort"](value, *args, **kwargs)
    budget.spend(10 * getsizeof(result))
    return result


def _center(value: object, width: int = 80) -> Any:
    text = _text(value)
    current().check_room(padded_bytes(text, width))
    result = text.center(width)
    current().spend(getsizeof(result))
    return result


def _trim(value: object, chars: str | None = None) -> Any:
    text = _text(value)
    if chars is not None:
        stripped_bytes(text, chars)
    result = text.strip(chars)
    current().spend(getsizeof(result))
    return result


def _format(value: Any, *args: object, **kwargs: object) -> Any:
    if args and kwargs:
        return FILTERS["format"]("", *args, **kwargs)
    return modulo(_text(value), kwargs or args)


def _indent(value: object, width: int | str = 4, first: bool = False, blank: bool = False) -> Any:
    budget = current()
    if isinstance(value, str) and isinstance(width, int | str):
        step = len(width) if isinstance(width, str) else max(width, 0)
        size = len(value) + (count_lines(value) + 1) * (step + 1)
        budget.check_room(size * char_bytes(value, " " if isinstance(width, int) else width))
        # the lines are texts too
        budget.check_room(_WORD_BYTES * count_lines(value))
    result = FILTERS["indent"](value, width, first, blank)
    budget.spend(getsizeof(result))
    return result


@pass_environment
def _join(
    environment: Environment, value: Any, d: object = "", attribute: str | int | None = None
) -> str:
    if attribute is not None:
        current().check_key(attribute)
        value = map(make_attrgetter(environment, attribute), value)
    return join(to_text(d), [to_text(item) for item in counted(value)])


def _list(value: Any) -> Any:
    result = to_list(value)
    if result is not value:
        return result
    current().spend(getsizeof(value))
    return list(value)


def _replace(value: object, old: object, new: object, count: int | None = None) -> str:
    text, old, new = to_text(value), to_text(old), to_text(new)
    current().check_room(replaced_bytes(text, old, new, -1 if count is None else count))
    result = text.replace(old, new, -1 if count is None else count)
    current().spend(getsizeof(result))
    return result


@pass_environment
def _sum(
    environment: Environment, iterable: Any, attribute: str | int | None = None, start: object = 0
) -> Any:
    if isinstance(start, str):
        raise TypeError("sum() can't sum strings [use the filter 'join' instead]")
    if attribute is not None:
        current().check_key(attribute)
        iterable = map(make_attrgetter(environment, attribute), iterable)
    for item in counted(iterable):
        start = add(start, item)
    return start


def _int(value: object, default: object = 0, base: int = 10) -> Any:
    result = FILTERS["int"](_digits(value), default, base)
    current().spend(getsizeof(result))
    return result


def _float(value: object, default: object = 0.0) -> Any:
    return FILTERS["float"](_digits(value), default)


def _digits(value: object) -> Any:
    if isinstance(value, str) and len(value) > _MAX_DIGITS:
        raise OverBudget(f"would read a number of more than {_MAX_DIGITS} characters")
    return value


def _round(value: object, precision: int = 0, method: str = "common") -> Any:
    if isinstance(precision, int) and abs(precision) > _MAX_PRECISION:
        raise OverBudget(f"'round' takes a precision of at most {_MAX_PRECISION}")
    result = FILTERS["round"](value, precision, method)
    current().spend(getsizeof(result))
    return result


def _batch(value: Any, linecount: int, fill_with: object = None) -> Any:
    if fill_with is not None and isinstance(linecount, int):
        current().check_room(8 * linecount)
    return counted(FILTERS["batch"](counted(value), linecount, fill_with))


@wraps(FILTERS["slice"])
def _slice(environment: Environment, value: object, *args: object, **kwargs: object) -> Any:
    return counted(FILTERS["slice"](environment, to_list(value), *args, **kwargs))


def to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Filter `tojson`, with the arguments of transformers."""
    budget = current()
    weight = budget.weigh(value)
    between = budget.weigh(separators) if separators is not None else 0
    budget.check_room(ESCAPED * weight + between * (weight // SCALAR_BYTES))
    budget.check_room(indent if isinstance(indent, int) else budget.weigh(indent))
    encoder = _ENCODER
    if ensure_ascii or sort_keys or separators is not None or indent is not None:
        encoder = json.JSONEncoder(
            ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
        )
    if indent is None:
        text = encoder.encode(value)
        budget.spend(getsizeof(text))
        return text
    # indentation grows with the depth, so the pieces are counted while they are written
    pieces = []
    for piece in encoder.iterencode(value):
        budget.spend(getsizeof(piece))
        pieces.append(piece)
    return join("", pieces)


def _text(value: object) -> Any:
    """Return a text or a Markup unchanged, and the text of any other value."""
    return value if isinstance(value, str) else to_text(value)


_SLOW = ("pprint", "striptags", "urlencode", "urlize", "wordwrap", "xmlattr")
_LAZY = ("map", "reject", "rejectattr", "select", "selectattr")
_PLAIN = ("attr", "count", "d", "default", "filesizeformat", "first", "items", "last")
TEMPLATE_FILTERS: dict[str, _Filter] = {
    **{name: FILTERS[name] for name in (*_PLAIN, "length", "random")},
    **{name: _slow(name) for name in _SLOW},
    **{name: _lazy(name) for name in _LAZY},
    **{name: _of_text(name, ESCAPED) for name in ("e", "escape", "forceescape")},
    **{name: _of_text(name, 3) for name in ("capitalize", "lower", "safe", "upper")},
    **{name: _of_text(name, _WORD_BYTES) for name in ("title", "wordcount")},
    **{name: _copying(name) for name in ("abs", "reverse", "truncate")},
    **{name: _sorting(name, 1) for name in ("max", "min", "unique")},
    "batch": _batch,
    "center": _center,
    "dictsort": _dictsort,
    "float": _float,
    "format": _format,
    "groupby": _sorting("groupby", 0),
    "indent": _indent,
    "int": _int,
    "join": _join,
    "list": _list,
    "replace": _replace,
    "round": _round,
    "slice": _slice,
    "sort": _sorting("sort", 2),
    "string": _text,
    "sum": _sum,
    "tojson": to_json,
    "trim": _trim,
}
"""Filters by name."""
