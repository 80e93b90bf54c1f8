"""Random schemas of tools, and random calls under the grammars that are made of them."""

from __future__ import annotations

import random
from typing import Any
from urllib.parse import quote

import llguidance
import numpy as np
from tokenizers import Tokenizer as Backend

from fd_dsa.config import demo_model_path

# texts that a walk tries now and then: values that look like others, and marks that end something
_VALUES = (
    *("5", "-3", "0.5", "true", "false", "null", '"', "[", "{", ",", ", ", ": ", "a", "1", "12345"),
    *('"a"', "[1]", "2024-02-05", " ", "x-a", "<", '"kind": "k0"'),
)
_ENDS = (
    *('"', "]", "}", "</arg_value>", "</tool_call>", "7</arg_value>", "null</arg_value>"),
    *("</｜DSML｜parameter>\n", "</｜DSML｜invoke>\n"),
)


_KEYWORDS = (
    *("type", "properties", "required", "allOf", "anyOf", "oneOf", "enum", "const", "$ref", "not"),
    *("items", "prefixItems", "additionalItems", "additionalProperties", "patternProperties"),
    *("minLength", "maxLength", "pattern", "format", "minimum", "exclusiveMaximum", "multipleOf"),
    *("minProperties", "maxProperties", "minItems", "nullable", "$id", "if", "then", "$defs"),
)
_WRONG: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1.5, 10**30, -(10**400), float("inf"), "", "x", "#", "#/", "(((("),
    *("#/$defs/no", "#/properties/a/0", "\ud800", "object", [], {}, [[]], [{}], {"a": {}}),
    *({"a": []}, ["a"], [None], ["a", 5], {"$ref": "#"}, [{"type": [{}]}], {"\n": {}}),
)


class Walker:
    """Outputs of the demo model's vocabulary under grammars."""

    def __init__(self) -> None:
        self._backend = Backend.from_file(str(demo_model_path() / "tokenizer.json"))
        self._tokenizer = llguidance.LLTokenizer(self._backend.to_str())
        self._values, self._ends = map(self._encode, (_VALUES, _ENDS))

    def _encode(self, texts: tuple[str, ...]) -> list[list[int]]:
        return [self._backend.encode(text, add_special_tokens=False).ids for text in texts]

    def error(self, grammar: str) -> str:
        """Error of llguidance in a grammar, empty for a good one."""
        return str(llguidance.LLMatcher.validate_grammar(grammar, self._tokenizer))

    def accepts(self, grammar: str, text: str) -> bool:
        """Return True if a grammar allows a whole text."""
        matcher = llguidance.LLMatcher(self._tokenizer, grammar, log_level=0)
        (ids,) = self._encode((text,))
        return matcher.validate_tokens(ids) == len(ids) and (
            matcher.consume_tokens(ids) and matcher.is_accepting()
        )

    def walk(self, grammar: str, rng: random.Random, num_tokens: int = 500) -> str | None:
        """A text that the grammar allows; None if it is longer than `num_tokens` tokens.

        Raises:
            AssertionError: no token may follow, although the text is not complete.
        """
        matcher = llguidance.LLMatcher(self._tokenizer, grammar, log_level=0)
        taken: list[int] = []
        while not matcher.is_accepting() and len(taken) < num_tokens:
            is_late = len(taken) > 100
            hints = self._ends if rng.random() < (0.9 if is_late else 0.4) else self._values
            ids = rng.choice(hints)
            if rng.random() < 0.2 or matcher.validate_tokens(ids) < len(ids):
                bits = np.frombuffer(matcher.compute_bitmask(), np.uint8)
                allowed = np.flatnonzero(np.unpackbits(bits, bitorder="little"))
                assert len(allowed), f"no token may follow {self._tokenizer.decode_str(taken)!r}"
                ids = [int(rng.choice(allowed))]
            assert matcher.consume_tokens(ids), matcher.get_error()
            taken += ids
        return self._tokenizer.decode_str(taken) if matcher.is_accepting() else None


def damaged(schema: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    """A schema in which some keyword or entry has a value that it must not have."""
    nodes: list[Any] = []
    todo: list[Any] = [schema]
    while todo:
        node = todo.pop()
        if isinstance(node, dict | list) and node:
            nodes.append(node)
            todo += node.values() if isinstance(node, dict) else node
    for node in rng.sample(nodes, min(len(nodes), 3)):
        key = rng.choice(_KEYWORDS) if isinstance(node, dict) else rng.randrange(len(node))
        node[key] = rng.choice(_WRONG)
    return schema


def random_tool(rng: random.Random) -> dict[str, Any]:
    """A schema of arguments, of the constructs that clients send."""
    defs = {name: _value(rng, 2, ()) for name in ("plain", "a/b", "t~e", "ö %")}
    refs = ["#/$defs/plain", "#/$defs/a~1b", "#/$defs/t~0e", "#/$defs/%C3%B6%20%25"]
    defs["list"] = {"anyOf": [_value(rng, 1, refs), _value(rng, 1, refs)]}
    refs.append("#/$defs/list/anyOf/1")
    defs["tree"] = {
        "type": "object",
        "properties": {"child": {"$ref": "#/$defs/tree"}, "leaf": _value(rng, 1, refs)},
        "additionalProperties": False,
    }
    refs.append("#/$defs/tree")
    is_named = rng.random() < 0.3
    root = _arguments(rng, 2, refs)
    properties = root.get("properties", {})
    if len(properties) > 1 and rng.random() < 0.5:
        first, second, *_ = properties
        where = "#/$defs/Args" if is_named else "#"
        properties[first] = _value(rng, 2, ())
        properties[second] = {"$ref": f"{where}/properties/{quote(first)}", "description": "too"}
    if is_named:
        defs["Args"] = root
        root = {"$ref": "#/$defs/Args"}
        if rng.random() < 0.5:
            root |= {"properties": {"d": _value(rng, 1, refs)}}
    return {**root, "$defs": defs}


def _arguments(rng: random.Random, depth: int, refs: Any) -> dict[str, Any]:
    """A schema of an object of arguments."""
    names = rng.sample(["a", "b", "c", "start", "kind", "x y"], rng.randint(0, 4))
    made: dict[str, Any] = {} if rng.random() < 0.1 else {"type": "object"}
    if names or rng.random() < 0.5:
        made["properties"] = {name: _value(rng, depth, refs) for name in names}
    required = [name for name in names if rng.random() < 0.5]
    required += ["extra"] * (rng.random() < 0.1)
    if required:
        made["required"] = required
    if rng.random() < 0.3:
        made["additionalProperties"] = rng.choice([depth < 2, True, {"type": "integer"}])
    if rng.random() < 0.1:
        made["patternProperties"] = {"^x-": _value(rng, 1, refs)}
    if rng.random() < 0.1:
        made["minProperties"] = rng.randint(1, 2)
    if rng.random() < 0.1:
        made["maxProperties"] = rng.randint(1, 4)
    if depth and rng.random() < 0.3:
        key = rng.choice(["allOf", "anyOf", "oneOf"])
        made[key] = [_arguments(rng, 0, refs) for _ in range(rng.randint(1, 3))]
        if key == "oneOf":
            made.get("properties", {}).pop("kind", None)
            for i, branch in enumerate(made[key]):
                branch["properties"] = {**branch.get("properties", {}), "kind": {"const": f"k{i}"}}
                branch["required"] = ["kind"]
    return made


def _value(rng: random.Random, depth: int, refs: Any) -> Any:
    """A schema of a value."""
    kind = rng.randrange(18 if depth else 11)
    if kind < 2:
        return _text(rng)
    if kind < 4:
        return _number(rng)
    if kind == 4:
        return {"type": rng.choice(["boolean", "null"])}
    if kind == 5:
        return {"enum": rng.sample(["a", "1", "5", 1, 5, None, True, "true", 2.5, [1], "b c"], 3)}
    if kind == 6:
        return {"const": rng.choice(["a", "1", 1, None, False, {"k": [1]}, 0.5])}
    if kind == 7:
        return {"type": rng.sample(["string", "integer", "null", "boolean", "array"], 2)}
    if kind == 8:
        return rng.choice([True, {}, {"description": "any"}, {"minLength": 2}, {"minimum": 3}])
    if kind == 9 and refs:
        return {"$ref": rng.choice(refs)} | rng.choice([{}, {"title": "T"}, {"minLength": 1}])
    if kind <= 10:
        return {"type": "string", "nullable": True} if rng.random() < 0.5 else _text(rng)
    if kind == 11:
        return {"type": "array", "items": _value(rng, depth - 1, refs), "maxItems": 3}
    if kind == 12:
        return _arguments(rng, depth - 1, refs) | {"type": "object"}
    if kind == 13:
        return {"allOf": [_value(rng, depth - 1, refs) for _ in range(rng.randint(1, 2))]}
    if kind == 14:
        return {"oneOf": [_text(rng), _number(rng), {"type": "null"}]}
    if kind == 15:
        prefix = [_value(rng, depth - 1, refs) for _ in range(2)]
        return {"type": "array", "prefixItems": prefix, "items": False}
    return {"anyOf": [_value(rng, depth - 1, refs) for _ in range(rng.randint(1, 3))]}


def _text(rng: random.Random) -> dict[str, Any]:
    more: list[dict[str, Any]] = [
        {},
        {"minLength": 1, "maxLength": 5},
        {"pattern": "^[a-c]+$"},
        {"pattern": "1"},
        {"pattern": r"^\d{2,3}$|x", "maxLength": 4},
        {"format": rng.choice(["date", "date-time", "ipv4", "email", "uuid", "time", "unknown"])},
        {"enum": ["5", "true", "low"]},
        {"maxLength": 3},
    ]
    return {"type": "string"} | rng.choice(more)


def _number(rng: random.Random) -> dict[str, Any]:
    more: list[dict[str, Any]] = [
        {},
        {"minimum": -3, "maximum": 12},
        {"exclusiveMinimum": 0, "maximum": 100},
        {"multipleOf": 5},
        {"enum": [1, 2, 30]},
        {"maximum": 2**63 - 1},
    ]
    return {"type": rng.choice(["integer", "number"])} | rng.choice(more)
