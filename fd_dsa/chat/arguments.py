"""Argument lists of a tool's schema, for formats that write arguments one by one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from fd_dsa.chat.enforced import CheckedSchema, checked, exclusive, refusal
from fd_dsa.chat.schema import (
    MAX_DEPTH,
    SchemaError,
    ToolSchema,
    declared_kinds,
    items_of,
    listed_values,
    mapping,
)

# limits of a schema: combinations of its alternatives, and plain schemas in all of them
_MAX_LISTS = 64
_MAX_PARTS = 512
# a grammar with more names would be too large
_MAX_NAMES = 512
_OBJECT = frozenset({"object"})
_T = TypeVar("_T")
_Plain = tuple[CheckedSchema, ...]


@dataclass(frozen=True)
class Argument:
    """An argument that a call may have.

    Attributes:
        name: None for any name that matches `pattern`.
        parts: schemas that its value must satisfy, all of them.
        pattern, other_patterns: patterns of an argument without a fixed name. The name must match
            the first and not any of the others.
    """

    name: str | None
    parts: tuple[Any, ...]
    is_required: bool = False
    pattern: str | None = None
    other_patterns: tuple[str, ...] = ()


@dataclass(frozen=True)
class ArgumentList:
    """The arguments of one alternative of a schema.

    A named argument occurs at most once.

    Attributes:
        min_count, max_count: minimum and maximum number of arguments in a call. None = no maximum.
    """

    arguments: tuple[Argument, ...]
    min_count: int = 0
    max_count: int | None = None


def argument_lists(schema: ToolSchema) -> list[ArgumentList]:
    """Return the argument lists that satisfy a tool's schema, one for each alternative.

    A schema without properties allows arguments of any name, even repeated ones. Otherwise only
    listed or required names are written. An alternative without properties then has one argument,
    of any name.

    Raises:
        SchemaError: a grammar cannot enforce a keyword, or no arguments satisfy the schema.
    """
    found = []
    for plain in _Alternatives(schema).of(schema.root):
        if all("object" in declared_kinds(part) for part in plain):
            made = _list_of(schema, plain)
            if made is not None:
                found.append(made)
    if not found:
        raise SchemaError("got a schema that no arguments satisfy")
    return found


class _Alternatives:
    """Alternatives of schemas, each a tuple of schemas that must all be satisfied."""

    def __init__(self, schema: ToolSchema) -> None:
        self._schema = schema
        self._memo: dict[int, list[_Plain]] = {}

    def of(self, of: object, depth: int = MAX_DEPTH) -> list[_Plain]:
        """Return the alternatives of a schema."""
        if isinstance(of, bool) or of is None:
            return [] if of is False else [()]
        if id(of) not in self._memo:
            self._memo[id(of)] = self._of_dict(checked(self._schema, of, depth), depth)
        return self._memo[id(of)]

    def _of_dict(self, of: CheckedSchema, depth: int) -> list[_Plain]:
        schema = self._schema
        found: list[_Plain] = [(of,)]
        values = listed_values(of)
        if values is not None:
            objects = [schema.keep(_constant(v)) for v in values if isinstance(v, dict)]
            found = _product(found, [(each,) for each in objects], "enum")
        for part in schema.conjuncts(of):
            found = _product(found, self.of(part, depth - 1), "allOf")
        for keyword in ("anyOf", "oneOf"):
            if keyword in of:
                branches: Sequence[object] = items_of(of.get(keyword))
                if keyword == "oneOf":
                    branches = exclusive(schema, branches, _OBJECT)
                choices: list[_Plain] = []
                for branch in branches:
                    if "object" in schema.kinds([branch]):
                        choices += self.of(branch, depth - 1)
                        _check_size(choices, keyword)
                found = _product(found, choices, keyword)
        return found


def _product(a: list[_Plain], b: list[_Plain], keyword: str) -> list[_Plain]:
    """Combine every alternative of one list with every alternative of the other."""
    if len(a) * len(b) > _MAX_LISTS:
        raise refusal(keyword, f"the arguments have more than {_MAX_LISTS} alternatives")
    made = [_unique((*each, *other)) for each in a for other in b]
    _check_size(made, keyword)
    return made


def _check_size(found: list[_Plain], keyword: str) -> None:
    if len(found) > _MAX_LISTS:
        raise refusal(keyword, f"the arguments have more than {_MAX_LISTS} alternatives")
    if sum(map(len, found)) > _MAX_PARTS:
        raise refusal(keyword, f"the arguments have more than {_MAX_PARTS} schemas")


def _constant(value: Mapping[str, object]) -> CheckedSchema:
    """Return a schema that only this object satisfies."""
    properties: dict[str, object] = {name: {"const": of} for name, of in value.items()}
    return {"properties": properties, "required": list(value), "additionalProperties": False}


def _list_of(schema: ToolSchema, plain: _Plain) -> ArgumentList | None:
    """Return the arguments that satisfy all schemas, or None if a required one cannot."""
    required = {name for part in plain for name in part.get("required", ())}
    names = dict.fromkeys(name for part in plain for name in mapping(part.get("properties")))
    names |= dict.fromkeys(name for part in plain for name in part.get("required", ()))
    if len(names) > _MAX_NAMES:
        raise refusal("properties", f"there are more than {_MAX_NAMES} arguments")
    arguments = []
    for name in names:
        parts = _unique(of for part in plain for of in _of_property(schema, part, name))
        if schema.kinds(parts):
            arguments.append(Argument(name, parts, name in required))
        elif name in required:
            return None
    min_count = max(part.get("minProperties", 0) for part in plain) if plain else 0
    counts = [part["maxProperties"] for part in plain if "maxProperties" in part]
    max_count = min(counts) if counts else None
    if not any("properties" in part or part.get("required") for part in plain):
        arguments = _of_any_name(plain)
        if min_count > 1:
            raise refusal("minProperties", "arguments of any name may come twice")
        if schema.argument_names():
            # the parser accepts a repeated name only if no part of the schema names an argument
            max_count = min(1, 1 if max_count is None else max_count)
    if min_count > len(arguments) and (min_count > 1 or not arguments):
        return None
    if max_count is not None and max_count < max(min_count, len(required)):
        return None
    return ArgumentList(tuple(arguments), min_count, max_count)


def _of_property(schema: ToolSchema, part: Mapping[str, object], name: str) -> list[Any]:
    try:
        return schema.of_property(part, name)
    except SchemaError:
        raise
    except ValueError as error:
        raise SchemaError(f"patternProperties: {error}") from error


def _of_any_name(plain: _Plain) -> list[Argument]:
    """Return arguments for `patternProperties` or `additionalProperties`."""
    patterns = {p: None for part in plain for p in mapping(part.get("patternProperties"))}
    if not patterns:
        parts = _unique(p["additionalProperties"] for p in plain if "additionalProperties" in p)
        return [] if any(of is False for of in parts) else [Argument(None, parts)]
    found = []
    for pattern in patterns:
        parts = _unique(
            part["patternProperties"][pattern]
            if pattern in mapping(part.get("patternProperties"))
            else part["additionalProperties"]
            for part in plain
            if pattern in mapping(part.get("patternProperties")) or "additionalProperties" in part
        )
        if not any(of is False for of in parts):
            others = tuple(other for other in patterns if other != pattern)
            found.append(Argument(None, parts, pattern=pattern, other_patterns=others))
    return found


def _unique(parts: Iterable[_T]) -> tuple[_T, ...]:
    return tuple({id(part): part for part in parts}.values())
