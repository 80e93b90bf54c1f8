"""Answers in the models' formats, whole and in pieces."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fd_dsa.chat.events import Event, Message, ToolCall, join_events
from fd_dsa.chat.parser import TOOL_FORMATS, AnswerFormat, OutputParser
from tests.chat.recorded import RECORDED, SCHEMAS, Recorded

V31, V32, GLM = "deepseek_v31", "deepseek_v32", "glm47"
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


@settings(max_examples=300, deadline=None)
@given(
    tool_format=st.sampled_from([V31, V32, GLM, None]),
    tokens=st.lists(st.sampled_from(_ALPHABET), max_size=40),
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


_INVOKE = '<｜DSML｜invoke name="f">'
_PARAMETER = '<｜DSML｜parameter name="k" string="false">'
_TEXT = '<｜DSML｜parameter name="k" string="true">'
_BARE = '<｜DSML｜parameter name="k">'
_PARAMETER_END, _INVOKE_END = "</｜DSML｜parameter>", "</｜DSML｜invoke>"
_SECTION, _SECTION_END = "<｜DSML｜function_calls>", "</｜DSML｜function_calls>"
_V31_CALL = "<｜tool▁call▁begin｜>f<｜tool▁sep｜>{}<｜tool▁call▁end｜>"
_V31_HEAD, _V31_END = "<｜tool▁call▁begin｜>f<｜tool▁sep｜>", "<｜tool▁call▁end｜>"
_GLM_NAME, _GLM_END = "<tool_call>f<arg_key>", "</arg_value></tool_call>"
_GLM_HEAD = "<tool_call>f<arg_key>k</arg_key><arg_value>"


@pytest.mark.parametrize(
    ("tool_format", "text"),
    [
        (V31, "<｜tool▁calls▁begin｜>"),
        (V31, "<｜tool▁calls▁begin｜>x<｜tool▁calls▁end｜>"),
        (V31, "a<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>f"),
        (V31, "<｜tool▁call▁begin｜>f<｜tool▁call▁end｜>b"),
        (V31, "<｜tool▁call▁begin｜><｜tool▁sep｜>{}<｜tool▁call▁end｜>"),
        (V31, f"{_V31_HEAD}{{no json{_V31_END}"),
        (V31, f'{_V31_HEAD}{{"a": 1}}}}{_V31_END}'),
        (V31, f'{_V31_HEAD}{{"a": "x}}{_V31_END}'),
        (V31, f"{_V31_HEAD}[1]{_V31_END}"),
        (V31, f'{_V31_HEAD}{{"a": NaN}}{_V31_END}'),
        (V31, f'{_V31_HEAD}{{"a"'),
        (V32, f"\n\n{_SECTION}"),
        (V32, f"{_SECTION}x{_SECTION_END}"),
        (V32, f"{_SECTION}<｜DSML｜invoke>y"),
        (V32, f'{_SECTION}<｜DSML｜invoke name="f"'),
        (V32, f"{_SECTION}{_INVOKE}?{_INVOKE_END}{_SECTION_END}"),
        (V32, f"{_SECTION}{_INVOKE}{_PARAMETER}[1"),
        (V32, f"{_INVOKE}<｜DSML｜parameter k>1{_PARAMETER_END}{_INVOKE_END}"),
        (V32, f"{_INVOKE}{_TEXT}x</｜DSML｜paramter>\n{_INVOKE_END}"),
        (V32, f"{_INVOKE}{_TEXT}x{_PARAMETER_END}{_TEXT}y{_PARAMETER_END}{_INVOKE_END}"),
        (GLM, "a <tool_call> b"),
        (GLM, '\n<tool_call>{"name": "f"}</tool_call>'),
        (GLM, "<tool_call>two words<arg_key>"),
        (GLM, "<tool_call>f<arg_key>k</arg_key>v</tool_call>"),
        (GLM, f"{_GLM_HEAD}x</arg_valu></tool_call>"),
        (GLM, f"{_GLM_HEAD}x</arg_value><arg_ky>l</arg_key><arg_value>y</arg_value></tool_call>"),
        (GLM, "<tool_call>f<arg_value>x</arg_value></tool_call>"),
        # a value of a damaged call holds a whole call
        (GLM, f"{_GLM_HEAD}<tool_call>now</tool_call></arg_valu></tool_call>"),
    ],
)
def test_text_that_is_no_call_stays_content(tool_format: str, text: str) -> None:
    assert parser(tool_format).parse(text) == Message(text)
    assert in_pieces(parser(tool_format), list(text)) == Message(text)


@pytest.mark.parametrize(
    ("tool_format", "text", "arguments"),
    [
        (V31, f"{_V31_HEAD} {_V31_END}", "{}"),
        (V31, f'{_V31_HEAD}{{"k": "{_V31_END}"}}{_V31_END}', f'{{"k": "{_V31_END}"}}'),
        (V31, f'{_V31_HEAD}{{"k": "a\nb"}}{_V31_END}', '{"k": "a\\nb"}'),
        (V31, f'{_V31_HEAD}{{"k": 1}}', '{"k": 1}'),
        (V31, f'<｜tool▁calls▁begin｜>f<｜tool▁sep｜>{{"k": 1}}{_V31_END}', '{"k": 1}'),
        (V31, f'<｜tool▁call▁begin｜>f{{"k": 1}}{_V31_END}', '{"k": 1}'),
        (V32, f'{_SECTION}{_INVOKE}\n{{"k": 1}}{_INVOKE_END}{_SECTION_END}', '{"k": 1}'),
        (V32, f"{_INVOKE}{_PARAMETER}NaN{_PARAMETER_END}{_INVOKE_END}", '{"k": "NaN"}'),
        (V32, f"{_SECTION}{_INVOKE}{_SECTION_END}", "{}"),
        (V32, '<｜DSML｜invoke name="f"/>', "{}"),
        # the section has the name of the other generation, or there is none
        (V32, f"<｜DSML｜tool_calls>{_INVOKE}{_INVOKE_END}</｜DSML｜tool_calls>", "{}"),
        (V32, f"\n\n{_INVOKE}{_INVOKE_END}", "{}"),
        # `string` is missing or has another value, attributes are in another order
        (V32, f"{_INVOKE}{_BARE}x{_PARAMETER_END}{_INVOKE_END}", '{"k": "x"}'),
        (V32, f"{_INVOKE}{_BARE}[1]{_PARAMETER_END}{_INVOKE_END}", '{"k": [1]}'),
        (
            V32,
            f"{_INVOKE}<｜DSML｜parameter  string='yes' name=k >x{_PARAMETER_END}{_INVOKE_END}",
            '{"k": "x"}',
        ),
        (V32, f'{_INVOKE}<parameter name="k">true{_PARAMETER_END}{_INVOKE_END}', '{"k": true}'),
        # end marks are missing
        (
            V32,
            f'{_INVOKE}\n{_TEXT}x\n<｜DSML｜parameter name="l" string="true">y{_PARAMETER_END}\n'
            f"{_INVOKE_END}",
            '{"k": "x", "l": "y"}',
        ),
        (V32, f"{_SECTION}{_INVOKE}{_TEXT}x\n{_INVOKE_END}\n{_SECTION_END}", '{"k": "x"}'),
        (V32, f"{_SECTION}{_INVOKE}{_TEXT}x{_PARAMETER_END}\n{_SECTION_END}", '{"k": "x"}'),
        (V32, f"{_INVOKE}{_TEXT}x{_PARAMETER_END}", '{"k": "x"}'),
        (GLM, f"{_GLM_HEAD}x</arg_value>", '{"k": "x"}'),
        (GLM, f"{_GLM_HEAD}x</tool_call>", '{"k": "x"}'),
        (
            GLM,
            "<tool_call>f\n<arg_key>k</arg_key>\n<arg_value>x\n<arg_key>l</arg_key>\n"
            "<arg_value>1</arg_value>\n</tool_call>",
            '{"k": "x", "l": 1}',
        ),
        (
            GLM,
            f"{_GLM_HEAD}x</arg_value>l</arg_key><arg_value>1</arg_value></tool_call>",
            '{"k": "x", "l": 1}',
        ),
        (GLM, f"{_GLM_NAME}k</arg_key>some text{_GLM_END}", '{"k": "some text"}'),
        (GLM, f"{_GLM_NAME}k<arg_value>some text{_GLM_END}", '{"k": "some text"}'),
        (GLM, f"{_GLM_NAME}k</arg_key></arg_key><arg_value>x{_GLM_END}", '{"k": "x"}'),
        # an end mark in the value
        (GLM, f"{_GLM_HEAD}a</arg_value>b</arg_value></tool_call>", '{"k": "a</arg_value>b"}'),
        (GLM, f"{_GLM_HEAD}a</tool_call>b</arg_value></tool_call>", '{"k": "a</tool_call>b"}'),
        (
            V32,
            f"{_INVOKE}{_TEXT}a{_PARAMETER_END} b{_INVOKE_END}c{_PARAMETER_END}\n{_INVOKE_END}",
            f'{{"k": "a{_PARAMETER_END} b{_INVOKE_END}c"}}',
        ),
    ],
)  # fmt: skip
def test_slips_are_repaired(tool_format: str, text: str, arguments: str) -> None:
    message = Message("a", "", (ToolCall("f", arguments),))
    one = OutputParser(AnswerFormat(tool_format=TOOL_FORMATS[tool_format]))
    assert in_pieces(one, list(f"a{text}")) == message
    other = OutputParser(AnswerFormat(tool_format=TOOL_FORMATS[tool_format]))
    assert other.parse(f"a{text}") == message


@pytest.mark.parametrize("head", ["get_weather city", "get_weathercity"])
def test_the_first_key_may_lack_its_mark_after_a_declared_name(head: str) -> None:
    text = f"<tool_call>{head}</arg_key><arg_value>Bonn</arg_value></tool_call>"
    assert parser(GLM).parse(text).tool_calls == (ToolCall("get_weather", '{"city": "Bonn"}'),)
    other = text.replace("get_weather", "get_time")
    assert parser(GLM).parse(other) == Message(other)


def test_the_other_call_of_a_damaged_one_is_returned() -> None:
    damaged = '<｜DSML｜invoke name="f"><｜DSML｜parameter>x</｜DSML｜parameter></｜DSML｜invoke>'
    text = f'{_SECTION}\n<｜DSML｜invoke name="now">{_INVOKE_END}\n{damaged}\n{_SECTION_END}'
    assert parser(V32).parse(text) == Message(f"{damaged}\n", "", _NOW)
    text = f'{damaged}\n<｜DSML｜invoke name="now">{_INVOKE_END}'
    assert parser(V32).parse(text) == Message(damaged, "", _NOW)


def test_a_long_call_that_breaks_has_no_end() -> None:
    begin = f"<tool_call>get_weather<arg_key>city</arg_key><arg_value>{_LONG}</arg_value>"
    text = f"{begin}<arg_key>!<arg_ke></tool_call> <tool_call>now</tool_call>"
    arguments = json.dumps({"city": _LONG})[:-1]
    calls = (ToolCall("get_weather", arguments), *_NOW)
    message = Message("<arg_key>!<arg_ke></tool_call> ", "", calls)
    assert parser(GLM).parse(text) == message
    assert in_pieces(parser(GLM), list(text)) == message


@pytest.mark.parametrize(
    ("tool_format", "text", "content", "arguments"),
    [
        (V31, f'{_V31_HEAD}{{"a"', "", '{"a"'),
        (V31, f"{_V31_CALL}<｜tool▁ca", "", "{}"),
        (V31, f"{_V31_CALL}<｜tool▁call▁begin｜>g", "", "{}"),
        (V31, "<｜tool▁call▁begin｜>g", "<｜tool▁call▁begin｜>g", None),
        (V32, f"{_SECTION}{_INVOKE}{_PARAMETER}[1", "", '{"k": '),
        (V32, f'{_SECTION}{_INVOKE}<｜DSML｜parameter name="k', "", ""),
        (V32, f"{_SECTION}{_INVOKE}{_INVOKE_END}\n<｜DSML｜inv", "", "{}"),
        (V32, f"{_SECTION}{_INVOKE}{_INVOKE_END}{_INVOKE[:-3]}", "", "{}"),
        (GLM, "<tool_call>f<arg_key>k", "", ""),
        (GLM, f"{_GLM_HEAD}1</arg_value>", "", '{"k": '),
        (GLM, "<tool_call>f</tool_call>\n<tool_call>g", "", "{}"),
        (GLM, "<tool_call>f</tool_call> \n then", "then", "{}"),
        (GLM, "<tool_call>f", "<tool_call>f", None),
    ],
)
def test_an_answer_that_is_cut_off_has_its_calls_as_far_as_they_go(
    tool_format: str, text: str, content: str, arguments: str | None
) -> None:
    message = parser(tool_format).parse(text, is_cut=True)
    assert message.content == content
    calls = [] if arguments is None else [arguments]
    assert [call.arguments for call in message.tool_calls] == calls
    assert in_pieces(parser(tool_format), list(text), is_cut=True) == message


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
