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


def in_pieces(one: OutputParser, pieces: list[str], *, is_cut: bool = False) -> Message:
    """The message of an answer that comes in pieces; events must be in a sensible order."""
    events = [event for piece in pieces for event in one.feed(piece)] + one.finish(is_cut=is_cut)
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
        whole = parser(recorded.tool_format, recorded.in_reasoning).parse(text, is_cut=True)
        one = parser(recorded.tool_format, recorded.in_reasoning)
        assert in_pieces(one, list(text), is_cut=True) == whole
        for call, full in zip(whole.tool_calls, recorded.message.tool_calls, strict=False):
            assert call.name == full.name
            assert full.arguments.startswith(call.arguments)
        if whole.tool_calls:
            assert whole.content == recorded.message.content


@st.composite
def texts(draw: st.DrawFn) -> list[str]:
    """Parts of recorded answers with other tokens between them, as models make their mistakes."""
    pieces: list[str] = []
    for recorded in draw(st.lists(st.sampled_from(list(RECORDED.values())), max_size=6)):
        begin = draw(st.integers(0, len(recorded.tokens) - 1))
        pieces += recorded.tokens[begin : begin + draw(st.integers(1, 12))]
        pieces += draw(st.lists(st.sampled_from(_ALPHABET), max_size=3))
    return pieces


@settings(max_examples=300, deadline=None)
@given(
    tool_format=st.sampled_from([V31, V32, V4, GLM, None]),
    tokens=texts(),
    in_reasoning=st.booleans(),
    is_cut=st.booleans(),
    data=st.data(),
)
def test_any_text_in_any_pieces(
    tool_format: str | None,
    tokens: list[str],
    in_reasoning: bool,
    is_cut: bool,
    data: st.DataObject,
) -> None:
    text = "".join(tokens)
    whole = parser(tool_format, in_reasoning).parse(text, is_cut=is_cut)
    cuts = sorted(data.draw(st.sets(st.integers(0, len(text)), max_size=8)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert in_pieces(parser(tool_format, in_reasoning), pieces, is_cut=is_cut) == whole
    if tool_format is None:
        assert whole.tool_calls == ()


def test_content_comes_as_soon_as_it_cannot_be_markup() -> None:
    one = parser(V31)
    assert one.feed("Ab") == [Event("content", "Ab")]
    assert one.feed("c <") == [Event("content", "c ")]
    assert one.feed("b> <｜tool▁") == [Event("content", "<b> ")]
    assert one.feed("calls▁begin｜><｜tool▁call▁begin｜>f") == []
    assert one.feed('<｜tool▁sep｜>{"a": 1}') == []
    assert one.feed("<｜tool▁call▁end｜>") == [
        Event("call", "f"),
        Event("arguments", '{"a": 1}'),
        Event("call_end"),
    ]
    assert one.finish() == []


_LONG = "go " * 1000


@pytest.mark.parametrize(
    ("tool_format", "begin"),
    [
        (V31, '<｜tool▁call▁begin｜>f<｜tool▁sep｜>{"city": "'),
        (V32, '<｜DSML｜invoke name="f"><｜DSML｜parameter name="city" string="true">'),
        (GLM, "<tool_call>get_weather<arg_key>city</arg_key><arg_value>"),
    ],
)
def test_texts_of_long_calls_are_streamed(tool_format: str, begin: str) -> None:
    one = parser(tool_format)
    assert one.feed(begin + _LONG[:1000]) == []
    assert join_events(one.feed(_LONG[1000:])).tool_calls[0].arguments == f'{{"city": "{_LONG}'
    assert one.feed("a\nb") == [Event("arguments", "a\\nb")]


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


_NOW = (ToolCall("now", "{}"),)


@pytest.mark.parametrize(
    ("tool_format", "text", "message"),
    [
        # models forget the end of the reasoning
        (GLM, "so<tool_call>now</tool_call>", Message("", "so", _NOW)),
        (GLM, "so<tool_call>now</tool_call>then", Message("then", "so", _NOW)),
        (
            V31,
            "so<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>now<｜tool▁sep｜>{}<｜tool▁call▁end｜>"
            "<｜tool▁calls▁end｜>",
            Message("", "so", _NOW),
        ),
        (GLM, "<tool_call>now</tool_call><tool_call>now</tool_call>", Message("", "", _NOW * 2)),
        # the reasoning speaks of marks and calls
        (GLM, "What <tool_call> means.</think>Hi", Message("Hi", "What <tool_call> means.")),
        (
            GLM,
            "<tool_call>now</tool_call> or not?</think>Hi",
            Message("Hi", "<tool_call>now</tool_call> or not?"),
        ),
        (
            GLM,
            "<tool_call>f<arg_key>a</arg_key><arg_value></think>Hi</arg_value></tool_call>",
            Message("Hi</arg_value></tool_call>", "<tool_call>f<arg_key>a</arg_key><arg_value>"),
        ),
        (
            GLM,
            f"<tool_call>now</tool_call>{_LONG}</think>Hi",
            Message("Hi", f"<tool_call>now</tool_call>{_LONG}"),
        ),
        (GLM, "so<tool_call>now", Message("", "so<tool_call>now")),
        (None, "so<tool_call>now</tool_call>", Message("", "so<tool_call>now</tool_call>")),
    ],
)  # fmt: skip
def test_calls_in_the_reasoning(tool_format: str | None, text: str, message: Message) -> None:
    assert parser(tool_format, True).parse(text) == message
    assert in_pieces(parser(tool_format, True), list(text)) == message


def test_a_long_call_ends_the_reasoning() -> None:
    begin = f"so<tool_call>get_weather<arg_key>city</arg_key><arg_value>{_LONG}"
    one = parser(GLM, True)
    assert join_events(one.feed(begin)).tool_calls[0].arguments == f'{{"city": "{_LONG}'
    assert not one.is_reasoning
    text = f"{begin}</think></arg_value></tool_call>"
    arguments = json.dumps({"city": f"{_LONG}</think>"})
    message = Message("", "so", (ToolCall("get_weather", arguments),))
    assert parser(GLM, True).parse(text) == message


def test_without_a_format_markup_is_text() -> None:
    for one in RECORDED.values():
        if not one.in_reasoning and "<think>" not in one.text:
            assert parser(None).parse(one.text) == Message(one.text)


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
