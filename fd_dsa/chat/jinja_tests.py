"""Tests of templates (`x is even`), bounded by the budget of a rendering.

Every available test is in a table of this module. Other tests of Jinja do not exist.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

from jinja2.tests import TESTS

from fd_dsa.chat.budget import compared, current, to_text
from fd_dsa.chat.methods import modulo

_Test = Callable[..., Any]
_TESTS: dict[str, Any] = dict(TESTS)


def _named(name: str) -> _Test:
    test = _TESTS[name]

    @wraps(test)
    def guarded(environment: object, value: object) -> Any:
        return test(environment, current().check_key(value))

    return guarded


def _comparing(test: _Test) -> _Test:
    return lambda left, right: test(compared(left), compared(right))


_COMPARING = ("!=", "<", "<=", "==", ">", ">=", "eq", "equalto", "ge", "greaterthan", "gt", "in")
_TYPES = ("boolean", "callable", "escaped", "float", "integer", "iterable", "mapping", "number")
_VALUES = ("defined", "false", "none", "sameas", "sequence", "string", "true", "undefined")
TEMPLATE_TESTS: dict[str, _Test] = {
    **{name: _comparing(_TESTS[name]) for name in (*_COMPARING, "le", "lessthan", "lt", "ne")},
    **{name: _TESTS[name] for name in (*_TYPES, *_VALUES)},
    "divisibleby": lambda value, number: modulo(value, number) == 0,
    "even": lambda value: modulo(value, 2) == 0,
    "odd": lambda value: modulo(value, 2) == 1,
    "lower": lambda value: to_text(value).islower(),
    "upper": lambda value: to_text(value).isupper(),
    **{name: _named(name) for name in ("filter", "test")},
}
"""Tests by name."""
