"""JSON schemas of tool arguments: references, types of values, and costs.

The grammars of forced calls and the parsers of answers read a tool's schema through this module.
They therefore agree on the type of every argument.

Source of the meaning of keywords: JSON Schema, draft 2020-12, and JSON Pointer (RFC 6901).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any, TypeVar
from urllib.parse import unquote

from fd_dsa.cancellation import check_cancelled
from fd_dsa.chat.json_text import shortened_json
from fd_dsa.chat.patterns import full_regex, matches

KINDS = frozenset({"null", "boolean", "integer", "number", "string", "array", "object"})
_NO_KINDS: frozenset[str] = frozenset()
# deeper than schemas written by people, and far below Python's recursion limit
MAX_DEPTH = 48
# limit for all schemas of one grammar, about 0.2 s
_MAX_COST = 100_000
_PATTERN_COST = 20
# number of compared values or names that cost 1
_VALUES_A_COST = 16
_MAX_PARTS = 1_000_000
_MAX_ARGUMENT_PARTS = 1_024
# maximum length of a value in a message, characters
_MAX_SHOWN = 100
_INDEX = re.compile(r"0|[1-9][0-9]{0,8}")

_T = TypeVar("_T")
_Memo = dict[int, frozenset[str]]


class SchemaError(ValueError):
    """A schema that a grammar cannot enforce. The message begins with the keyword."""


def type_of(text: str) -> str | None:
    """Return JSON Schema's type of a JSON text, or None for other texts, such as NaN."""
    try:
        # Python's parser accepts constants such as NaN, for which `int` raises
        return kind_of(json.loads(text, parse_constant=int))
    except (ValueError, RecursionError):
        return None


def kind_of(value: object) -> str:
    """Return JSON Schema's type of a parsed JSON value."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "boolean"
    for kind, python in (("integer", int), ("number", float), ("string", str), ("array", list)):
        if isinstance(value, python):
            return kind
    return "object"


def mapping(value: object) -> Mapping[str, Any]:
    """Return a keyword's value if it is an object, otherwise an empty object."""
    return value if isinstance(value, dict) else {}


def items_of(value: object) -> list[Any]:
    """Return a keyword's value if it is a list, otherwise an empty list."""
    return value if isinstance(value, list) else []


def listed_values(schema: Mapping[str, object]) -> list[Any] | None:
    """Return the values that `const` or `enum` allow, or None without these keywords."""
    if "const" in schema:
        return [schema["const"]]
    return items_of(schema["enum"]) if "enum" in schema else None


def declared_kinds(schema: Mapping[str, object]) -> frozenset[str]:
    """Return the types that the schema's own keywords allow. "number" implies "integer"."""
    kinds = KINDS
    if "type" in schema:
        named = schema["type"]
        several = named if isinstance(named, list) else [named]
        names = {name for name in several if isinstance(name, str) and name in KINDS}
        # unknown type names are ignored
        kinds = frozenset(names | ({"integer"} if "number" in names else set())) or KINDS
    values = listed_values(schema)
    if values is not None:
        kinds &= {kind for value in values for kind in _kinds_of_value(value)}
    return kinds


def _kinds_of_value(value: object) -> tuple[str, ...]:
    """Return the types of a value. 1.0 is an integer too."""
    if isinstance(value, float) and value.is_integer():
        return ("number", "integer")
    return (kind_of(value),)


class ToolSchema:
    """The JSON schema of a tool's arguments, with cached derived results.

    Every subschema is visited once for each question. Results are cached by its identity.

    Args:
        root: the schema of the request, of any type.
        spent: cost of the previous schemas in the same grammar.

    Attributes:
        spent: cost of the previous schemas and this one, in units of about 2 us.
    """

    def __init__(self, root: object, spent: int = 0) -> None:
        self.root = root
        self.spent = spent
        self._kinds: _Memo = {}
        self._nullable: _Memo = {}
        self._arguments: dict[str, frozenset[str]] = {}
        self._names: frozenset[str] | None = None
        self._required: frozenset[str] | None = None
        self._made: list[object] = []
        self._targets: dict[str, Any] = {}
        self._regexes: dict[str, str] = {}

    def keep(self, made: _T) -> _T:
        """Keep a schema that was made from parts of this one alive, and return it.

        Results are cached by identity, so its identity must not be reused.
        """
        self._made.append(made)
        return made

    def spend(self, cost: int, keyword: str = "", num_values: int = 0) -> None:
        """Count the cost of comparing subschemas, in advance.

        Results are cached, but `$ref` lets a short schema use a large one many times.

        Args:
            num_values: number of compared values and names, in addition to `cost`.

        Raises:
            SchemaError: the total cost is too high.
            Cancelled: the client has disconnected.
        """
        check_cancelled()
        self.spent += cost + num_values // _VALUES_A_COST
        if self.spent > _MAX_COST:
            where = f"{keyword}: " if keyword else ""
            raise SchemaError(f"{where}got a schema with too much to compare; make it smaller")

    def regex(self, pattern: str, keyword: str) -> str:
        """Return a regex of all texts that contain a match of a pattern. See `full_regex`.

        Raises:
            SchemaError: llguidance lacks a feature of the pattern, or the total cost is too high.
        """
        if pattern not in self._regexes:
            self.spend(_PATTERN_COST + len(pattern), keyword)
            try:
                self._regexes[pattern] = full_regex(pattern)
            except ValueError as error:
                raise SchemaError(f"{keyword}: {error}") from error
        return self._regexes[pattern]

    def target(self, reference: object) -> Any:
        """Return the schema that a `$ref` points to.

        Raises:
            SchemaError: the reference is not a JSON pointer into the tool's schema.
        """
        if isinstance(reference, str) and reference in self._targets:
            return self._targets[reference]
        if not isinstance(reference, str) or not re.match(r"#(/|$)", reference):
            raise SchemaError(
                f"$ref: got {shown(reference)}; must be a pointer into the same schema, such as "
                "#/$defs/name"
            )
        at = self.root
        for part in unquote(reference).split("/")[1:]:
            key = part.replace("~1", "/").replace("~0", "~")
            if isinstance(at, dict) and key in at and not self.has_own_base(at):
                at = at[key]
            elif isinstance(at, list) and _INDEX.fullmatch(key) and int(key) < len(at):
                at = at[int(key)]
            else:
                at = None
                break
        if not isinstance(at, dict | bool):
            raise SchemaError(f"$ref: got {shown(reference)}; the schema has no schema there")
        self._targets[reference] = at
        return at

    def has_own_base(self, schema: Mapping[str, object]) -> bool:
        """Return True if references inside a subschema start from its own `$id`."""
        return schema is not self.root and isinstance(schema.get("$id"), str)

    def conjuncts(self, schema: Mapping[str, object]) -> list[Any]:
        """Return the schemas that apply in addition to the own keywords: `$ref` and `allOf`."""
        found = [self.target(schema["$ref"])] if "$ref" in schema else []
        return found + items_of(schema.get("allOf"))

    @staticmethod
    def choices(schema: Mapping[str, object]) -> list[list[Any]]:
        """Return the lists of alternatives, `anyOf` and `oneOf`.

        Each list applies in addition.
        """
        lists = (schema.get(keyword) for keyword in ("anyOf", "oneOf"))
        return [each for each in lists if isinstance(each, list)]

    def of_property(self, schema: Mapping[str, object], name: str) -> list[Any]:
        """Return the schemas that the own keywords apply to a property.

        Raises:
            ValueError: the name cannot be compared with a pattern.
        """
        own = mapping(schema.get("properties"))
        found = [own[name]] if name in own else []
        patterns = mapping(schema.get("patternProperties"))
        for pattern, of in patterns.items():
            self.spend(_PATTERN_COST + len(pattern) // 2, "patternProperties")
            found += [of] if matches(pattern, name) else []
        if not found and "additionalProperties" in schema:
            found.append(schema["additionalProperties"])
        return found

    def kinds(self, schemas: Iterable[object]) -> frozenset[str]:
        """Return the types of the values that may satisfy all schemas."""
        found = KINDS
        for schema in schemas:
            found &= self._fold(schema, declared_kinds, self._kinds)
        return found

    def argument_names(self) -> frozenset[str]:
        """Return the argument names that any part of the schema lists, empty without any."""
        if self._names is None:
            parts = list(self._parts(with_choices=True))
            listed = (mapping(part.get("properties")).keys() for part in parts)
            self._names = frozenset().union(*listed, *map(_required, parts))
        return self._names

    def required_names(self) -> frozenset[str]:
        """Return the names of the arguments that every call must have."""
        if self._required is None:
            parts = self._parts(with_choices=False)
            self._required = frozenset().union(*map(_required, parts))
        return self._required

    def _parts(self, with_choices: bool) -> Iterator[Mapping[str, Any]]:
        """Yield the schema of the arguments, its conjuncts, and on request its alternatives."""
        todo, seen = [self.root], set[int]()
        while todo:
            part = todo.pop()
            if not isinstance(part, dict) or id(part) in seen:
                continue
            seen.add(id(part))
            yield part
            for branches in self.choices(part) if with_choices else ():
                todo += branches
            try:
                todo += self.conjuncts(part)
            except SchemaError:
                continue

    def argument_types(self, name: str) -> frozenset[str]:
        """Return the types of an argument for the parser of answers, empty if unspecified.

        OpenAPI's `nullable` counts. An argument that the schema forbids has any type.
        """
        if name not in self._arguments:
            own = partial(self._of_argument, name)
            # every name costs a visit of all parts, and an answer may have many names
            kinds = self._fold(self.root, own, {}, max_parts=_MAX_ARGUMENT_PARTS)
            self._arguments[name] = _NO_KINDS if kinds == KINDS else kinds
        return self._arguments[name]

    def _of_argument(self, name: str, schema: Mapping[str, object]) -> frozenset[str]:
        """Return the types that an object schema's own keywords allow for a property."""
        if "object" not in declared_kinds(schema):
            return _NO_KINDS
        found = KINDS
        try:
            for of_name in self.of_property(schema, name):
                if of_name is not False:
                    found &= self._fold(of_name, declared_kinds, self._nullable, nullable=True)
        except ValueError:
            return KINDS
        return found

    def _fold(
        self,
        schema: object,
        own: Callable[[Mapping[str, object]], frozenset[str]],
        memo: _Memo,
        nullable: bool = False,
        depth: int = MAX_DEPTH,
        max_parts: int = _MAX_PARTS,
    ) -> frozenset[str]:
        """Return the types of a schema, combined with its conjuncts and alternatives.

        Args:
            nullable: True if OpenAPI's keyword adds null to the types.
            depth, max_parts: remaining nesting depth, and maximum number of visited schemas.
                Schemas beyond have all types.
        """
        if schema is False:
            return _NO_KINDS
        if not isinstance(schema, dict) or self.has_own_base(schema) or not depth:
            return KINDS
        if id(schema) in memo:
            return memo[id(schema)]
        if len(memo) >= max_parts:
            return KINDS
        check_cancelled()
        # a schema that refers to itself adds no constraint
        memo[id(schema)] = KINDS
        kinds = own(schema)
        try:
            parts = self.conjuncts(schema)
        except SchemaError:
            parts = []
        for part in parts:
            kinds &= self._fold(part, own, memo, nullable, depth - 1, max_parts)
        for branches in self.choices(schema):
            of_each = (
                self._fold(each, own, memo, nullable, depth - 1, max_parts) for each in branches
            )
            kinds &= _NO_KINDS.union(*of_each)
        if nullable and schema.get("nullable") is True:
            kinds |= {"null"}
        memo[id(schema)] = kinds
        return kinds


def _required(schema: Mapping[str, object]) -> set[str]:
    """Return the names that the schema's own keyword requires."""
    return {name for name in items_of(schema.get("required")) if isinstance(name, str)}


def shown(value: object) -> str:
    """Return a value for a message, shortened."""
    return shortened_json(value, _MAX_SHOWN)
