"""Calls with slips in their markup, and text that is no call."""

from __future__ import annotations

import json

import pytest

from fd_dsa.chat.events import Message, ToolCall
from fd_dsa.chat.parser import TOOL_FORMATS, AnswerFormat, OutputParser
from tests.chat.test_parser import GLM, V4, V31, V32, in_pieces, parser

_LONG = "go " * 1000
_NOW = (ToolCall("now", "{}"),)
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
        (V4, "<｜DSML｜tool_calls>x</｜DSML｜tool_calls>"),
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
        # a value of a damaged call cites a call, which is no call of its own
        (GLM, f"{_GLM_HEAD}<tool_call>now</tool_call></arg_valu></tool_call>"),
        (GLM, f"{_GLM_NAME}!<arg_ky><arg_value><tool_call>g</tool_call></arg_value></tool_call>"),
    ],
)
def test_text_that_is_no_call_stays_content(tool_format: str, text: str) -> None:
    assert parser(tool_format).parse(text) == Message(text)
    assert in_pieces(parser(tool_format), list(text)) == Message(text)


@pytest.mark.parametrize(
    ("tool_format", "text", "arguments"),
    [
        (V31, f"{_V31_HEAD} {_V31_END}", "{}"),
        (V31, f'{_V31_HEAD}{" " * 40}{{"k": 1}}{" " * 40}{_V31_END}', '{"k": 1}'),
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
        (V4, f"{_SECTION}{_INVOKE}{_INVOKE_END}{_SECTION_END}", "{}"),
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


def test_a_repair_must_fit_the_schema() -> None:
    """The head of an argument in a value is cited, if its value is no value of the argument."""
    head = "<tool_call>get_weather<arg_key>city</arg_key><arg_value>use <arg_key>days</arg_key>"
    text = f"{head}<arg_value>3</arg_value></tool_call>"
    arguments = '{"city": "use ", "days": 3}'
    assert parser(GLM).parse(text).tool_calls == (ToolCall("get_weather", arguments),)
    text = f"{head}<arg_value> as shown</arg_value></tool_call>"
    assert parser(GLM).parse(text) == Message(text)
    text = text.replace("days", "zip")
    arguments = '{"city": "use <arg_key>zip</arg_key><arg_value> as shown"}'
    assert parser(GLM).parse(text).tool_calls == (ToolCall("get_weather", arguments),)


@pytest.mark.parametrize("filler", ["", _LONG])
def test_marks_in_strings_of_json(filler: str) -> None:
    """A string of JSON goes on after a mark, unless it has no end."""
    value = f'{{"a": "{filler}</arg_value></tool_call> \\"'
    text = f'{_GLM_HEAD}{value}"}}{_GLM_END}{_GLM_HEAD}"x{_GLM_END}'
    calls = (ToolCall("f", f'{{"k": {value}"}}}}'), ToolCall("f", '{"k": "\\"x"}'))
    assert parser(GLM).parse(text) == Message("", "", calls)
    assert in_pieces(parser(GLM), list(text)) == Message("", "", calls)
    # the answer may end inside of the string
    begun = Message("", "", (ToolCall("f", '{"k": '),))
    assert in_pieces(parser(GLM), list(f"{_GLM_HEAD}{value}"), is_cut=True) == begun
    text = f'{_GLM_HEAD}["{filler}{_GLM_END} And'
    calls = (ToolCall("f", json.dumps({"k": f'["{filler}'})),)
    if not filler:
        assert in_pieces(parser(GLM), list(text)) == Message("And", "", calls)
    else:
        # too much of the call is out
        assert in_pieces(parser(GLM), list(text)).tool_calls == begun.tool_calls


def test_the_other_call_of_a_damaged_one_is_returned() -> None:
    damaged = '<｜DSML｜invoke name="f"><｜DSML｜parameter>x</｜DSML｜parameter></｜DSML｜invoke>'
    text = f'{_SECTION}\n<｜DSML｜invoke name="now">{_INVOKE_END}\n{damaged}\n{_SECTION_END}'
    assert parser(V32).parse(text) == Message(f"{damaged}\n{_SECTION_END}", "", _NOW)
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
        # prose that names a mark is no call, and does not go on as one
        (V32, f"Write {_INVOKE} to call. And", f"Write {_INVOKE} to call. And", None),
        (V32, f"{_INVOKE}{_INVOKE_END}Write {_INVOKE} to. And", f"Write {_INVOKE} to. And", "{}"),
        (GLM, "Write <tool_call>, and", "Write <tool_call>, and", None),
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
