"""Types of arguments by the schemas of tools, as the parser of answers needs them."""

from __future__ import annotations

import json
import random
import time
from typing import Any

import pytest

from fd_dsa.chat.parser import TOOL_FORMATS, AnswerFormat, OutputParser
from fd_dsa.chat.schema import SchemaError, ToolSchema

STRING, INTEGER = {"type": "string"}, {"type": "integer"}
ROOT: dict[str, Any] = {
    "type": "object",
    "properties": {
        "start": STRING,
        "same": {"$ref": "#/properties/start"},
        "slash": {"$ref": "#/$defs/a~1b"},
        "tilde": {"$ref": "#/$defs/t~0e"},
        "percent": {"$ref": "#/$defs/%C3%B6%20%25"},
        "listed": {"$ref": "#/$defs/list/anyOf/1"},
        "old": {"$ref": "#/definitions/old"},
        "all": {"allOf": [STRING]},
        "cut": {"allOf": [{"type": ["string", "null"]}, {"type": ["string", "integer"]}]},
        "any": {"anyOf": [STRING, {"type": "null"}]},
        "one": {"oneOf": [{"$ref": "#/$defs/a~1b"}, {"type": "boolean"}]},
        "beside": {"$ref": "#/$defs/any", "type": "string"},
        "const": {"const": "x"},
        "enum": {"type": ["string", "null"], "enum": ["a", "b"]},
        "number": {"type": "number"},
        "nullable": {"allOf": [{"$ref": "#/properties/start"}], "nullable": True},
        "tree": {"$ref": "#"},
        "loop": {"$ref": "#/$defs/loop"},
        "true": True,
        "remote": {"$ref": "https://example.com/a.json"},
        "anchor": {"$ref": "#name"},
        "based": {"$id": "https://example.com/b.json", "$ref": "#/$defs/any"},
        "$ref": INTEGER,
    },
    "patternProperties": {"^x-": INTEGER},
    "additionalProperties": {"type": "boolean"},
    "$defs": {
        "a/b": STRING,
        "t~e": STRING,
        "ö %": STRING,
        "list": {"anyOf": [INTEGER, STRING]},
        "any": True,
        "loop": {"anyOf": [{"$ref": "#/$defs/loop"}, STRING]},
    },
    "definitions": {"old": STRING},
}


@pytest.mark.parametrize(
    ("name", "types"),
    [
        *((n, {"string"}) for n in ("start", "same", "slash", "tilde", "percent", "listed", "old")),
        *((n, {"string"}) for n in ("all", "cut", "beside", "const", "enum")),
        ("any", {"string", "null"}),
        ("one", {"string", "boolean"}),
        ("number", {"number", "integer"}),
        ("nullable", {"string", "null"}),
        ("tree", {"object"}),
        *((n, set()) for n in ("loop", "true", "remote", "anchor", "based")),
        ("$ref", {"integer"}),
        ("x-rate", {"integer"}),
        ("another", {"boolean"}),
    ],
)
def test_types_of_arguments(name: str, types: set[str]) -> None:
    assert ToolSchema(ROOT).argument_types(name) == types
    # the same as one of several parts
    assert ToolSchema({"allOf": [{}, ROOT], **ROOT}).argument_types(name) == types


def test_alternatives_of_arguments() -> None:
    """An argument has the types that any alternative of objects gives it."""
    of_any = {"anyOf": [{"properties": {"k": STRING}}, {"properties": {"k": INTEGER}}]}
    assert ToolSchema(of_any).argument_types("k") == {"string", "integer"}
    assert ToolSchema({**of_any, "properties": {"k": STRING}}).argument_types("k") == {"string"}
    no_object = {"oneOf": [{"type": "null"}, {"properties": {"k": STRING}}]}
    assert ToolSchema(no_object).argument_types("k") == {"string"}
    assert (
        ToolSchema({"properties": {}, "additionalProperties": False}).argument_types("k") == set()
    )


@pytest.mark.parametrize("schema", [None, True, False, [], "x", {"properties": 5}, {"allOf": {}}])
def test_schemas_that_say_nothing(schema: Any) -> None:
    assert ToolSchema(schema).argument_types("k") == set()
    assert ToolSchema(schema).argument_names() == ToolSchema(schema).required_names() == set()


def test_names_of_arguments() -> None:
    base = {"properties": {"a": True}, "required": ["a"]}
    of_any = [{"properties": {"b": True}, "required": ["b"]}, {"required": ["c"]}]
    schema = ToolSchema({"$ref": "#/$defs/B", "anyOf": of_any, "$defs": {"B": base}})
    assert schema.argument_names() == {"a", "b", "c"}
    assert schema.required_names() == {"a"}


@pytest.mark.parametrize(
    "reference",
    ["#/$defs/no", "#/properties", "#/$defs/list/anyOf/2", "#/$defs/list/anyOf/01", "#name", 5],
)
def test_references_to_nothing(reference: Any) -> None:
    with pytest.raises(SchemaError, match=r"\$ref: got"):
        ToolSchema({**ROOT, "properties": []}).target(reference)


def test_references_to_the_root() -> None:
    assert ToolSchema(ROOT).target("#") is ROOT
    assert ToolSchema({"": STRING}).target("#/") is STRING


def wrapped(of: dict[str, Any], rng: random.Random, defs: dict[str, Any]) -> dict[str, Any]:
    """A schema of the same values, written in another way."""
    for _ in range(rng.randint(0, 4)):
        name = rng.choice(["n", "a/b", "~", "é"]) + str(len(defs))
        pointer = name.replace("~", "~0").replace("/", "~1")
        defs[name] = of
        of = rng.choice(
            [
                {"$ref": f"#/$defs/{pointer}"},
                {"allOf": [of]},
                {"allOf": [{"description": "d"}, {"$ref": f"#/$defs/{pointer}"}]},
                {"anyOf": [of, {"$ref": f"#/$defs/{pointer}"}]},
                {"oneOf": [of, False]},
                {"$ref": f"#/$defs/{pointer}", "title": "t"},
                {"allOf": [of, True], "description": "d"},
            ]
        )
    return of


def test_values_of_glm_have_the_declared_type() -> None:
    rng = random.Random(0)
    for _ in range(300):
        kind = rng.choice(["string", "integer", "boolean", "null", "number", "array", "object"])
        defs: dict[str, Any] = {}
        schema: dict[str, Any] = {"properties": {"k": wrapped({"type": kind}, rng, defs)}}
        schema = wrapped(schema, rng, defs) | {"$defs": defs}
        texts = {"integer": "12345", "boolean": "true", "null": "null", "number": "0.5"}
        texts |= {"array": "[1]", "object": '{"a": 1}'}
        text = rng.choice([*texts.values(), "a b"]) if kind == "string" else texts[kind]
        answer = AnswerFormat(tool_format=TOOL_FORMATS["glm47"], schemas={"f": schema})
        call = f"<tool_call>f<arg_key>k</arg_key><arg_value>{text}</arg_value></tool_call>"
        (made,) = OutputParser(answer).parse(call).tool_calls
        meant = text if kind == "string" else json.loads(text)
        assert json.loads(made.arguments) == {"k": meant}, (schema, text)


@pytest.mark.parametrize("keyword", ["anyOf", "oneOf", "allOf"])
def test_alternatives_are_visited_once(keyword: str) -> None:
    """150 alternatives on each of four levels are 600, not 150 ** 4."""
    defs: dict[str, Any] = {
        f"l{i}": {keyword: [{"$ref": f"#/$defs/l{i + 1}"} for _ in range(150)]} for i in range(4)
    }
    defs["l4"] = STRING
    schema = {"properties": {"k": {"$ref": "#/$defs/l0"}}, "$defs": defs}
    begin = time.process_time()
    assert ToolSchema(schema).argument_types("k") == {"string"}
    root = {"$ref": "#/$defs/l0", "$defs": {**defs, "l4": {"properties": {"k": STRING}}}}
    assert ToolSchema(root).argument_types("k") == {"string"}
    assert time.process_time() - begin < 1


def test_deep_schemas_have_no_types() -> None:
    chain: dict[str, Any] = {f"c{i}": {"$ref": f"#/$defs/c{i + 1}"} for i in range(5_000)}
    schema = {"properties": {"k": {"$ref": "#/$defs/c0"}}, "$defs": {**chain, "c5000": STRING}}
    assert ToolSchema(schema).argument_types("k") == set()
