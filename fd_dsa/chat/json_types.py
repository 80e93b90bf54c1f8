"""What a JSON text is, and what a JSON schema allows."""

from __future__ import annotations

import json
from typing import Any

# deep enough for schemas that people write, and an end for those that refer to themselves
_MAX_DEPTH = 8


def is_json(text: str) -> bool:
    """Whether a text is JSON; NaN and Infinity are not."""
    try:
        json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        return False
    return True


def _refuse_constant(name: str) -> None:
    """Python's parser takes names that JSON lacks."""
    raise ValueError(f"{name} is not JSON")


def type_of(text: str) -> str:
    """JSON schema's name of the type of a JSON text; whole numbers are integers."""
    by_first = {"{": "object", "[": "array", '"': "string", "t": "boolean", "f": "boolean"}
    first = text[:1]
    if first == "n":
        return "null"
    return by_first.get(first) or ("number" if set(text) & set(".eE") else "integer")


def types_of(schema: Any, root: Any = None) -> frozenset[str]:
    """Types that a schema allows, "number" with "integer"; empty where it does not say.

    Args:
        schema: of a value.
        root: the schema in which references of `schema` are looked up.
    """
    return _types(schema, root, _MAX_DEPTH)


def _types(schema: Any, root: Any, depth: int) -> frozenset[str]:
    """`types_of`, so many references and alternatives deep."""
    if not isinstance(schema, dict) or not depth:
        return frozenset()
    if "$ref" in schema:
        return _types(_target(schema["$ref"], root), root, depth - 1)
    named = schema.get("type")
    listed = named if isinstance(named, list) else [named]
    names = {name for name in listed if isinstance(name, str)}
    for keyword in ("anyOf", "oneOf"):
        branches = schema.get(keyword)
        for branch in branches if isinstance(branches, list) and not names else ():
            of_branch = _types(branch, root, depth - 1)
            if not of_branch:
                return frozenset()
            names |= of_branch
    values = [schema["const"]] if "const" in schema else schema.get("enum")
    if not names and isinstance(values, list):
        names = {type_of(json.dumps(value)) for value in values}
    return frozenset(names | ({"integer"} if "number" in names else set()))


def _target(reference: Any, root: Any) -> Any:
    """What a reference within `root` points to, None for any other."""
    if not isinstance(reference, str) or not reference.startswith("#/"):
        return None
    target = root
    for part in reference[2:].split("/"):
        target = target.get(part) if isinstance(target, dict) else None
    return target
