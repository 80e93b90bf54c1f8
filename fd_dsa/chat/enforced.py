"""The part of JSON Schema that forced-call grammars enforce.

Other keywords are refused.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction
from typing import Any, TypedDict, cast

from fd_dsa.chat.schema import (
    KINDS,
    MAX_DEPTH,
    SchemaError,
    ToolSchema,
    items_of,
    listed_values,
    mapping,
    shown,
)

# keywords that grammars cannot enforce -> values with which they have no effect
_REFUSED: dict[str, tuple[Any, ...]] = {
    "not": (False,),
    "dependentRequired": ({},),
    "dependentSchemas": ({},),
    "dependencies": ({},),
    "propertyNames": (True, {}, {"type": "string"}),
    "contains": (),
    "uniqueItems": (False,),
    "unevaluatedProperties": (True, {}),
    "unevaluatedItems": (True, {}),
    "$dynamicRef": (),
    "$recursiveRef": (),
}
_FORMS: dict[str, tuple[type, ...]] = {
    "properties": (dict,),
    "patternProperties": (dict,),
    "allOf": (list,),
    "anyOf": (list,),
    "oneOf": (list,),
    "enum": (list,),
    "required": (list,),
    "prefixItems": (list,),
    "pattern": (str,),
    "minimum": (int, float),
    "maximum": (int, float),
    "exclusiveMinimum": (int, float),
    "exclusiveMaximum": (int, float),
    "multipleOf": (int, float),
    "minLength": (int,),
    "maxLength": (int,),
    "minItems": (int,),
    "maxItems": (int,),
    "minProperties": (int,),
    "maxProperties": (int,),
}
CheckedSchema = TypedDict(
    "CheckedSchema",
    {
        "$ref": object,
        "additionalItems": object,
        "additionalProperties": object,
        "allOf": list[object],
        "anyOf": list[object],
        "const": object,
        "enum": list[object],
        "exclusiveMaximum": float,
        "exclusiveMinimum": float,
        "format": object,
        "items": object,
        "maxItems": int,
        "maxLength": int,
        "maxProperties": int,
        "maximum": float,
        "minItems": int,
        "minLength": int,
        "minProperties": int,
        "minimum": float,
        "multipleOf": float,
        "oneOf": list[object],
        "pattern": str,
        "patternProperties": dict[str, object],
        "prefixItems": list[object],
        "properties": dict[str, object],
        "required": list[str],
        "type": object,
    },
    total=False,
)
"""Schema whose own keywords have the right forms, see `checked`."""
_MAX_MULTIPLE = 2**31
_MAX_VALUES = 8_192
_CONSTRAINTS = frozenset(
    {*_FORMS, *_REFUSED, "type", "const", "format", "additionalProperties", "items", "$ref", "if"}
)
# cost of checking the forms of all keywords
_CHECK_COST = 5
# maximum number of `oneOf` alternatives that are compared pair by pair
_MAX_PAIRED = 32
# number of properties of the first alternative that may serve as a tag
_MAX_TAGS = 4


def has_no_effect(keyword: str, value: object) -> bool:
    """Return True if a keyword that grammars cannot enforce has a value without effect."""
    return value in _REFUSED.get(keyword, ())


def constraints(schema: Mapping[str, object]) -> list[str]:
    """Return the keywords of a schema that are not annotations."""
    return [keyword for keyword in schema if keyword in _CONSTRAINTS]


def checked(schema: ToolSchema, of: object, depth: int) -> CheckedSchema:
    """Check the own keywords of a part of a tool's schema, not those of its subschemas.

    Args:
        of: the part, not a boolean.
        depth: remaining nesting depth.

    Returns:
        The same part.

    Raises:
        SchemaError: a keyword has a wrong form or cannot be enforced, or comparing the whole schema
            costs too much.
    """
    if not isinstance(of, dict):
        raise SchemaError(f"got {shown(of)}; must be a JSON schema, an object or a boolean")
    if not depth:
        raise SchemaError(f"got a schema that is nested more than {MAX_DEPTH} deep")
    schema.spend(_CHECK_COST)
    if schema.has_own_base(of):
        raise refusal("$id", "references to schemas with an identity are not supported")
    _check_keywords(of)
    return cast(CheckedSchema, of)


def _check_keywords(schema: Mapping[str, Any]) -> None:
    """Check the form of keywords, and refuse those that cannot be enforced.

    See `checked`.
    """
    for keyword, forms in _FORMS.items():
        value = schema.get(keyword)
        if keyword in schema and (isinstance(value, bool) or not isinstance(value, forms)):
            wanted = " or ".join(form.__name__ for form in forms)
            raise SchemaError(f"{keyword}: got {shown(value)}; must be of type {wanted}")
        _check_finite(keyword, value)
    for value in listed_values(schema) or ():
        _check_finite("enum", value)
    for keyword in _REFUSED:
        if keyword in schema and not has_no_effect(keyword, schema[keyword]):
            raise refusal(keyword)
    if "if" in schema and ("then" in schema or "else" in schema):
        raise refusal("if")
    if len(schema.get("enum", ())) > _MAX_VALUES:
        raise SchemaError(f"enum: got {len(schema['enum'])} values; at most {_MAX_VALUES} fit")
    names = schema.get("type")
    for name in names if isinstance(names, list) else [names] * ("type" in schema):
        if not isinstance(name, str) or name not in KINDS:
            raise SchemaError(f"type: got {shown(name)}; must be one of {', '.join(sorted(KINDS))}")
    for name in schema.get("required", ()):
        if not isinstance(name, str):
            raise SchemaError(f"required: got {shown(name)}; must be a list of names")
    step = Fraction(str(schema.get("multipleOf", 1)))
    if not 0 < step < _MAX_MULTIPLE or step.denominator & (step.denominator - 1):
        raise SchemaError(
            f"multipleOf: got {shown(schema['multipleOf'])}; must be an integer or a binary "
            "fraction such as 0.5, because rounding makes multiples of others uncertain"
        )


def _check_finite(keyword: str, value: object) -> None:
    """Raise SchemaError for a number that is too large for a double."""
    if isinstance(value, float) and not math.isfinite(value):
        raise SchemaError(f"{keyword}: got {value}; must be a number that a double can hold")


def refusal(keyword: str, why: str = "") -> SchemaError:
    """Return the error for a keyword that grammars cannot enforce."""
    why = why or "a grammar cannot enforce it"
    return SchemaError(f'{keyword}: {why}; remove it, or use tool_choice "auto"')


def exclusive(
    schema: ToolSchema, branches: Sequence[object], within: frozenset[str]
) -> Sequence[object]:
    """Rewrite the alternatives of `oneOf` so that no value satisfies two: an `anyOf`.

    Alternatives for objects then require the property whose constants distinguish them. If only
    their required names differ, each forbids a name that another one requires.

    Args:
        within: types that the values can have.

    Raises:
        SchemaError: a value may satisfy two of the alternatives.
    """
    kinds = [schema.kinds([branch]) & within for branch in branches]
    if sum(map(len, kinds)) == len(frozenset().union(*kinds)):
        return branches
    for kind in KINDS - {"integer", "object"}:
        same = [branch for branch, of in zip(branches, kinds, strict=True) if kind in of]
        if kind == "number":
            same = [branch for branch, of in zip(branches, kinds, strict=True) if "integer" in of]
        if len(same) > 1 and not _differ(_values(schema, branch) for branch in same):
            raise refusal("oneOf", "its alternatives may overlap")
    objects = [i for i, of in enumerate(kinds) if "object" in of]
    if len(objects) < 2:
        return branches
    apart = _apart(schema, [branches[i] for i in objects])
    made = list(branches)
    for i, branch in zip(objects, apart, strict=True):
        made[i] = branch
    return made


def _differ(sets: Iterable[frozenset[object] | None]) -> bool:
    """Return True if all sets are known and disjoint."""
    seen: set[Any] = set()
    for values in sets:
        if values is None or not seen.isdisjoint(values):
            return False
        seen |= values
    return True


def _values(schema: ToolSchema, of: object) -> frozenset[Any] | None:
    """Return a finite superset of the scalars that satisfy a schema, or None if unknown."""
    if of is False:
        return frozenset()
    _, plain = _facts(schema, of)
    for part in plain:
        own = listed_values(part)
        schema.spend(1, "oneOf", len(own or ()))
        if own is not None and not any(isinstance(value, dict | list) for value in own):
            # paired with the type, because 1 == True in Python
            return frozenset((isinstance(value, bool), value) for value in own)
    return None


def _facts(schema: ToolSchema, of: object) -> tuple[dict[str, None], list[Mapping[str, Any]]]:
    """Return the names that a schema requires, and the plain schemas it consists of."""
    required: dict[str, None] = {}
    plain: list[Mapping[str, Any]] = []
    todo, seen = [of], set[int]()
    while todo:
        part = todo.pop()
        if isinstance(part, dict) and id(part) not in seen:
            seen.add(id(part))
            names = items_of(part.get("required"))
            schema.spend(1, "oneOf", len(names))
            plain.append(part)
            required |= dict.fromkeys(name for name in names if isinstance(name, str))
            todo += schema.conjuncts(part)
    return required, plain


def _apart(schema: ToolSchema, branches: Sequence[object]) -> Sequence[object]:
    """Rewrite object schemas so that no object satisfies two. See `exclusive`."""
    facts = [_facts(schema, branch) for branch in branches]
    names = dict.fromkeys(name for part in facts[0][1] for name in _constants(part))
    for name in list(names)[:_MAX_TAGS]:
        sets = []
        for _, plain in facts:
            of = (mapping(part.get("properties")).get(name) for part in plain)
            known = [values for each in of if (values := _values(schema, each)) is not None]
            sets.append(known[0] if known else None)
        if _differ(sets):
            if sum(name not in required for required, _ in facts) <= 1:
                return branches
            return [schema.keep({"allOf": [each, {"required": [name]}]}) for each in branches]
    if len(branches) > _MAX_PAIRED:
        raise refusal("oneOf", "its alternatives may overlap")
    made = []
    for i, (required, _) in enumerate(facts):
        absent: dict[str, bool] = {}
        for j, (others, _) in enumerate(facts):
            schema.spend(1, "oneOf", len(others))
            missing = [name for name in others if name not in required]
            if i != j and not missing:
                raise refusal("oneOf", "its alternatives may overlap")
            if i != j and not any(name in absent for name in missing):
                absent[missing[0]] = False
        made.append(schema.keep({"allOf": [branches[i], {"properties": absent}]}))
    return made


def _constants(plain: Mapping[str, object]) -> list[str]:
    """Return the properties that may distinguish object schemas."""
    properties = mapping(plain.get("properties"))
    return [
        name
        for name, of in properties.items()
        if isinstance(of, dict) and not of.keys().isdisjoint(("const", "enum", "$ref", "allOf"))
    ]
