"""Arguments of forced calls that contain marks, or have a name twice."""

from __future__ import annotations

import json
from typing import Any

import pytest

from fd_dsa.chat.events import join_events
from fd_dsa.chat.grammar import forced_calls_grammar
from fd_dsa.chat.parser import TOOL_FORMATS, AnswerFormat, OutputParser

pytest.importorskip("llguidance", reason="the extra [structured] is not installed")
from tests.chat.test_forced_schemas import INTEGER, STRING, WALKER, arguments_of

MARKED = {"a</arg_value></tool_call>": ["</｜DSML｜parameter></｜DSML｜invoke>", '"</arg_value>\\']}
CALLS = {
    "deepseek_v32": (
        '\n\n<｜DSML｜function_calls>\n<｜DSML｜invoke name="f">\n{}</｜DSML｜invoke>\n'
        "</｜DSML｜function_calls>",
        '<｜DSML｜parameter name="{}" string="false">{}</｜DSML｜parameter>\n',
    ),
    "glm47": ("<tool_call>f{}</tool_call>", "<arg_key>{}</arg_key><arg_value>{}</arg_value>"),
}


def call_with(tool_format: str, *arguments: tuple[str, Any]) -> str:
    """A call with arguments that are JSON."""
    call, argument = CALLS[tool_format]
    made = [argument.format(k, json.dumps(v, ensure_ascii=False)) for k, v in arguments]
    return call.format("".join(made))


@pytest.mark.parametrize("tool_format", CALLS)
@pytest.mark.parametrize("of", [{"type": "object"}, {"type": ["string", "object"]}, {"minimum": 3}])
def test_marks_in_strings_of_json(tool_format: str, of: Any) -> None:
    schema = {"properties": {"k": of}, "required": ["k"], "type": "object"}
    grammar = forced_calls_grammar(tool_format, {"f": schema}, several=False)
    text = call_with(tool_format, ("k", MARKED))
    assert WALKER.accepts(grammar, text)
    assert arguments_of(text, tool_format, schema) == {"k": MARKED}


def test_a_text_is_no_beginning_of_json() -> None:
    """Without a type GLM's parser reads JSON too, where an open string goes on after a mark."""
    grammar = forced_calls_grammar("glm47", {"f": {"properties": {"k": {}}}}, several=False)
    call = "<tool_call>f<arg_key>k</arg_key><arg_value>{}</arg_value></tool_call>"
    for text, allowed in (('["', False), (' {"a', False), ('["a"', True), ('[a](b) "', True)):
        assert WALKER.accepts(grammar, call.format(text)) is allowed, text


@pytest.mark.parametrize("tool_format", CALLS)
@pytest.mark.parametrize(
    ("schema", "values"),
    [
        ({"type": "object"}, (1, [2], {"a": 3})),
        ({"additionalProperties": INTEGER, "minProperties": 1}, (1, 2, 3)),
        ({"patternProperties": {"^[xy]$": {}}, "additionalProperties": False}, (1, 2, None)),
    ],
)
def test_the_last_value_of_a_repeated_name_counts(
    tool_format: str, schema: Any, values: tuple[Any, ...]
) -> None:
    grammar = forced_calls_grammar(tool_format, {"f": schema}, several=False)
    text = call_with(tool_format, *zip("xyx", values, strict=True))
    assert WALKER.accepts(grammar, text)
    answer = AnswerFormat(tool_format=TOOL_FORMATS[tool_format], schemas={"f": schema})
    one, pairs = OutputParser(answer), dict(zip("yx", values[1:], strict=True))
    events = [event for char in text for event in one.feed(char)]
    (call,) = join_events(events + one.finish()).tool_calls
    assert json.loads(call.arguments, object_pairs_hook=list)[1:] == [("y", values[1])]
    assert json.loads(call.arguments) == pairs


@pytest.mark.parametrize("tool_format", CALLS)
def test_no_name_is_repeated_if_the_schema_names_arguments(tool_format: str) -> None:
    schema = {"anyOf": [{"properties": {"a": STRING}, "required": ["a"]}, {"minProperties": 1}]}
    grammar = forced_calls_grammar(tool_format, {"f": schema}, several=False)
    assert WALKER.accepts(grammar, call_with(tool_format, ("x", 1)))
    assert not WALKER.accepts(grammar, call_with(tool_format, ("x", 1), ("x", 2)))


def test_texts_of_any_name() -> None:
    """A map of strings may have any text."""
    schema = {"type": "object", "additionalProperties": STRING}
    grammar = forced_calls_grammar("glm47", {"f": schema}, several=False)
    text = call_with("glm47", ("PORT", 8080), ("x", {"a": None}))
    assert WALKER.accepts(grammar, text)
    assert arguments_of(text, "glm47", schema) == {"PORT": "8080", "x": '{"a": null}'}
