"""DeepSeek-V4's own encoding of messages, against prompts of the released encoding."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fd_dsa.chat.deepseek_encoding import DeepseekV4Encoding, read_v4_words
from tests.chat.recorded import TOOLS
from tests.chat.test_deepseek_v32 import ASSISTANT, BOS, CALLING, EOS, HELLO, HI, SYSTEM, USER
from tests.chat.v4_oracle import GOLDENS, NUM_GOLDENS, PLACEHOLDERS, our_prompt

ENCODING = DeepseekV4Encoding(PLACEHOLDERS)


def render(*messages: dict[str, Any], **kwargs: Any) -> str:
    """The prompt of a conversation, with placeholders as texts."""
    return ENCODING.render(messages, **kwargs)


def test_prompts_are_those_of_the_released_encoding() -> None:
    conversations = [json.loads(line) for line in GOLDENS.read_text("utf-8").splitlines()]
    assert len(conversations) == NUM_GOLDENS
    for conversation in conversations:
        expected = conversation.pop("prompt")
        assert our_prompt(ENCODING, conversation) == expected, conversation


@pytest.mark.parametrize(
    ("kwargs", "opening"),
    [
        ({}, "<think>"),
        ({"thinking": False}, "</think>"),
        ({"enable_thinking": False}, "</think>"),
        ({"reasoning_effort": "none"}, "</think>"),
        ({"reasoning_effort": "none", "thinking": True}, "<think>"),
        ({"reasoning_effort": "max", "thinking": False}, "</think>"),
    ],
)
def test_the_model_reasons_unless_it_is_told_not_to(kwargs: dict[str, Any], opening: str) -> None:
    assert render(SYSTEM, HI, **kwargs) == f"{BOS}Be brief.{USER}Hi{ASSISTANT}{opening}"


@pytest.mark.parametrize(
    ("effort", "text"),
    [
        *((None, ""), ("minimal", ""), ("low", ""), ("medium", "")),
        *(("high", "EFFORT high\n\n"), ("xhigh", "EFFORT high\n\n"), ("max", "EFFORT max\n\n")),
    ],
)
def test_an_effort_is_a_text_before_the_conversation(effort: str | None, text: str) -> None:
    prompt = render(SYSTEM, HI, reasoning_effort=effort)
    assert prompt == f"{BOS}{text}Be brief.{USER}Hi{ASSISTANT}<think>"


def test_prompts_without_the_start_of_an_answer() -> None:
    assert render(HI, add_generation_prompt=False) == f"{BOS}{USER}Hi"
    shown = f"{BOS}{USER}Hi{ASSISTANT}<think>A greeting.</think>Hello"
    assert render(HI, HELLO, add_generation_prompt=False) == f"{shown}{EOS}"
    assert render(HI, HELLO, continue_final_message=True) == shown
    reasoning = {"role": "assistant", "content": "", "reasoning_content": "A gr"}
    cut = render(HI, reasoning, continue_final_message=True)
    assert cut == f"{BOS}{USER}Hi{ASSISTANT}<think>A gr"


@pytest.mark.parametrize(
    ("messages", "kwargs", "text"),
    [
        ((HI, HELLO), {}, "continue_final_message"),
        ((HI, CALLING), {"continue_final_message": True}, "ends with tool calls"),
        (({**HI, "task": "sing"},), {}, "task: got 'sing'; must be one of action, query,"),
        (({"role": "developer", "content": ""},), {}, "role 'developer' has no content"),
        (({"role": "critic", "content": "x"},), {}, "got a message of role 'critic'"),
        (({**HI, "content": [{"type": "image_url"}]},), {}, "content: got a part of type 'image"),
        ((HI,), {"thinking": True, "enable_thinking": False}, "differ"),
        ((HI,), {"drop_thinking": "no"}, "drop_thinking is 'no'"),
        ((HI,), {"effort": "high"}, "chat_template_kwargs: has 'effort'"),
        ((HI,), {"reasoning_effort": "most"}, "is 'most'; it must be one of none, minimal,"),
        ((HI,), {"reasoning_effort": ["max"]}, "reasoning_effort is"),
    ],
)
def test_conversations_that_the_model_does_not_know(
    messages: tuple[dict[str, Any], ...], kwargs: dict[str, Any], text: str
) -> None:
    with pytest.raises(ValueError, match=text):
        render(*messages, **kwargs)


FIRST_RELEASE = '''
"""The encoding."""
raise SystemExit("must not be run")
REASONING_EFFORT_MAX = (
    "As much "
    "as there is.\\n"
)
response_format_template: str = "As {schema}"
TOOLS_TEMPLATE = """Use <{dsml_token}x> in {thinking_start_token}.
{tool_schemas}
"""
'''
LEVELS = 'REASONING_EFFORT_PROMPTS: Dict[str, str] = {"low": "", "high": ("a" "b"), "max": "c"}\n'


def words_file(folder: Path, content: str) -> None:
    """Write the encoding of a model's folder."""
    (folder / "encoding").mkdir(exist_ok=True)
    (folder / "encoding" / "encoding_dsv4.py").write_text(content, encoding="utf-8")


def test_the_words_of_the_folder(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    words_file(tmp_path, FIRST_RELEASE)
    words = read_v4_words(tmp_path)
    assert words.tools == "Use <｜DSML｜x> in <think>.\n{tool_schemas}\n"
    assert words.response_format == "As {schema}"
    assert words.efforts == {"max": "As much as there is.\n"}
    words_file(tmp_path, FIRST_RELEASE + LEVELS)
    assert read_v4_words(tmp_path).efforts == {"low": "", "high": "ab", "max": "c"}
    assert not caplog.text


@pytest.mark.parametrize(
    ("content", "missing"),
    [
        ("", "TOOLS_TEMPLATE, response_format_template, REASONING_EFFORT_PROMPTS"),
        ("x = (", "TOOLS_TEMPLATE, response_format_template, REASONING_EFFORT_PROMPTS"),
        (FIRST_RELEASE.replace("{tool_schemas}", ""), "has no TOOLS_TEMPLATE;"),
        (FIRST_RELEASE + "REASONING_EFFORT_PROMPTS = {1: 2}", "has no REASONING_EFFORT_PROMPTS;"),
    ],
)
def test_missing_words_are_replaced_by_ours_and_named(
    tmp_path: Path, content: str, missing: str, caplog: pytest.LogCaptureFixture
) -> None:
    words_file(tmp_path, content)
    encoding = DeepseekV4Encoding(read_v4_words(tmp_path))
    assert missing in caplog.text
    bare = encoding.render([HI], tools=TOOLS)
    assert "<think>" in bare
    assert '\n{"name": "get_weather"' in bare
    assert "{tool_schemas}" not in bare
    # a level that the model knows is never dropped silently
    efforts = [encoding.render([HI], reasoning_effort=effort) for effort in ("low", "max")]
    assert efforts[0] != efforts[1]
