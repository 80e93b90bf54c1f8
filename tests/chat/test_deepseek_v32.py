"""DeepSeek-V3.2's own encoding of messages, against prompts written by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fd_dsa.chat.deepseek_encoding import DeepseekV32Encoding, read_instructions
from tests.chat.recorded import TOOLS

BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
USER, ASSISTANT = "<｜User｜>", "<｜Assistant｜>"
SYSTEM = {"role": "system", "content": "Be brief."}
HI = {"role": "user", "content": "Hi"}
HELLO = {"role": "assistant", "content": "Hello", "reasoning_content": "A greeting."}
WEATHER_DSML = (
    "\n\n<｜DSML｜function_calls>\n"
    '<｜DSML｜invoke name="get_weather">\n'
    '<｜DSML｜parameter name="city" string="true">"Köln"</｜DSML｜parameter>\n'
    '<｜DSML｜parameter name="days" string="false">3</｜DSML｜parameter>\n'
    "</｜DSML｜invoke>\n"
    '<｜DSML｜invoke name="now">\n'
    "\n"
    "</｜DSML｜invoke>\n"
    "</｜DSML｜function_calls>"
)
CALLING = {
    "role": "assistant",
    "content": "I look.",
    "reasoning_content": "Two calls.",
    "tool_calls": [
        {
            "id": "a",
            "type": "function",
            "function": {"name": "get_weather", "arguments": '{"city":"\\"Köln\\"","days":3}'},
        },
        {"id": "b", "type": "function", "function": {"name": "now", "arguments": ""}},
    ],
}
RESULTS = [
    {"role": "tool", "tool_call_id": "a", "content": "sun"},
    {"role": "tool", "tool_call_id": "b", "content": "noon"},
]
RESULTS_TEXT = (
    "\n\n<function_results>\n<result>sun</result>\n<result>noon</result>\n</function_results>\n\n"
)


def render(*messages: dict[str, Any], **kwargs: Any) -> str:
    """The prompt of a conversation, with a short text to offer tools."""
    return DeepseekV32Encoding("TOOLS\n{tool_schemas}\n").render(messages, **kwargs)


@pytest.mark.parametrize(("thinking", "opening"), [(False, "</think>"), (True, "<think>")])
def test_one_question(thinking: bool, opening: str) -> None:
    for name in ("thinking", "enable_thinking"):
        prompt = render(SYSTEM, HI, **{name: thinking})
        assert prompt == f"{BOS}Be brief.{USER}Hi{ASSISTANT}{opening}"
    bare = render(SYSTEM, HI, thinking=thinking, add_generation_prompt=False)
    assert bare == f"{BOS}Be brief.{USER}Hi"
    assert render(SYSTEM, thinking=thinking) == f"{BOS}Be brief.{ASSISTANT}{opening}"


def test_old_reasoning_is_left_out() -> None:
    expected = f"{BOS}{USER}Hi{ASSISTANT}</think>Hello{EOS}{USER}Hi{ASSISTANT}<think>"
    assert render(HI, HELLO, HI, thinking=True) == expected


def test_reasoning_behind_the_last_question_is_shown_while_thinking() -> None:
    calls = f"I look.{WEATHER_DSML}{EOS}{RESULTS_TEXT}"
    thinking = render(HI, CALLING, *RESULTS, thinking=True)
    assert thinking == f"{BOS}{USER}Hi{ASSISTANT}<think>Two calls.</think>{calls}<think>"
    assert render(HI, CALLING, *RESULTS) == f"{BOS}{USER}Hi{ASSISTANT}</think>{calls}</think>"
    again = render(HI, CALLING, *RESULTS, HELLO, HI, thinking=True)
    old = f"{BOS}{USER}Hi{ASSISTANT}</think>{calls}</think>Hello{EOS}"
    assert again == f"{old}{USER}Hi{ASSISTANT}<think>"


def test_results_are_put_in_the_order_of_the_calls() -> None:
    prompt = render(HI, CALLING, *RESULTS)
    assert render(HI, CALLING, *reversed(RESULTS)) == prompt
    unnamed = [{"role": "tool", "content": result["content"]} for result in RESULTS]
    assert render(HI, CALLING, *unnamed) == prompt


def test_tools_are_offered_behind_the_first_system_message() -> None:
    offered = render(SYSTEM, HI, tools=TOOLS)
    head, _, tail = offered.partition(USER)
    assert head.startswith(f"{BOS}Be brief.\n\nTOOLS\n" + '{"name": "get_weather", ')
    assert '{"name": "now", ' in head.splitlines()[-1]
    assert head.endswith("}\n")
    assert tail == f"Hi{ASSISTANT}</think>"
    assert render(HI, tools=TOOLS).startswith(f"{BOS}\n\nTOOLS\n")


def test_the_last_message_can_be_continued() -> None:
    goes_on = {"continue_final_message": True, "add_generation_prompt": False}
    base = f"{BOS}{USER}Hi{ASSISTANT}"
    assert render(HI, HELLO, **goes_on) == f"{base}</think>Hello"
    assert render(HI, HELLO, thinking=True, **goes_on) == f"{base}<think>A greeting.</think>Hello"
    reasoning = {"role": "assistant", "content": "", "reasoning_content": "A gr"}
    assert render(HI, reasoning, thinking=True, **goes_on) == f"{base}<think>A gr"
    assert render(HI, HELLO, add_generation_prompt=False) == f"{base}</think>Hello{EOS}"


@pytest.mark.parametrize(
    ("messages", "kwargs", "text"),
    [
        ((HI, HELLO), {}, "continue_final_message"),
        ((HI,), {"continue_final_message": True}, "is of role 'user'"),
        ((HI, CALLING), {"continue_final_message": True}, "ends with tool calls"),
        ((HI, RESULTS[0]), {}, r"messages\[1\] is of role 'tool'"),
        ((HI, HELLO, RESULTS[0]), {}, r"messages\[2\] .* has 0 calls"),
        ((HI, CALLING, *RESULTS, RESULTS[0]), {}, r"messages\[4\] .* has 2 calls"),
        ((HI,), {"thinking": True, "enable_thinking": False}, "differ"),
        ((HI,), {"thinking": "yes"}, "thinking is 'yes'"),
        ((HI,), {"effort": "high"}, "chat_template_kwargs: has 'effort'"),
    ],
)
def test_conversations_that_the_model_does_not_know(
    messages: tuple[dict[str, Any], ...], kwargs: dict[str, Any], text: str
) -> None:
    with pytest.raises(ValueError, match=text):
        render(*messages, **kwargs)


FILE = '''
"""The encoding."""
import os
raise SystemExit("must not be run")
TOOLS_SYSTEM_TEMPLATE: str = """Use <{dsml_token}x> and {thinking_start_token}.
{tool_schemas}
"""
'''


def test_the_words_of_the_folder_offer_the_tools(tmp_path: Path) -> None:
    (tmp_path / "encoding").mkdir()
    file = tmp_path / "encoding" / "encoding_dsv32.py"
    file.write_text(FILE, encoding="utf-8")
    assert read_instructions(tmp_path) == "Use <｜DSML｜x> and <think>.\n{tool_schemas}\n"
    file.write_text(FILE.replace(": str =", " ="), encoding="utf-8")
    assert read_instructions(tmp_path).startswith("Use <｜DSML｜x>")


@pytest.mark.parametrize("content", [None, "x = (", "TOOLS = 'x'", "TOOLS_SYSTEM_TEMPLATE = f()"])
def test_without_them_ours_do_and_the_log_says_so(
    tmp_path: Path, content: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    if content is not None:
        (tmp_path / "encoding").mkdir()
        (tmp_path / "encoding" / "encoding_dsv32.py").write_text(content, encoding="utf-8")
    instructions = read_instructions(tmp_path)
    assert "other words" in caplog.text
    prompt = DeepseekV32Encoding(instructions).render([HI], tools=TOOLS)
    assert '<｜DSML｜invoke name="$TOOL">' in prompt
    assert "<think>...</think>" in prompt
    assert '\n{"name": "get_weather"' in prompt
    assert "{tool_schemas}" not in prompt
