"""Terminals for values that a model writes without JSON quotes: texts and scalars."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from fd_dsa.chat.enforced import CheckedSchema, checked, exclusive
from fd_dsa.chat.json_document import json_document, text_regexes
from fd_dsa.chat.lark import Lark
from fd_dsa.chat.patterns import ANY_TEXT, matches
from fd_dsa.chat.schema import (
    KINDS,
    MAX_DEPTH,
    ToolSchema,
    declared_kinds,
    items_of,
    kind_of,
    listed_values,
)

_BOUNDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf")
# bounded, because Python does not parse longer integers
_INTEGER = "-?(?:0|[1-9][0-9]{0,30})"
_NUMBER = _INTEGER + r"(?:\.[0-9]{1,30})?(?:[eE][+-]?[0-9]{1,2})?"
_SPACE = r"[\s\x1c-\x1f]*"
# texts of each type, and some more
_LOOKS = {
    "null": "null",
    "boolean": "true|false",
    "integer": "-?[0-9]+",
    "number": "-?[0-9][0-9.eE+-]*",
    "array": r"\[(?s:.*)",
    "object": r"\{(?s:.*)",
    "string": '"(?s:.*)',
}
_BEGINS_AS_NUMBER = "-?[0-9](?s:.*)"
# beginning of JSON up to a position inside a string
_STRING = r'"(?:[^"\\]|\\(?s:.))*'
_SIGNS = r"[\s\x1c-\x1f:,0-9A-Za-z+.{}\[\]-]*"
_OPEN_STRING = rf'(?:[\[{{]{_SIGNS}(?:{_STRING}"{_SIGNS})*)?{_STRING}\\?'


class BoundedNumberError(Exception):
    """Numbers with bounds, for which no terminal is made."""


class _Texts(NamedTuple):
    """Texts of values.

    Attributes:
        values: the only texts. None = any.
        regexes: terminals that the texts match as well.
    """

    values: dict[str, None] | None
    regexes: tuple[str, ...]

    @property
    def is_empty(self) -> bool:
        return self.values is not None and not self.values


_EMPTY = _Texts({}, ())
_ANY = _Texts(None, ())


class ValueTexts:
    """Terminals of the scalar values that schemas of a tool allow."""

    def __init__(self, schema: ToolSchema, lark: Lark) -> None:
        self._schema = schema
        self._lark = lark
        self._memo: dict[tuple[int, str], _Texts] = {}

    def scalar(self, parts: Iterable[object], kind: str) -> str | None:
        """Return the terminal of the values of one type that satisfy all schemas.

        Args:
            kind: "null", "boolean" or "number", which includes integers.

        Returns:
            The terminal, or None if no value satisfies the schemas.

        Raises:
            SchemaError: a grammar cannot enforce a keyword.
            BoundedNumberError: numbers have bounds.
        """
        found = self._all(parts, kind)
        return None if found.is_empty else self._terminal(found)

    def text(
        self,
        parts: Iterable[object],
        marks: Iterable[str],
        preferred: frozenset[str],
        has_bounds: bool = False,
        may_be_json: bool = False,
    ) -> str | None:
        """Return the terminal of the strings that satisfy all schemas, without quotes.

        Args:
            marks: texts of the format's markup, which the strings must not contain.
            preferred: types that the parser of answers prefers to a string.
            has_bounds: True if numbers in the same position have bounds, so that no text begins
                like a number.
            may_be_json: True if the parser also reads JSON. Then no text ends inside a JSON string,
                because the parser would take the end mark for a part of the string.

        Returns:
            The terminal, or None if no string satisfies the schemas.

        Raises:
            SchemaError: a grammar cannot enforce a keyword.
        """
        parts = tuple(parts)
        found = self._all(parts, "string")
        if found.regexes and len(set(found.regexes)) + (found.values is not None) > 1:
            # llguidance detects that no text matches all of it, but only for JSON
            self._lark.check(json_document(self._schema, parts, frozenset({"string"})))
        looks = {_LOOKS[kind] for kind in preferred}
        looks |= {_BEGINS_AS_NUMBER} if has_bounds else set()
        looks |= {_OPEN_STRING} if may_be_json else set()
        reads_as = re.compile(f"{_SPACE}(?:{'|'.join(sorted(looks))}){_SPACE}" if looks else "(?!)")
        if found.values is not None:
            kept = (
                value
                for value in found.values
                if not reads_as.fullmatch(value) and not any(mark in value for mark in marks)
            )
            found = _Texts(dict.fromkeys(kept), found.regexes)
            return None if found.is_empty else self._terminal(found)
        any_mark = "|".join(map(_literal_regex, marks))
        others = [f"{ANY_TEXT}(?:{any_mark}){ANY_TEXT}", *([reads_as.pattern] if looks else [])]
        without = [f"~{self._lark.regex(other)}" for other in others]
        return self._lark.terminal(" & ".join([self._terminal(found), *without]))

    def _all(self, parts: Iterable[object], kind: str) -> _Texts:
        """Return the texts of the values that satisfy all schemas."""
        found = _ANY
        for part in parts:
            found = self._both(found, self._of(part, kind, MAX_DEPTH))
        return found

    def _of(self, of: object, kind: str, depth: int) -> _Texts:
        """Return the texts of the values of a type that satisfy a schema."""
        if isinstance(of, bool):
            return self._free(kind, KINDS) if of else _EMPTY
        key = id(of), kind
        if key not in self._memo:
            plain = checked(self._schema, of, depth)
            found = self._own(plain, kind)
            for part in () if found.is_empty else self._schema.conjuncts(plain):
                found = self._both(found, self._of(part, kind, depth - 1))
            for keyword in ("anyOf", "oneOf"):
                if keyword in plain and not found.is_empty:
                    branches: Sequence[object] = items_of(plain.get(keyword))
                    if keyword == "oneOf":
                        within = {kind, "integer"} if kind == "number" else {kind}
                        branches = exclusive(self._schema, branches, frozenset(within))
                    found = self._both(found, self._any(branches, kind, depth - 1))
            self._memo[key] = found
        return self._memo[key]

    def _any(self, branches: Iterable[object], kind: str, depth: int) -> _Texts:
        """Return the texts of the values that satisfy any of the schemas."""
        found = [self._of(branch, kind, depth) for branch in branches]
        values: dict[str, None] = {}
        regexes = []
        for texts in found:
            if texts.values is None or texts.regexes:
                if not texts.is_empty:
                    regexes.append(self._terminal(texts))
            else:
                self._schema.spend(1, "anyOf", len(texts.values))
                values |= texts.values
        if not regexes:
            return _Texts(values, ())
        if values:
            regexes.append(self._terminal(_Texts(values, ())))
        regexes = list(dict.fromkeys(regexes))
        if len(regexes) > 1:
            regexes = [self._lark.terminal(" | ".join(regexes))]
        return _Texts(None, tuple(regexes))

    def _both(self, a: _Texts, b: _Texts) -> _Texts:
        """Return the intersection of two sets of texts."""
        values = b.values if a.values is None else a.values
        if a.values is not None and b.values is not None:
            self._schema.spend(1, "allOf", len(a.values))
            values = {value: None for value in a.values if value in b.values}
        return _Texts(values, tuple(dict.fromkeys(a.regexes + b.regexes)))

    def _terminal(self, texts: _Texts) -> str:
        """Return the name of the terminal for texts."""
        parts = list(dict.fromkeys(texts.regexes))
        if texts.values is not None:
            literals = " | ".join(self._lark.literal(value) for value in texts.values)
            parts.insert(0, self._lark.terminal(literals))
        if not parts:
            return self._lark.regex(ANY_TEXT)
        return parts[0] if len(parts) == 1 else self._lark.terminal(" & ".join(parts))

    def _own(self, of: CheckedSchema, kind: str) -> _Texts:
        """Return the texts that a schema's own keywords allow."""
        kinds = declared_kinds(of)
        if kind not in kinds and not (kind == "number" and "integer" in kinds):
            return _EMPTY
        values = listed_values(of)
        if kind == "string":
            return self._strings(of, values)
        if values is not None:
            names = (kind, "integer") if kind == "number" else (kind,)
            same = [v for v in values if kind_of(v) in names and _is_within(v, of)]
            return _Texts(dict.fromkeys(map(_scalar, same)), ())
        if kind == "number" and any(key in of for key in _BOUNDS):
            raise BoundedNumberError
        return self._free(kind, kinds)

    def _free(self, kind: str, kinds: frozenset[str]) -> _Texts:
        """Return the texts of all values of a type."""
        if kind == "string":
            return _ANY
        if kind == "number":
            return _Texts(None, (self._lark.regex(_NUMBER if "number" in kinds else _INTEGER),))
        return _Texts(dict.fromkeys(["null"] if kind == "null" else ["true", "false"]), ())

    def _strings(self, of: CheckedSchema, values: list[Any] | None) -> _Texts:
        """Return the strings that a schema's own keywords allow.

        Args:
            values: the listed values, or None.
        """
        shortest, longest = of.get("minLength", 0), of.get("maxLength")
        if longest is not None and shortest > longest:
            return _EMPTY
        regexes = text_regexes(self._schema, of)
        if values is not None:
            most = math.inf if longest is None else longest
            strings = [v for v in values if isinstance(v, str) and shortest <= len(v) <= most]
            try:
                kept = [v for v in strings if "pattern" not in of or matches(of["pattern"], v)]
                return _Texts(dict.fromkeys(kept), ())
            except ValueError:
                return _Texts(dict.fromkeys(strings), tuple(map(self._lark.regex, regexes)))
        if shortest or longest is not None:
            regexes.append(f"(?s:.{{{shortest},{'' if longest is None else longest}}})")
        return _Texts(None, tuple(self._lark.regex(regex) for regex in regexes))


def _is_within(value: object, of: CheckedSchema) -> bool:
    """Return False only for a number out of bounds."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return True
    return (
        value >= of.get("minimum", value)
        and value <= of.get("maximum", value)
        and not ("exclusiveMinimum" in of and value <= of["exclusiveMinimum"])
        and not ("exclusiveMaximum" in of and value >= of["exclusiveMaximum"])
        and not ("multipleOf" in of and value % of["multipleOf"])
    )


def _scalar(value: object) -> str:
    """Return the JSON of a scalar. 1.0 becomes 1, which is the same value."""
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        value = int(value)
    return json.dumps(value)


def _literal_regex(text: str) -> str:
    """Return a regex that matches only this text."""
    return "".join(
        char if char.isalnum() or ord(char) > 127 else f"\\x{ord(char):02x}" for char in text
    )
