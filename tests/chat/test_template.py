"""Jinja templates: tools, history, continued messages."""

from __future__ import annotations

import json
from typing import Any

import pytest

from fd_dsa.chat.template import ChatTemplate
from fd_dsa.errors import ConfigError
from tests.chat import templates
from tests.chat.recorded import TOOLS
from tests.chat.test_deepseek_v32 import CALLING, HELLO, HI, RESULTS, SYSTEM

BOS = {"bos_token": "<｜begin▁of▁sentence｜>"}


def v31(*messages: dict[str, Any], **kwargs: Any) -> str:
    """A prompt in the manner of DeepSeek-V3.1."""
    return ChatTemplate(templates.V31, BOS).render(messages, **kwargs)


def glm(*messages: dict[str, Any], **kwargs: Any) -> str:
    """A prompt in the manner of GLM-5."""
    return ChatTemplate(templates.GLM, {}).render(messages, **kwargs)


def test_arguments_serve_as_text_and_as_a_mapping() -> None:
    text = v31(HI, CALLING, *RESULTS)
    assert '<｜tool▁sep｜>{"city":"\\"Köln\\"","days":3}<｜tool▁call▁end｜>' in text
    assert "now<｜tool▁sep｜>{}<｜tool▁call▁end｜>" in text
    text = glm(HI, CALLING, *RESULTS)
    assert text == (
        "[gMASK]<sop><|user|>Hi<|assistant|><think>Two calls.</think>I look."
        '<tool_call>get_weather<arg_key>city</arg_key><arg_value>"Köln"</arg_value>'
        "<arg_key>days</arg_key><arg_value>3</arg_value></tool_call><tool_call>now</tool_call>"
        "<|observation|><tool_response>sun</tool_response><tool_response>noon</tool_response>"
        "<|assistant|><think>"
    )
    template = ChatTemplate("{{ messages[0].tool_calls[0].function.arguments }}", {})
    assert template.render([CALLING]) == '{"city":"\\"Köln\\"","days":3}'
    template = ChatTemplate("{{ messages[0].tool_calls[0].function.arguments | tojson }}", {})
    assert template.render([CALLING]) == '{"city": "\\"Köln\\"", "days": 3}'
    template = ChatTemplate("{{ messages[0].tool_calls[0].function.arguments + '!' }}", {})
    assert template.render([CALLING]) == '{"city":"\\"Köln\\"","days":3}!'


@pytest.mark.parametrize(
    "text",
    ['{"city": "Par', "[1]", '"x"', "5", "null", "NaN", "{]", '{"a": "\\ud800"}', "[" * 9999],
)
def test_arguments_that_are_no_object_are_one_value(text: str) -> None:
    call = {"function": {"name": "f", "arguments": text}}
    message = {"role": "assistant", "content": "", "tool_calls": [call]}
    assert f"<｜tool▁sep｜>{text}<｜tool▁call▁end｜>" in v31(HI, message, HI)
    assert f"f<arg_key>arguments</arg_key><arg_value>{text}</arg_value>" in glm(HI, message)


def test_an_argument_of_any_name_reaches_the_template() -> None:
    names = ("text", "read", "_text", "arguments")
    call = {"function": {"name": "f", "arguments": json.dumps(dict.fromkeys(names, "v"))}}
    message = {"role": "assistant", "content": "", "tool_calls": [call]}
    items = "".join(f"{{{{ c.function.arguments.{name} }}}}" for name in names[:2])
    template = ChatTemplate(f"{{% for c in messages[0].tool_calls %}}{items}{{% endfor %}}", {})
    assert template.render([message]) == "vv"
    for name in names:
        assert f"<arg_key>{name}</arg_key><arg_value>v</arg_value>" in glm(HI, message)


def parts(role: str, *texts: str) -> dict[str, Any]:
    """A message whose content is a list of text parts."""
    return {"role": role, "content": [{"type": "text", "text": text} for text in texts]}


# in the manner of GLM-4.7: a macro reads the content, and results of tools must be texts
VISIBLE = """\
{%- macro visible(content) -%}
{%- if content is string -%}{{ content }}
{%- else -%}{%- for part in content if part.type == 'text' -%}{{ part.text }}{%- endfor -%}
{%- endif -%}{%- endmacro -%}
{%- for m in messages -%}
<|{{ m.role }}|>{{ m.content if m.role == 'tool' else visible(m.content) }}
{%- endfor -%}"""
ONLY_PARTS = """\
{% for m in messages %}<{{ m.role }}>{% for p in m['content'] %}{{ p['text'] }}{% endfor %}\
{% endfor %}"""


def test_parts_reach_a_template_that_shows_them() -> None:
    template = ChatTemplate(VISIBLE, {})
    messages = [parts("system", "a", "b"), parts("user", "foo", "bar"), {**HI}]
    assert template.render(messages) == "<|system|>ab<|user|>foobar<|user|>Hi"
    # the same template shows no parts in this role
    text = template.render([HI, CALLING, {**parts("tool", "a", "b"), "tool_call_id": "call_0"}])
    assert text.endswith("<|tool|>a\nb")
    for source in (
        "{{ messages[0].content }}",
        "{{ messages[0].content | tojson }}",
        templates.V31,
    ):
        assert "foo\nbar" in ChatTemplate(source, BOS).render(messages[1:2]).replace("\\n", "\n")


def test_a_template_of_parts_only_gets_a_text_as_a_part() -> None:
    template = ChatTemplate(ONLY_PARTS, {})
    assert template.render([HI, parts("user", "foo", "bar")]) == "<user>Hi<user>foobar"


def test_the_last_part_can_be_continued() -> None:
    goes_on = {"add_generation_prompt": False, "continue_final_message": True}
    last = parts("assistant", "foo", "bar")
    assert ChatTemplate(VISIBLE, {}).render([HI, last], **goes_on).endswith("<|assistant|>foobar")
    assert v31(HI, last, **goes_on).endswith("</think>foo\nbar")


def test_reasoning_has_three_names() -> None:
    source = "{% set m = messages[0] %}{{ m.reasoning_content }}{{ m.thinking }}{{ m.reasoning }}"
    for name in ("reasoning_content", "thinking", "reasoning"):
        message = {"role": "assistant", "content": "", name: "x"}
        assert ChatTemplate(source, {}).render([message]) == "xxx"


def test_a_message_without_calls_has_no_field_for_them() -> None:
    source = "{{ messages[0].tool_calls is defined }}"
    for calls in ([], None):
        message = {"role": "assistant", "content": "x", "tool_calls": calls}
        assert ChatTemplate(source, {}).render([message]) == "False"


@pytest.mark.parametrize("name", ["thinking", "enable_thinking"])
def test_both_names_switch_the_reasoning(name: str) -> None:
    assert v31(HI, **{name: True}).endswith("<｜Assistant｜><think>")
    assert v31(HI, **{name: False}).endswith("<｜Assistant｜></think>")
    assert glm(HI, **{name: True}).endswith("<|assistant|><think>")
    assert glm(HI, **{name: False}).endswith("<|assistant|></think>")
    assert glm(HI).endswith("<|assistant|><think>")


def test_tools_reach_the_template() -> None:
    assert v31(HI, tools=TOOLS).endswith("[2 tools]<｜Assistant｜></think>")
    assert '{"type": "function", "function": {"name": "get_weather"' in glm(HI, tools=TOOLS)


def test_the_last_message_can_be_continued() -> None:
    goes_on = {"add_generation_prompt": False, "continue_final_message": True}
    assert v31(SYSTEM, HI, HELLO, **goes_on).endswith("<｜User｜>Hi<｜Assistant｜></think>Hello")
    spaced = {"role": "assistant", "content": " Hello "}
    assert glm(HI, spaced, **goes_on).endswith("<|assistant|></think>Hello ")
    assert glm(HI, HELLO, **goes_on).endswith("<think>A greeting.</think>Hello")
    reasoning = {"role": "assistant", "content": "", "reasoning_content": "A gr"}
    assert glm(HI, reasoning, **goes_on).endswith("<|assistant|><think>A gr")


@pytest.mark.parametrize(
    ("message", "text"),
    [
        (HI, "role 'user'"),
        (CALLING, "ends with tool calls"),
        ({"role": "assistant", "content": "", "reasoning_content": "x"}, "omits the last message"),
    ],
)
def test_messages_that_cannot_be_continued(message: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        v31(HI, message, continue_final_message=True)


@pytest.mark.parametrize(
    "source",
    [
        "{{ raise_exception('no') }}",
        "{{ messages[7].content }}",
        "{{ 1 / 0 }}",
        "{{ messages[0].content + 1 }}",
        "{{ ''.__class__.__mro__ }}",
        "{% for i in range(10 ** 9) %}{% endfor %}",
    ],
)
def test_failures_of_templates_are_value_errors(source: str) -> None:
    with pytest.raises(ValueError, match=r"^chat template: "):
        ChatTemplate(source, {}).render([HI])


def test_a_macro_without_end_nests_too_deeply() -> None:
    source = "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}"
    with pytest.raises(ValueError, match=r"^chat template: nests too deeply"):
        ChatTemplate(source, {}).render([HI])


def test_products_of_everyday_size() -> None:
    source = "{{ '-' * 1048576 == '-' * 2**20 }} {{ 2**0.5 > 1 }} {{ 3 * 2.5 }} {{ 2**64 * 2**64 }}"
    assert ChatTemplate(source, {}).render([]) == f"True True 7.5 {2**128}"


@pytest.mark.parametrize(
    ("source", "why"),
    [
        ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "nests too deeply"),
        ("{% if 1 %}" * 3000 + "{% endif %}" * 3000, "nests too deeply"),
        ("{{ " + "1 + " * 10000 + "1 }}", "nests too deeply"),
        ("{% if 1 %}" * 150 + "{% endif %}" * 150, "does not compile: too many levels"),
        ("{% for i in [1] %}" * 50 + "{% endfor %}" * 50, "does not compile: too many statically"),
        ("{{ " + "9" * 5000 + " }}", "does not compile: Exceeds the limit"),
    ],
    ids=lambda value: value[:12],
)
def test_a_template_beyond_the_compiler_is_a_config_error(source: str, why: str) -> None:
    with pytest.raises(ConfigError, match=f"^chat template of the request: {why}"):
        ChatTemplate(source, {})
