"""JSON schemas for llguidance: one document with all referenced schemas.

llguidance enforces less than JSON Schema in some places. For example, two spellings of a property's
name count as two properties. The documents here avoid those places.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from typing import Any

from fd_dsa.chat.enforced import CheckedSchema, checked, constraints, exclusive, refusal
from fd_dsa.chat.exact_numbers import LOWER, UPPER, check_constant, exact_pattern, inner_bound
from fd_dsa.chat.lark import check_size
from fd_dsa.chat.patterns import FORMATS
from fd_dsa.chat.schema import (
    KINDS,
    MAX_DEPTH,
    SchemaError,
    ToolSchema,
    declared_kinds,
    listed_values,
    mapping,
    shown,
)

_AS_THEY_ARE = ("type", "minItems", "maxItems", "minLength", "maxLength", "multipleOf")
_COUNTS = {"minProperties", "maxProperties"}
# `minProperties` may ask for one of at most this many optional properties
_MAX_OPTIONAL = 32


def json_document(
    schema: ToolSchema, parts: Sequence[object], kinds: frozenset[str] = KINDS
) -> dict[str, Any]:
    """Return a schema of values that satisfy all of `parts` and have one of the types.

    Args:
        schema: the tool's schema, the target of references in `parts`.

    Raises:
        SchemaError: a grammar cannot enforce a keyword, or no finite value satisfies the schemas.
        ValueError: the document is too large for a grammar.
    """
    document = _Document(schema)
    bodies = [document.body(part, kinds) for part in parts if part is not True]
    _check_counts(schema, parts)
    if not kinds >= schema.kinds(parts):
        bodies.append({"type": sorted(kinds)})
    body: dict[str, Any] = {"allOf": bodies} if bodies else {}
    if len(bodies) == 1 and isinstance(bodies[0], dict):
        (body,) = bodies
    if not _is_finite(body, document.definitions):
        raise SchemaError("got a schema whose values have no end")
    return {**body, "$defs": document.definitions} if document.definitions else dict(body)


class _Document:
    """The rewritten schemas and the definitions that they refer to."""

    def __init__(self, schema: ToolSchema) -> None:
        self._schema = schema
        self._names: dict[int, str] = {}
        # targets that apply to the same value as the schema that is being rewritten
        self._in_place: frozenset[int] = frozenset()
        self._num_chars = 0
        self.definitions: dict[str, Any] = {}

    def body(self, of: object, kinds: frozenset[str] = KINDS, depth: int = MAX_DEPTH) -> Any:
        """Rewrite a schema to the part of JSON Schema that llguidance supports.

        Args:
            kinds: types that other schemas allow for the value.
            depth: remaining nesting depth.
        """
        if isinstance(of, bool):
            return of
        of = checked(self._schema, of, depth)
        kinds &= self._schema.kinds([of])
        made: dict[str, Any] = {key: of.get(key) for key in _AS_THEY_ARE if key in of}
        made |= _bounds(of)
        values = listed_values(of)
        if values is not None:
            made["enum"] = [_exact(value) for value in values]
        regexes = text_regexes(self._schema, of)
        all_of: list[Any] = [{"pattern": _whole(regex, "pattern")} for regex in regexes]
        made |= self._of_object(of, depth)
        made |= self._of_array(of, depth)
        if "$ref" in of:
            made["$ref"] = f"#/$defs/{self._definition(of['$ref'], depth)}"
        all_of += [self.body(part, kinds, depth - 1) for part in of.get("allOf", ())]
        if "anyOf" in of:
            made["anyOf"] = [self.body(branch, kinds, depth - 1) for branch in of["anyOf"]]
        if "oneOf" in of:
            branches = exclusive(self._schema, of["oneOf"], kinds)
            all_of.append({"anyOf": [self.body(each, kinds, depth - 1) for each in branches]})
        all_of += _at_least_one(of)
        made |= {"allOf": all_of} if all_of else {}
        # a lower bound of the length of the text
        self._num_chars += sum(len(key) + 6 for key in made)
        check_size(self._num_chars)
        return made

    def _nested(self, of: object, depth: int) -> Any:
        """Rewrite a schema for a value inside another value."""
        outside, self._in_place = self._in_place, frozenset()
        made = self.body(of, depth=depth - 1)
        _check_counts(self._schema, [of])
        self._in_place = outside
        return made

    def _definition(self, reference: object, depth: int) -> str:
        """Return the name of the definition for the target of a reference."""
        target = self._schema.target(reference)
        if id(target) in self._in_place:
            raise SchemaError(f"$ref: got {shown(reference)}, a reference that leads to itself")
        if id(target) not in self._names:
            name = self._names[id(target)] = f"d{len(self._names)}"
            outside = self._in_place
            self._in_place |= {id(target)}
            self.definitions[name] = self.body(target, depth=depth - 1)
            self._in_place = outside
        return self._names[id(target)]

    def _of_object(self, of: CheckedSchema, depth: int) -> dict[str, Any]:
        """Rewrite the keywords for objects."""
        made: dict[str, Any] = {}
        for key in ("properties", "patternProperties"):
            if key in of:
                regexes = key == "patternProperties"
                made[key] = {
                    self._key(name) if regexes else name: self._nested(each, depth)
                    for name, each in mapping(of.get(key)).items()
                }
        if "additionalProperties" in of:
            made["additionalProperties"] = self._nested(of["additionalProperties"], depth)
        if of.get("required"):
            made["required"] = list(dict.fromkeys(of["required"]))
        return made | _counts(of)

    def _key(self, pattern: str) -> str:
        return _whole(key_regex(self._schema, pattern), "patternProperties")

    def _of_array(self, of: CheckedSchema, depth: int) -> dict[str, Any]:
        """Rewrite the keywords for arrays.

        Drafts before 2020-12 write `prefixItems` as a list of `items`.
        """
        items = of.get("items")
        prefix, rest = of.get("prefixItems"), items
        if isinstance(items, list):
            prefix, rest = items, of.get("additionalItems")
        made: dict[str, Any] = {}
        if prefix is not None:
            made["prefixItems"] = [self._nested(each, depth) for each in prefix]
        if rest is not None:
            made["items"] = self._nested(rest, depth)
        return made


def text_regexes(schema: ToolSchema, of: CheckedSchema) -> list[str]:
    """Return regexes of whole texts for `pattern` and `format`."""
    found = [schema.regex(of["pattern"], "pattern")] if "pattern" in of else []
    form = of.get("format")
    known = FORMATS.get(form) if isinstance(form, str) else None
    return found + ([known] if known else [])


def key_regex(schema: ToolSchema, pattern: str) -> str:
    """Return a regex of whole names for a pattern of `patternProperties`."""
    return schema.regex(pattern, "patternProperties")


def _whole(regex: str, keyword: str) -> str:
    """Return the pattern of whole texts of a regex."""
    try:
        return f"^(?:{exact_pattern(regex)})$"
    except ValueError as error:
        raise refusal(keyword, str(error)) from error


def _bounds(of: CheckedSchema) -> dict[str, Any]:
    """Return the bounds of numbers.

    Beyond exact doubles they are moved inward to 15 digits.
    """
    made = {}
    for key in (*LOWER, *UPPER):
        value = of.get(key)
        if not isinstance(value, int | float):
            continue
        try:
            made[key] = inner_bound(key, value)
        except ValueError as error:
            raise refusal(key, str(error)) from error
    return made


def _exact(value: object, depth: int = MAX_DEPTH) -> Any:
    """Check that llguidance keeps a value of `const` or `enum` as it is."""
    try:
        check_constant(value)
    except ValueError as error:
        raise refusal("enum", str(error)) from error
    if not depth:
        raise SchemaError(f"enum: got a value that is nested more than {MAX_DEPTH} deep")
    if isinstance(value, list):
        return [_exact(each, depth - 1) for each in value]
    if isinstance(value, dict):
        return {name: _exact(each, depth - 1) for name, each in value.items()}
    return value


def _is_closed(of: CheckedSchema) -> bool:
    return of.get("additionalProperties") is False and not of.get("patternProperties")


def _optional(of: CheckedSchema) -> list[str]:
    required = set(of.get("required", ()))
    return [name for name in mapping(of.get("properties")) if name not in required]


def _counts(of: CheckedSchema) -> dict[str, int]:
    """Return the property counts that llguidance must check."""
    required, optional = len(set(of.get("required", ()))), _optional(of)
    made = {}
    min_count = of.get("minProperties", 0)
    if min_count > required + 1:
        # llguidance would count a repeated name twice
        raise refusal("minProperties", "only one more than the required properties can be counted")
    if min_count > required and not optional:
        made["minProperties"] = min_count
    max_count = of.get("maxProperties")
    if max_count is not None and not (_is_closed(of) and max_count >= required + len(optional)):
        if optional:
            raise refusal("maxProperties", "optional properties are not counted")
        made["maxProperties"] = max_count
    return made


def _check_counts(schema: ToolSchema, parts: Iterable[object]) -> None:
    """Refuse property counts if schemas of the same value list optional properties.

    llguidance counts properties that no schema lists, and required ones.
    """
    together, seen, todo = list[Any](), set[int](), [*parts]
    while todo:
        part = todo.pop()
        if isinstance(part, dict) and id(part) not in seen:
            seen.add(id(part))
            together.append(part)
            more = [*schema.conjuncts(part), *chain(*schema.choices(part))]
            schema.spend(len(more), "allOf")
            todo += more
    counting = []
    for part in together:
        if part.keys() & _COUNTS:
            schema.spend(1, "minProperties", len(mapping(part.get("properties"))))
            counting += [part] if _counts(part) else []
    if counting and any(_optional(part) for part in together):
        keyword = next(iter(_counts(counting[0])))
        raise refusal(keyword, "optional properties are not counted")


def _at_least_one(of: CheckedSchema) -> list[dict[str, Any]]:
    """Express `minProperties` of an object by requiring one of its optional properties."""
    optional = _optional(of)
    if of.get("minProperties", 0) <= len(set(of.get("required", ()))) or not optional:
        return []
    if len(optional) > _MAX_OPTIONAL:
        raise refusal("minProperties", f"more than {_MAX_OPTIONAL} properties are optional")
    return [{"anyOf": [{"required": [name]} for name in optional]}]


def _is_finite(body: Any, definitions: Mapping[str, object]) -> bool:
    """Return True if at least one value of a document is finite."""
    finite: set[str] = set()
    num_before = -1
    while num_before < len(finite):
        num_before = len(finite)
        finite |= {name for name, of in definitions.items() if _may_end(of, finite)}
    return _may_end(body, finite)


def _may_end(of: Any, finite: set[str]) -> bool:
    """Return True if a value may be finite, given the definitions with finite values."""
    if isinstance(of, bool):
        return True
    if "$ref" in of and of["$ref"].rpartition("/")[2] not in finite:
        return False
    if not all(_may_end(part, finite) for part in of.get("allOf", ())):
        return False
    if "anyOf" in of and not any(_may_end(branch, finite) for branch in of["anyOf"]):
        return False
    kinds = declared_kinds(of)
    if kinds == {"object"}:
        properties = of.get("properties", {})
        return all(_may_end(properties.get(name, True), finite) for name in of.get("required", ()))
    if kinds == {"array"}:
        prefix, size = of.get("prefixItems", []), of.get("minItems", 0)
        first = [*prefix[:size], *([of.get("items", True)] if size > len(prefix) else [])]
        return all(_may_end(item, finite) for item in first)
    return True


def plain_target(schema: ToolSchema, of: object) -> Any:
    """Follow a reference without other keywords. Other schemas are returned unchanged."""
    for _ in range(MAX_DEPTH):
        if not isinstance(of, dict) or constraints(of) != ["$ref"] or schema.has_own_base(of):
            break
        of = schema.target(of["$ref"])
    return of
