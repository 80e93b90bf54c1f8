"""Chat formats of folders, and answers parsed, rendered and parsed again."""

from __future__ import annotations

import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from fd_dsa.chat.deepseek_encoding import (
    DeepseekV4Encoding,
    DeepseekV32Encoding,
    read_instructions,
    read_v4_words,
)
from fd_dsa.chat.events import Message
from fd_dsa.chat.parser import REASONING_FORMATS, AnswerFormat, OutputParser
from fd_dsa.chat.renderers import read_renderer
from fd_dsa.chat.template import MAX_TEMPLATE_BYTES, ChatTemplate, opens_reasoning
from fd_dsa.errors import ConfigError
from fd_dsa.models.registry import FAMILIES
from tests.chat import templates
from tests.chat.recorded import RECORDED, SCHEMAS, TOOLS
from tests.chat.test_deepseek_v32 import HI

PLAIN = ChatTemplate("{{ messages[0].content }}", {})
V31 = ChatTemplate(templates.V31, {"bos_token": "<｜begin▁of▁sentence｜>"})
GLM = ChatTemplate(templates.GLM, {})
V32 = DeepseekV32Encoding(read_instructions(Path()))
V4 = DeepseekV4Encoding(read_v4_words(Path()))


V32_FORMATS = ("deepseek_v32", "deepseek_v31")


def renderer_of(folder: Path, **kwargs: Any) -> ChatTemplate | None:
    """Return the renderer of a folder with DeepSeek-V3.2's tokenizer."""
    given: dict[str, Any] = {
        "tokenizer_config": {},
        "special_tokens": {},
        "family_formats": V32_FORMATS,
        "has_token": {"<｜User｜>", "<｜Assistant｜>"}.__contains__,
        **kwargs,
    }
    return read_renderer(folder, **given)


def test_a_template_goes_before_the_models_own_encoding(tmp_path: Path) -> None:
    assert isinstance(renderer_of(tmp_path), DeepseekV32Encoding)
    assert isinstance(renderer_of(tmp_path, family_formats=("deepseek_v4",)), DeepseekV4Encoding)
    config = {"chat_template": "of the config"}
    named = renderer_of(tmp_path, tokenizer_config=config)
    assert named is not None
    assert named.source == "of the config"
    (tmp_path / "chat_template.jinja").write_text("of the folder")
    file = tmp_path / "other.jinja"
    file.write_text("of the flag")
    of_folder = renderer_of(tmp_path, tokenizer_config=config)
    of_flag = renderer_of(tmp_path, tokenizer_config=config, template_file=file)
    assert of_folder is not None
    assert of_flag is not None
    assert (of_folder.source, of_flag.source) == ("of the folder", "of the flag")
    assert [r.origin for r in (named, of_folder, of_flag)] == [
        "tokenizer_config.json",
        "chat_template.jinja",
        "--chat-template other.jinja",
    ]
    with pytest.raises(ConfigError, match="chat template of --chat-template none: cannot be read"):
        renderer_of(tmp_path, template_file=tmp_path / "none")


@pytest.mark.parametrize(
    ("files", "config", "text"),
    [
        (
            {"chat_template.jinja": b"{% for %}"},
            {},
            "template of chat_template.jinja: line 1 is no",
        ),
        ({"chat_template.jinja": b"\xff"}, {}, "chat_template.jinja: cannot be read"),
        (
            {"chat_template.jinja": b" " * (MAX_TEMPLATE_BYTES + 1)},
            {},
            f"chat_template.jinja: has more bytes, allowed: at most {MAX_TEMPLATE_BYTES}",
        ),
        ({}, {"chat_template": "{% if %}"}, "of tokenizer_config.json: line 1 is no valid Jinja"),
        ({}, {"chat_template": 5}, "tokenizer_config.json is a int"),
        ({}, {"chat_template": [{"name": "default", "template": 5}]}, "is a int; it must be"),
    ],
)
def test_a_template_that_is_none_names_its_file(
    tmp_path: Path, files: dict[str, bytes], config: dict[str, Any], text: str
) -> None:
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=re.escape(text)):
        renderer_of(tmp_path, tokenizer_config=config)


def test_other_models_and_vocabularies_have_no_encoding(tmp_path: Path) -> None:
    assert renderer_of(tmp_path, family_formats=()) is None
    assert renderer_of(tmp_path, family_formats=("glm47",)) is None
    for formats in (V32_FORMATS, ("deepseek_v4",)):
        assert renderer_of(tmp_path, family_formats=formats, has_token=lambda _: False) is None


@pytest.mark.parametrize(
    ("renderer", "tools", "reasoning"),
    [
        (PLAIN, None, "none"),
        (V31, "deepseek_v31", "deepseek_v3"),
        (V32, "deepseek_v32", "deepseek_v3"),
        (V4, "deepseek_v4", "deepseek_v4"),
        (GLM, "glm47", "glm45"),
    ],
    ids=["plain", "v31", "v32", "v4", "glm"],
)
def test_parsers_are_chosen_by_the_template(
    renderer: ChatTemplate, tools: str | None, reasoning: str
) -> None:
    found = renderer.tool_format("auto")
    assert (found and found.name) == tools
    assert renderer.has_reasoning("auto") is (reasoning != "none")
    assert renderer.reasoning_format_name("auto") == reasoning
    assert renderer.tool_format_name("auto") == (tools or "none")
    assert renderer.tool_format_name("glm45") == "glm45"
    assert renderer.tool_format("none") is None
    assert not renderer.has_reasoning("none")
    named = renderer.tool_format("glm45")
    assert named is not None
    assert named.name == "glm47"
    assert all(renderer.has_reasoning(name) for name in REASONING_FORMATS)


_DSML_BY_NAME = "{%- set mark = '｜DSML｜' -%}{%- set section = 'tool' ~ '_calls' -%}</think>"


@pytest.mark.parametrize(
    ("source", "model_type", "tools", "reasoning"),
    [
        ("<｜DSML｜tool_calls></think>", None, "deepseek_v4", "deepseek_v4"),
        ("<｜DSML｜function_calls></think>", None, "deepseek_v32", "deepseek_v3"),
        (_DSML_BY_NAME, None, "deepseek_v4", "deepseek_v4"),
        # the generation goes before the names that a template has
        (_DSML_BY_NAME, "deepseek_v4", "deepseek_v4", "deepseek_v4"),
        (_DSML_BY_NAME, "deepseek_v32", "deepseek_v32", "deepseek_v3"),
        ("<｜DSML｜function_calls></think>", "deepseek_v4", "deepseek_v4", "deepseek_v4"),
        ("<｜DSML｜tool_calls></think>", "deepseek_v32", "deepseek_v32", "deepseek_v3"),
        ("<｜DSML｜tool_calls></think>", "glm_moe_dsa", "deepseek_v4", "deepseek_v4"),
        ("<arg_key> ｜DSML｜ </think>", "glm_moe_dsa", "glm47", "glm45"),
        (templates.V31, "deepseek_v32", "deepseek_v31", "deepseek_v3"),
        (templates.V31, "deepseek_v4", "deepseek_v31", "deepseek_v3"),
        ("no calls, no reasoning", "deepseek_v4", "none", "none"),
    ],
)
def test_formats_that_share_a_sign_are_chosen_by_the_generation(
    source: str, model_type: str | None, tools: str, reasoning: str, tmp_path: Path
) -> None:
    config = {"chat_template": source}
    formats = FAMILIES[model_type].chat_formats if model_type else ()
    renderer = renderer_of(tmp_path, tokenizer_config=config, family_formats=formats)
    assert renderer is not None
    assert renderer.tool_format_name() == tools
    assert renderer.reasoning_format_name() == reasoning


def test_where_an_answer_begins() -> None:
    assert opens_reasoning("...<|assistant|><think>", None)
    assert opens_reasoning("...<|assistant|><think>\n", None)
    assert not opens_reasoning("what is <think>?<|assistant|>", None)
    assert not opens_reasoning("...<|assistant|></think>", None)
    begun: dict[str, object] = {"content": "\n<think>Let me"}
    assert opens_reasoning("...<|assistant|>\n<think>Let me", begun)
    assert not opens_reasoning("...<|assistant|></think>Let me", {"content": "Let me"})
    ended: dict[str, object] = {"content": "<think>a</think>b"}
    assert not opens_reasoning("...<|assistant|><think>a</think>b", ended)
    message = {"role": "assistant", "content": "", "reasoning_content": "A gr"}
    assert opens_reasoning("...<think>A gr", message)
    assert not opens_reasoning("...</think>", message)
    assert not opens_reasoning("...<think>A gr</think>H", {**message, "content": "H"})


@pytest.mark.parametrize(
    ("name", "renderer"),
    [
        ("v31 calls", V31),
        ("v32 thinking, calls", V32),
        ("v4 thinking, calls", V4),
        ("glm thinking, calls", GLM),
    ],
)
def test_there_and_back(name: str, renderer: ChatTemplate) -> None:
    """A client's copy of an answer renders to the tokens that the model had made."""
    recorded = RECORDED[name]
    thinking = recorded.in_reasoning
    kwargs = {"tools": TOOLS, "thinking": thinking}
    prompt = renderer.render([HI], **kwargs)
    assert opens_reasoning(prompt, None) is thinking
    answer_format = AnswerFormat(
        renderer.has_reasoning("auto"),
        thinking,
        renderer.tool_format("auto"),
        SCHEMAS,
    )
    answer = OutputParser(answer_format).parse(recorded.text)
    assert answer == recorded.message
    history = renderer.render([HI, _as_history(answer)], add_generation_prompt=False, **kwargs)
    history = history.replace("[2 tools]", "")
    assert history.startswith(prompt.replace("[2 tools]", "") + recorded.text)


def _as_history(answer: Message) -> dict[str, Any]:
    """An answer as a client sends it back."""
    calls = [{"type": "function", "function": asdict(call)} for call in answer.tool_calls]
    return {
        "role": "assistant",
        "content": answer.content,
        "reasoning_content": answer.reasoning,
        "tool_calls": calls,
    }
