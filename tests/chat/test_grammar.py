"""Grammars of forced calls, tried on llguidance itself."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from fd_dsa.chat.grammar import forced_calls_grammar
from fd_dsa.chat.parser import TOOL_FORMATS, AnswerFormat, OutputParser
from fd_dsa.config import demo_model_path
from fd_dsa.engine.reasoning import Reasoning
from fd_dsa.engine.structured_outputs import StructuredOutputsParams
from fd_dsa.engine.tokenizer import Tokenizer
from tests.chat.recorded import RECORDED, SCHEMAS
from tests.engine.grammar_walks import Walks

pytest.importorskip("llguidance", reason="the extra [structured] is not installed")
V31, V32, V4, GLM = "deepseek_v31", "deepseek_v32", "deepseek_v4", "glm47"
WALKS = Walks(Tokenizer.from_folder(demo_model_path()))


def accepts(grammar: str, text: str, after_text: str | None = None) -> tuple[bool, bool]:
    """Return whether a grammar allows a text so far, and whether it may end there."""
    reasoning = None if after_text is None else Reasoning("", after_text)
    return WALKS.accepts(StructuredOutputsParams(grammar=grammar), text, reasoning=reasoning)


def grammar(tool_format: str, schemas: dict[str, Any] = SCHEMAS, **kwargs: Any) -> str:
    """A grammar of forced calls."""
    return forced_calls_grammar(tool_format, schemas, **{"several": True, **kwargs})


def calls_of(name: str) -> str:
    """The calls of a recorded answer, without the text before them."""
    text = RECORDED[name].text
    return text[text.index("I look.") + len("I look.") :]


ANSWERS = [
    (V31, calls_of("v31 calls")),
    (V32, calls_of("v32 thinking, calls")),
    (V4, calls_of("v4 thinking, calls")),
    (GLM, calls_of("glm thinking, calls")),
]


@pytest.mark.parametrize(("tool_format", "text"), ANSWERS)
def test_calls_as_the_models_write_them(tool_format: str, text: str) -> None:
    assert accepts(grammar(tool_format), text) == (True, True)
    assert not accepts(grammar(tool_format), text[:-3])[1]
    assert accepts(grammar(tool_format), "No tool is needed.") == (False, False)
    assert accepts(grammar(tool_format), "")[1] is False


@pytest.mark.parametrize(("tool_format", "text"), ANSWERS)
def test_one_call_alone_and_a_named_tool(tool_format: str, text: str) -> None:
    assert accepts(grammar(tool_format, several=False), text) == (False, False)
    now = {"now": SCHEMAS["now"]}
    assert accepts(grammar(tool_format, now), text) == (False, False)
    answer = AnswerFormat(tool_format=TOOL_FORMATS[tool_format], schemas=SCHEMAS)
    message = OutputParser(answer).parse(text)
    assert [call.name for call in message.tool_calls] == ["get_weather", "now"]


@pytest.mark.parametrize(("tool_format", "text"), ANSWERS)
def test_calls_after_the_reasoning(tool_format: str, text: str) -> None:
    forced = grammar(tool_format)
    assert accepts(forced, f"Well, <so>.</think>{text}", "</think>") == (True, True)
    assert accepts(forced, "only reasoning", "</think>") == (True, False)
    assert accepts(forced, "Well.</think>text", "</think>") == (False, False)


_DSML = (
    '\n\n<｜DSML｜function_calls>\n<｜DSML｜invoke name="f">\n{}</｜DSML｜invoke>\n'
    "</｜DSML｜function_calls>"
)
_DSML_ARGUMENT = '<｜DSML｜parameter name="k" string="{}">{}</｜DSML｜parameter>\n'


def in_v31(value: str | None) -> str:
    """A call of f(k=value) by DeepSeek-V3.1."""
    body = "{}" if value is None else f'{{"k": {value}}}'
    return (
        f"<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>f<｜tool▁sep｜>{body}"
        "<｜tool▁call▁end｜><｜tool▁calls▁end｜>"
    )


def in_v32(value: str | None) -> str:
    """The same by DeepSeek-V3.2."""
    if value is None:
        return _DSML.format("\n")
    is_text = value.startswith('"')
    text = json.loads(value) if is_text else value
    return _DSML.format(_DSML_ARGUMENT.format("true" if is_text else "false", text))


def in_v4(value: str | None) -> str:
    """The same by DeepSeek-V4."""
    return in_v32(value).replace("function_calls>", "tool_calls>")


def in_glm(value: str | None) -> str:
    """The same by GLM."""
    if value is None:
        return "<tool_call>f</tool_call>"
    text = json.loads(value) if value.startswith('"') else value
    return f"<tool_call>f<arg_key>k</arg_key><arg_value>{text}</arg_value></tool_call>"


@pytest.mark.parametrize(
    ("tool_format", "write"), [(V31, in_v31), (V32, in_v32), (V4, in_v4), (GLM, in_glm)]
)
@pytest.mark.parametrize(
    ("schema", "good", "bad"),
    [
        ({"properties": {"k": {"type": "integer"}}, "required": ["k"]}, ["5"], ["[5]", None]),
        ({"properties": {"k": {"type": "integer"}}}, ["5", None], ["true"]),
        # a format that JSON Schema does not know is an annotation
        ({"properties": {"k": {"items": {"format": "x"}, "type": "array"}}}, ['["a"]'], ["5"]),
        ({"properties": {"k": {"type": "string"}}, "required": ["k"]}, ['"a b"', '""'], [None]),
        ({"properties": {"k": {"enum": ["a", "b"]}}, "required": ["k"]}, ['"b"'], ['"c"']),
        (
            {
                "properties": {"k": {"$ref": "#/$defs/pair"}},
                "required": ["k"],
                "$defs": {"pair": {"type": "array", "items": {"type": "integer"}, "maxItems": 2}},
            },
            ["[1, 2]"],
            ["[1, 2, 3]"],
        ),
        ({"properties": {"k": {"type": ["string", "integer"]}}}, ['"x"', "5"], []),
        ({"type": "object"}, [None, '"x"', "5"], []),
        (None, [None, '"x"', "[5]"], []),
    ],
)
def test_arguments_keep_to_the_schema(
    tool_format: str, write: Any, schema: Any, good: list[str | None], bad: list[str | None]
) -> None:
    forced = grammar(tool_format, {"f": schema})
    for value in good:
        assert accepts(forced, write(value)) == (True, True), value
    for value in bad:
        assert accepts(forced, write(value)) == (False, False), value


_CHARACTERS = [*'\t\n\r\b\f "\\/]a5é', "٣", "a\tb", "ab"]


@pytest.mark.parametrize(
    "pattern",
    [
        *(r"^a\tb$", "^a\tb$", r"^\n$", "^[^\n]$", '^[^"]$', r'^[^"\\]$', r'^[^"\n]$', "[^a]"),
        *(r"^[\x00-\x1f]$", r"^[\x00-\x20]$", r"^[\x00-\x7f]$", r"^[\x09\x22]$", r"^[a\x01]$"),
        *(r'^[\]"[]$', r"^[^[\]]$", r"^\d$", r"^\w$", "^a$|^b$", "^[a/-]$"),
    ],
)
def test_texts_of_a_pattern_are_those_of_the_schema(pattern: str) -> None:
    of_schema = StructuredOutputsParams(json={"pattern": pattern, "type": "string"})
    call = grammar(V31, {"f": {"properties": {"k": {"type": "string", "pattern": pattern}}}})
    for char in _CHARACTERS:
        text = json.dumps(char, ensure_ascii=False)
        expected = re.search(pattern, char, re.ASCII) is not None
        assert WALKS.accepts(of_schema, text)[1] == expected, char
        assert accepts(call, in_v31(text))[1] == expected, char


@pytest.mark.parametrize("pattern", [r"\p{Cc}", r"\P{P}", r"(?i)[^\x22\\]"])
def test_patterns_in_the_syntax_of_rust_have_no_other_texts(pattern: str) -> None:
    form = StructuredOutputsParams(json={"type": "string", "pattern": f"^{pattern}$"})
    assert WALKS.accepts(form, r'"\t"')[1]
    assert not WALKS.accepts(form, r'"\""')[1] and not WALKS.accepts(form, r'"\\"')[1]
