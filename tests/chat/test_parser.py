"""Answers in the models' formats, whole and in pieces."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fd_dsa.chat.events import Event, Message, ToolCall, join_events
from fd_dsa.chat.parser import TOOL_FORMATS, AnswerFormat, OutputParser
from tests.chat.recorded import RECORDED, SCHEMAS, Recorded

V31, V32, V4, GLM = "deepseek_v31", "deepseek_v32", "deepseek_v4", "glm47"
# what answers are made of in the property test: markers, parts of them and other text
_ALPHABET = sorted(
    {token for one in RECORDED.values() for token in one.tokens}
    | {"<", "｜", "{", "}", " ", "\n", "<think>", "a", '"'}
)


def parser(tool_format: str | None, in_reasoning: bool = False) -> OutputParser:
    """A parser for one answer."""
    known = None if tool_format is None else TOOL_FORMATS[tool_format]
    return OutputParser(AnswerFormat(True, in_reasoning, known, SCHEMAS))


def in_pieces(one: OutputParser, pieces: list[str]) -> Message:
    """The message of an answer that comes in pieces; events must be in a sensible order."""
    events = [event for piece in pieces for event in one.feed(piece)] + one.finish()
    running: int | None = None
    for event in events:
        if event.kind == "call":
            running = event.index
        elif event.kind == "arguments":
            assert event.index == running
        elif event.kind == "call_end":
            assert event.index == running
            running = None
        assert event.text or event.kind == "call_end"
    return join_events(events)


@pytest.mark.parametrize("recorded", RECORDED.values(), ids=RECORDED)
def test_whole_token_by_token_and_character_by_character(recorded: Recorded) -> None:
    for pieces in ([recorded.text], list(recorded.tokens), list(recorded.text)):
        one = parser(recorded.tool_format, recorded.in_reasoning)
        assert in_pieces(one, pieces) == recorded.message
    for call in recorded.message.tool_calls:
        assert isinstance(json.loads(call.arguments), dict)


@pytest.mark.parametrize("recorded", RECORDED.values(), ids=RECORDED)
def test_cut_off_at_every_character(recorded: Recorded) -> None:
    """An answer that ends anywhere is parsed alike, whole and in pieces, and keeps its calls."""
    for end in range(len(recorded.text)):
        text = recorded.text[:end]
        whole = parser(recorded.tool_format, recorded.in_reasoning).parse(text)
        one = parser(recorded.tool_format, recorded.in_reasoning)
        assert in_pieces(one, list(text)) == whole
        for call, full in zip(whole.tool_calls, recorded.message.tool_calls, strict=False):
            assert call.name == full.name
            assert full.arguments.startswith(call.arguments)
        if whole.tool_calls:
            # GLM's calls have no frame around them, so half a marker after one may still be text
            rest = whole.content.removeprefix(recorded.message.content)
            assert "<tool_call>".startswith(rest)


@settings(max_examples=300, deadline=None)
@given(
    tool_format=st.sampled_from([V31, V32, V4, GLM, None]),
    tokens=st.lists(st.sampled_from(_ALPHABET), max_size=40),
    in_reasoning=st.booleans(),
    data=st.data(),
)
def test_any_text_in_any_pieces(
    tool_format: str | None, tokens: list[str], in_reasoning: bool, data: st.DataObject
) -> None:
    text = "".join(tokens)
    whole = parser(tool_format, in_reasoning).parse(text)
    cuts = sorted(data.draw(st.sets(st.integers(0, len(text)), max_size=8)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert in_pieces(parser(tool_format, in_reasoning), pieces) == whole
    if tool_format is None:
        assert whole.tool_calls == ()


def test_content_comes_as_soon_as_it_cannot_be_markup() -> None:
    one = parser(V31)
    assert one.feed("Ab") == [Event("content", "Ab")]
    assert one.feed("c <") == [Event("content", "c ")]
    assert one.feed("b> <｜tool▁") == [Event("content", "<b> ")]
    assert one.feed("calls▁begin｜><｜tool▁call▁begin｜>f") == []
    assert one.feed('<｜tool▁sep｜>{"a') == [Event("call", "f"), Event("arguments", '{"a')]
    assert one.feed('": 1}') == [Event("arguments", '": 1}')]
    assert one.feed("<｜tool▁call▁end｜>") == [Event("call_end")]
    assert one.finish() == []


def test_texts_of_arguments_are_streamed() -> None:
    dsml = f'<｜DSML｜function_calls>{_INVOKE}<｜DSML｜parameter name="city" string="true">'
    glm = "<tool_call>get_weather<arg_key>city</arg_key><arg_value>"
    for text, tool_format in ((dsml, V32), (glm, GLM)):
        one = parser(tool_format)
        assert join_events(one.feed(text)).tool_calls[0].arguments == '{"city": "'
        assert one.feed('a "b"\n') == [Event("arguments", 'a \\"b\\"\\n')]


def test_reasoning_only_where_it_may_be() -> None:
    assert parser(None).parse("<think>a</think>b") == Message("b", "a")
    assert parser(None).parse(" \n<think>a</think>b") == Message("b", "a")
    far = " " * 100 + "<think>a</think>"
    assert parser(None).parse(far) == in_pieces(parser(None), list(far)) == Message(far)
    assert parser(None).parse("b <think>a</think>") == Message("b <think>a</think>")
    assert parser(None, True).parse("a") == Message("", "a")
    assert parser(None, True).parse("a</think>") == Message("", "a")
    assert parser(None, True).parse("a</think>b</think>") == Message("b</think>", "a")
    off = OutputParser(AnswerFormat())
    assert off.parse("<think>a</think>b") == Message("<think>a</think>b")
    assert parser(None, True).feed("a</think") == [Event("reasoning", "a")]


def test_a_call_inside_of_reasoning_that_was_not_closed_is_a_call() -> None:
    text = "so<tool_call>now</tool_call>"
    assert parser(GLM, True).parse(text) == Message("", "so", (ToolCall("now", "{}"),))
    assert parser(None, True).parse(text) == Message("", text)


def test_without_a_format_markup_is_text() -> None:
    for one in RECORDED.values():
        if not one.in_reasoning and "<think>" not in one.text:
            assert parser(None).parse(one.text) == Message(one.text)


_INVOKE = '<｜DSML｜invoke name="f">'
_PARAMETER = '<｜DSML｜parameter name="k" string="false">'
_V31_CALL = "<｜tool▁call▁begin｜>f<｜tool▁sep｜>{}<｜tool▁call▁end｜>"
_DSML_END = "</｜DSML｜invoke></｜DSML｜function_calls>"


@pytest.mark.parametrize(
    ("tool_format", "text", "content", "arguments"),
    [
        # no call at all: everything comes back
        (V31, "<｜tool▁calls▁begin｜>", None, None),
        (V31, "<｜tool▁calls▁begin｜>x<｜tool▁calls▁end｜>", None, None),
        (V31, "a<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>f", None, None),
        (V31, "<｜tool▁call▁begin｜>f<｜tool▁call▁end｜>b", None, None),
        (V31, "<｜tool▁call▁begin｜><｜tool▁sep｜>{}<｜tool▁call▁end｜>", None, None),
        (V32, "\n\n<｜DSML｜function_calls>", None, None),
        (V32, "<｜DSML｜function_calls>x</｜DSML｜function_calls>", None, None),
        (V4, "<｜DSML｜tool_calls>x</｜DSML｜tool_calls>", None, None),
        (V32, "<｜DSML｜function_calls><｜DSML｜invoke>y", None, None),
        (V32, '<｜DSML｜function_calls><｜DSML｜invoke name="f"', None, None),
        (GLM, "a <tool_call> b", None, None),
        (GLM, '\n<tool_call>{"name": "f"}</tool_call>', None, None),
        (GLM, "<tool_call>two words<arg_key>", None, None),
        # a call that goes wrong after its name
        (V31, "<｜tool▁call▁begin｜>f<｜tool▁sep｜>{no json<｜tool▁call▁end｜>", "", "{no json"),
        (V31, "<｜tool▁call▁begin｜>f<｜tool▁sep｜> <｜tool▁calls▁end｜>", "", "{}"),
        (V31, '<｜tool▁call▁begin｜>f<｜tool▁sep｜>{"a"', "", '{"a"'),
        (V32, f"<｜DSML｜function_calls>{_INVOKE}\n{{\"k\": 1}}{_DSML_END}", "", '{"k": 1}'),
        (V32, f"<｜DSML｜function_calls>{_INVOKE}?{_DSML_END}", "?", "{}"),
        (
            V32,
            f"<｜DSML｜function_calls>{_INVOKE}{_PARAMETER}NaN</｜DSML｜parameter>{_DSML_END}",
            "",
            '{"k": "NaN"}',
        ),
        (V32, f"<｜DSML｜function_calls>{_INVOKE}{_PARAMETER}[1", "", '{"k": '),
        (
            V32,
            f"<｜DSML｜function_calls>{_INVOKE}"
            f"<｜DSML｜parameter k>1</｜DSML｜parameter>{_DSML_END}",
            "<｜DSML｜parameter k>1</｜DSML｜parameter>",
            "{}",
        ),
        (V32, f"<｜DSML｜function_calls>{_INVOKE}</｜DSML｜function_calls>", "", "{}"),
        (GLM, "<tool_call>f<arg_key>k</arg_key>v</tool_call>", "<arg_key>k</arg_key>v", "{}"),
        # cut off inside of a call, or inside of a further one: no markup is content
        (V32, f'<｜DSML｜function_calls>{_INVOKE}<｜DSML｜parameter name="k', "", ""),
        (V32, f"<｜DSML｜function_calls>{_INVOKE}</｜DSML｜invoke>\n<｜DSML｜inv", "", "{}"),
        (V32, f'<｜DSML｜function_calls>{_INVOKE}</｜DSML｜invoke>{_INVOKE[:-3]}', "", "{}"),
        (V31, f"{_V31_CALL}<｜tool▁ca", "", "{}"),
        (V31, f"{_V31_CALL}<｜tool▁call▁begin｜>g", "", "{}"),
        (GLM, "<tool_call>f<arg_key>k", "", ""),
        (GLM, "<tool_call>f</tool_call>\n<tool_call>g", "", "{}"),
        (GLM, "<tool_call>f</tool_call> \n then", "then", "{}"),
    ],
)  # fmt: skip
def test_malformed_answers(
    tool_format: str, text: str, content: str | None, arguments: str | None
) -> None:
    message = parser(tool_format).parse(text)
    assert message.content == (text if content is None else content)
    assert [call.arguments for call in message.tool_calls] == (
        [] if arguments is None else [arguments]
    )
    assert in_pieces(parser(tool_format), list(text)) == message


@pytest.mark.parametrize(
    ("value", "schema", "expected"),
    [
        ("5", {"type": "string"}, '"5"'),
        (" x ", {"type": "string"}, '" x "'),
        ("5", {"type": "integer"}, "5"),
        ("five", {"type": "integer"}, '"five"'),
        ("5", {"type": ["string", "integer"]}, "5"),
        ("5.0", {"type": ["string", "integer"]}, '"5.0"'),
        ("5", {"anyOf": [{"type": "string"}, {"type": "number"}]}, "5"),
        ("null", {"type": ["string", "null"]}, "null"),
        ("true", {"type": ["string", "null"]}, '"true"'),
        ("5", {"enum": ["5", "6"]}, '"5"'),
        ("5", {"const": "5"}, '"5"'),
        ("5", {"$ref": "#/$defs/text"}, '"5"'),
        ("5", {"$ref": "#/$defs/loop"}, "5"),
        ("5", {"$ref": "#/$defs/none"}, "5"),
        ("5", {"anyOf": [{"type": "string"}, {}]}, "5"),
        ("5", {}, "5"),
        ('{"a": [1, 2]}', None, '{"a": [1, 2]}'),
        ("Infinity", None, '"Infinity"'),
        ("a b", None, '"a b"'),
        ("[" * 5000, None, '"' + "[" * 5000 + '"'),
    ],
)
def test_types_of_glms_values(value: str, schema: object, expected: str) -> None:
    definitions = {"text": {"type": "string"}, "loop": {"$ref": "#/$defs/loop"}}
    schemas = {"f": {"properties": {"k": schema}, "$defs": definitions}}
    one = OutputParser(AnswerFormat(tool_format=TOOL_FORMATS[GLM], schemas=schemas))
    text = f"<tool_call>f<arg_key>k</arg_key><arg_value>{value}</arg_value></tool_call>"
    assert one.parse(text).tool_calls == (ToolCall("f", f'{{"k": {expected}}}'),)


@pytest.mark.parametrize("schemas", [{}, {"f": None}, {"f": []}, {"f": {"properties": 3}}])
def test_schemas_that_say_nothing(schemas: dict[str, object]) -> None:
    one = OutputParser(AnswerFormat(tool_format=TOOL_FORMATS[GLM], schemas=schemas))
    text = "<tool_call>f<arg_key>k</arg_key><arg_value>1</arg_value></tool_call>"
    assert one.parse(text).tool_calls == (ToolCall("f", '{"k": 1}'),)
