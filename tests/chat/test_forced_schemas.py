"""Forced calls against the schemas of their tools, as `jsonschema` reads them."""

from __future__ import annotations

import json
import random
import time
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from fd_dsa.chat.grammar import forced_calls_grammar
from fd_dsa.chat.parser import TOOL_FORMATS, AnswerFormat, OutputParser
from fd_dsa.chat.schema import ToolSchema

pytest.importorskip("llguidance", reason="the extra [structured] is not installed")
from tests.chat.schema_walks import Walker, damaged, random_tool

FORMATS = ("deepseek_v31", "deepseek_v32", "deepseek_v4", "glm47")
ANY_FORMAT = pytest.mark.parametrize("tool_format", FORMATS)
WALKER = Walker()
STRING, INTEGER = {"type": "string"}, {"type": "integer"}


def arguments_of(text: str, tool_format: str, schema: Any) -> Any:
    """Arguments of the only call in an answer."""
    answer = AnswerFormat(tool_format=TOOL_FORMATS[tool_format], schemas={"f": schema})
    message = OutputParser(answer).parse(text)
    assert not message.content and len(message.tool_calls) == 1, text
    return json.loads(message.tool_calls[0].arguments)


def forced(tool_format: str, schema: Any, seed: Any = 0, num: int = 6) -> list[Any]:
    """Arguments of random calls under the grammar of a schema, each of which it allows."""
    grammar = forced_calls_grammar(tool_format, {"f": schema}, several=False)
    error = WALKER.error(grammar)
    if error:
        raise ValueError(error)
    made = []
    for n in range(num):
        text = WALKER.walk(grammar, random.Random(f"{seed} {n}"))
        if text is not None:
            made.append(arguments_of(text, tool_format, schema))
            if schema is not None:
                Draft202012Validator(schema).validate(made[-1])
    return made


def walk_random_schemas(seeds: range) -> None:
    num_walked = 0
    for seed in seeds:
        schema = random_tool(random.Random(seed))
        Draft202012Validator.check_schema(schema)
        for tool_format in FORMATS:
            try:
                num_walked += bool(forced(tool_format, schema, seed, num=1))
            except ValueError as error:
                # some combinations leave no value, or count what no grammar counts
                words = ("nsatisfiable", "that no arguments", "Properties", "cannot write", "Regex")
                assert any(word in str(error) for word in words), (schema, error)
    assert num_walked > 2 * len(seeds)


def test_calls_satisfy_random_schemas() -> None:
    walk_random_schemas(range(12))


def test_damaged_schemas_have_a_message() -> None:
    num_refused = 0
    for seed in range(200):
        rng = random.Random(seed)
        schema = damaged(random_tool(rng), rng)
        for name in ("a", "kind", "x-1"):
            ToolSchema(schema).argument_types(name)
        for tool_format in FORMATS:
            try:
                forced_calls_grammar(tool_format, {"f": schema}, several=True)
            except ValueError as error:
                assert str(error).startswith("tools: "), schema
                num_refused += 1
    assert num_refused > 200


@pytest.mark.slow
def test_calls_satisfy_many_random_schemas() -> None:
    walk_random_schemas(range(500))


@ANY_FORMAT
@pytest.mark.parametrize(
    "schema",
    [
        {
            "properties": {"start": INTEGER, "end": {"$ref": "#/properties/start"}},
            "required": ["end"],
        },
        {
            "$ref": "#/$defs/Args",
            "$defs": {"Args": {"properties": {"k": STRING}, "required": ["k"]}},
        },
        {"allOf": [{"properties": {"k": INTEGER}}, {"required": ["k"]}]},
        {"allOf": [{"properties": {"k": INTEGER}}, {"additionalProperties": {"minimum": 3}}]},
        {
            "properties": {"k": {"$ref": "#/$defs/a~1b"}},
            "$defs": {"a/b": STRING},
            "required": ["k"],
        },
        {"properties": {"$ref": STRING, "$id": INTEGER}, "required": ["$ref", "$id"]},
        {"required": ["a", "b"], "additionalProperties": INTEGER},
        {"additionalProperties": {"enum": ["x", 5]}, "maxProperties": 2},
        {"patternProperties": {"^x-[a-z]+$": INTEGER}, "additionalProperties": False},
        {
            "properties": {"x-a": True, "b": STRING},
            "patternProperties": {"^x-": INTEGER},
            "required": ["x-a"],
        },
        {"properties": {"a": INTEGER, "b": STRING}, "oneOf": [{"required": [k]} for k in "ab"]},
        {"properties": {"a": INTEGER, "b": STRING}, "minProperties": 1},
        {"oneOf": [{"properties": {"t": {"const": n}, n: INTEGER}, "required": [n]} for n in "ab"]},
        {"properties": {"a": False, "b": STRING}, "required": ["b"]},
        {"enum": [{"a": 1, "b": "x"}, {"a": "y"}, 5]},
        {"type": "object", "properties": {}},
        {"anyOf": [{"type": "null"}, {"properties": {"k": {"const": 2**53}}, "required": ["k"]}]},
    ],
)
def test_arguments_by_the_whole_schema(tool_format: str, schema: Any) -> None:
    made = forced(tool_format, schema)
    assert len(made) > 3
    assert all(made) or "required" not in json.dumps(schema)


@ANY_FORMAT
@pytest.mark.parametrize("count", [{"minProperties": 2}, {"maxProperties": 2}])
def test_numbers_of_arguments(tool_format: str, count: dict[str, int]) -> None:
    properties = {name: INTEGER for name in "abcd"}
    schema = {"properties": properties, "additionalProperties": False, "required": ["c"], **count}
    if tool_format == "deepseek_v31" and "maxProperties" in count:
        with pytest.raises(ValueError, match="'f' cannot be forced: maxProperties"):
            forced(tool_format, schema)
    else:
        assert {len(made) for made in forced(tool_format, schema, num=12)} >= {2}


def test_no_number_of_properties_that_other_schemas_list() -> None:
    """llguidance does not count optional properties, whichever schema lists them."""
    part = {"properties": {name: INTEGER for name in "abc"}}
    for schema in (
        {"maxProperties": 1, "oneOf": [part]},
        {"allOf": [{"maxProperties": 1}, {"anyOf": [part]}]},
        {"$ref": "#/$defs/one", "$defs": {"one": {"maxProperties": 1}}, **part},
        {"properties": {"k": {"minProperties": 1, "allOf": [part]}}, "required": ["k"]},
    ):
        with pytest.raises(ValueError, match="Properties: optional properties are not counted"):
            forced("deepseek_v31", schema)


@ANY_FORMAT
def test_references_mean_the_root(tool_format: str) -> None:
    schema: dict[str, Any] = {"properties": {"leaf": INTEGER, "tree": {"$ref": "#"}}}
    schema |= {"type": "object", "additionalProperties": False}
    trees = [made["tree"] for made in forced(tool_format, schema, num=30) if "tree" in made]
    assert trees and all(made.keys() <= {"leaf", "tree"} for made in trees)
    with pytest.raises(ValueError, match="have no end"):
        forced(tool_format, {**schema, "required": ["tree"]})


TEXTS: list[tuple[Any, list[Any], list[Any]]] = [
    (STRING, ["", "5", "null", "{", "a <b> c"], []),
    ({**STRING, "minLength": 2, "maxLength": 3}, ["ab", "éè!"], ["a", "abcd"]),
    ({**STRING, "pattern": "^a+$"}, ["a", "aaa"], ["b", "ab"]),
    ({**STRING, "pattern": "^a+$", "maxLength": 2}, ["a", "aa"], ["aaa", ""]),
    ({**STRING, "pattern": "[0-9]"}, ["a1b"], ["ab"]),
    ({**STRING, "format": "date"}, ["2024-02-28"], ["today", "2024-02-30"]),
    ({**STRING, "format": "no such format"}, ["x"], []),
    ({**STRING, "enum": ["a", "bcd"], "maxLength": 1}, ["a"], ["bcd"]),
    ({"const": "x"}, ["x"], ["y", 5]),
    ({"enum": ["1", 1, None]}, [1, None], [2, "x"]),
    ({"enum": ["1", True]}, ["1", True], ["true ", False]),
    ({"type": ["string", "integer"]}, ["a", "5 apples", 5, "5.5"], []),
    ({"type": ["string", "null"]}, ["a", "5", None, "nulls"], []),
    ({"type": ["string", "array"]}, ["a", [1, "x"], "5"], []),
    ({"anyOf": [STRING, {**INTEGER, "minimum": 3}]}, ["a", 5], [2]),
    ({"anyOf": [{**STRING, "maxLength": 1}, {"type": "null"}]}, ["a", None], ["ab"]),
    ({"oneOf": [{"type": "boolean"}, {"type": "array", "items": False}]}, [True, []], [[1]]),
    ({"allOf": [{"minLength": 2}, STRING]}, ["ab"], ["a", 5]),
    ({"minLength": 2}, ["ab", 5, None, [1], "5a"], ["a"]),
    ({**STRING, "nullable": True}, ["a", "5"], [None]),
    (INTEGER, [5, -3], ["x", 5.5, True]),
    ({"type": "number", "exclusiveMinimum": 0, "maximum": 2}, [0.5, 2], [0, 3]),
    ({**INTEGER, "maximum": 2**63 - 1}, [2**62, -5], [2**63]),
    ({"enum": [2**60 + 1]}, [2**60 + 1], [2**60]),
]


@pytest.mark.parametrize("tool_format", ["deepseek_v32", "glm47"])
@pytest.mark.parametrize(("of", "good", "bad"), TEXTS)
def test_values_as_they_are(tool_format: str, of: Any, good: list[Any], bad: list[Any]) -> None:
    """The value of one argument, written as the models write it."""
    schema = {"properties": {"k": of}, "required": ["k"]}
    if tool_format == "deepseek_v32" and of == {"enum": [2**60 + 1]}:
        with pytest.raises(ValueError, match="argument 'k': enum: 1152921504606846977 is beyond"):
            forced_calls_grammar(tool_format, {"f": schema}, several=False)
        return
    grammar = forced_calls_grammar(tool_format, {"f": schema}, several=False)
    assert not WALKER.error(grammar)
    for value in (*good, *bad):
        is_text = isinstance(value, str)
        text = value if is_text else json.dumps(value)
        call = f"<tool_call>f<arg_key>k</arg_key><arg_value>{text}</arg_value></tool_call>"
        if tool_format == "deepseek_v32":
            call = (
                '\n\n<｜DSML｜function_calls>\n<｜DSML｜invoke name="f">\n'
                f'<｜DSML｜parameter name="k" string="{str(is_text).lower()}">{text}'
                "</｜DSML｜parameter>\n</｜DSML｜invoke>\n</｜DSML｜function_calls>"
            )
        assert WALKER.accepts(grammar, call) == (value in good), value
        if value in good:
            made = arguments_of(call, tool_format, schema)["k"]
            assert made == value and type(made) is type(value)


def test_numbers_with_bounds_next_to_texts() -> None:
    """Texts of one alternative leave the numbers of another one readable."""
    of_any = [{"properties": {"v": of}, "required": ["v"]} for of in (STRING, {"minimum": 3})]
    grammar = forced_calls_grammar("glm47", {"f": {"anyOf": of_any}}, several=False)
    call = "<tool_call>f<arg_key>v</arg_key><arg_value>{}</arg_value></tool_call>"
    for text, allowed in (("5", True), ("2", False), ("a 5", True), ("[5]", True)):
        assert WALKER.accepts(grammar, call.format(text)) is allowed, text


def test_alternatives_of_glm_keep_their_types() -> None:
    """A text that the parser would read as another alternative's number is no text."""
    kinds = {"a": {"enum": ["5", "x"]}, "b": INTEGER}
    schema = {
        "oneOf": [
            {"properties": {"kind": {"const": kind}, "v": of}, "required": ["kind", "v"]}
            for kind, of in kinds.items()
        ]
    }
    grammar = forced_calls_grammar("glm47", {"f": schema}, several=False)
    head = "<tool_call>f<arg_key>kind</arg_key><arg_value>{}</arg_value><arg_key>v</arg_key>"
    value = "<arg_value>{}</arg_value></tool_call>"
    allowed = {
        (kind, of)
        for kind in "ab"
        for of in ("5", "x")
        if WALKER.accepts(grammar, head.format(kind) + value.format(of))
    }
    assert allowed == {("a", "x"), ("b", "5")}


@ANY_FORMAT
@pytest.mark.parametrize(
    ("of", "message"),
    [
        ({"not": STRING}, "not: a grammar cannot enforce it"),
        ({"type": "array", "uniqueItems": True}, "uniqueItems: "),
        ({"type": "array", "contains": INTEGER}, "contains: "),
        ({"if": INTEGER, "then": {"minimum": 3}}, "if: "),
        ({"type": "object", "dependentRequired": {"a": ["b"]}}, "dependentRequired: "),
        ({"type": "object", "propertyNames": {"maxLength": 3}}, "propertyNames: "),
        ({"type": "object", "unevaluatedProperties": False}, "unevaluatedProperties: "),
        ({"oneOf": [STRING, {"minLength": 3}]}, "oneOf: its alternatives may overlap"),
        ({"type": "number", "multipleOf": 0.01}, "multipleOf: got 0.01; must be"),
        ({**STRING, "pattern": "(?=x)"}, "pattern: got "),
        ({"enum": [{"k": "a\x00"}]}, "enum: .* has the control character U\\+0000"),
        ({"type": "text"}, 'type: got "text"; must be one of array'),
        ({"$ref": "https://example.com/a"}, r"\$ref: got .* must be a pointer"),
        ({"$id": "https://example.com/a", **STRING}, r"\$id: "),
        ({**STRING, "minLength": "3"}, 'minLength: got "3"; must be of type int'),
        ({"type": "object", "minProperties": 3}, "minProperties: "),
        ({"$ref": "#/$defs/loop"}, "reference that leads to itself|nested more than"),
        (5, "got 5; must be a JSON schema"),
    ],
)
def test_refusals_name_the_tool_and_the_keyword(tool_format: str, of: Any, message: str) -> None:
    schema = {"properties": {"k": of}, "$defs": {"loop": {"$ref": "#/$defs/loop"}}}
    where = "" if tool_format == "deepseek_v31" else "argument 'k': "
    with pytest.raises(
        ValueError, match=f"parameters of 'f' cannot be forced: {where}.*({message})"
    ):
        forced_calls_grammar(tool_format, {"f": schema}, several=False)
    # parts that no argument refers to matter to nobody
    forced_calls_grammar(tool_format, {"f": {"properties": {}, "$defs": {"k": of}}}, several=False)


@pytest.mark.parametrize(
    ("tool_format", "name"),
    [
        *(("deepseek_v32", name) for name in ('a"', "a>", "a\nb", "a" * 129, "")),
        *(("glm47", name) for name in ("a<b", " a", "a" * 65, "")),
    ],
)
def test_names_that_a_format_cannot_write(tool_format: str, name: str) -> None:
    schema = {"properties": {name: INTEGER, "k": INTEGER}, "required": ["k"]}
    assert all(made.keys() == {"k"} for made in forced(tool_format, schema))
    with pytest.raises(ValueError, match="the model's format cannot write"):
        forced(tool_format, {**schema, "required": [name]})
    assert all(name in made for made in forced("deepseek_v31", {**schema, "required": [name]}))


@ANY_FORMAT
@pytest.mark.parametrize("schema", [False, {"type": "array"}, {"allOf": [{"const": 5}]}])
def test_schemas_of_no_object(tool_format: str, schema: Any) -> None:
    with pytest.raises(ValueError, match="'f' cannot be forced: got a schema that no arguments"):
        forced_calls_grammar(tool_format, {"f": schema}, several=False)


@ANY_FORMAT
def test_definitions_are_written_once(tool_format: str) -> None:
    defs = {"big": {"enum": [f"value {i}" for i in range(1000)]}}
    properties = {f"p{i}": {"$ref": "#/$defs/big", "description": f"{i}"} for i in range(24)}
    schema = {"properties": properties, "$defs": defs}
    grammar = forced_calls_grammar(tool_format, {"f": schema}, several=False)
    assert grammar.count("value 999") == 1


@ANY_FORMAT
@pytest.mark.parametrize("num", [2_000, 20_000])
def test_large_schemas_end_early(tool_format: str, num: int) -> None:
    """The text of a grammar stops at its limit, and costs no more than reading the schema."""
    of = {"type": "object", "properties": {f"q{i}": {**INTEGER, "minimum": i} for i in range(num)}}
    names = [f"p{i}" for i in range(num)]
    for schema in (
        {"properties": {name: {"$ref": "#/$defs/b"} for name in names}, "$defs": {"b": of}},
        {"properties": {name: INTEGER for name in names}, "required": names},
        {"allOf": [{"properties": {name: INTEGER}} for name in names]},
        {"anyOf": [{"properties": {name: INTEGER}} for name in names]},
        {"properties": {"k": {"oneOf": [{**of, "required": [name]} for name in names]}}},
    ):
        begin = time.process_time()
        with pytest.raises(ValueError, match=r"at most 32768|more than|overlap|too much"):
            forced_calls_grammar(tool_format, {"f": schema}, several=False)
        assert time.process_time() - begin < 2
