"""Chat formats in a real process: the demo model with DeepSeek-V3.2's special tokens."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from fd_dsa.config import demo_model_path
from fd_dsa.engine.tokenizer import Tokenizer
from tests.chat.recorded import TOOLS
from tests.serve.processes import Server, serving

pytestmark = pytest.mark.slow

RENAMED = {
    "<|bos|>": "<｜begin▁of▁sentence｜>",
    "<|eos|>": "<｜end▁of▁sentence｜>",
    "<|user|>": "<｜User｜>",
    "<|assistant|>": "<｜Assistant｜>",
    "<|pad|>": "</think>",
}
HELLO = [{"role": "user", "content": "Hello! What is your name?"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as DeepSeek-V3.2's: no chat template, and its own encoding of messages beside."""
    path = tmp_path_factory.mktemp("models") / "v32"
    shutil.copytree(demo_model_path(), path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        text = (path / name).read_text(encoding="utf-8")
        for old, new in RENAMED.items():
            text = text.replace(old, new)
        (path / name).write_text(text, encoding="utf-8")
    file = path / "tokenizer_config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    del config["chat_template"]
    file.write_text(json.dumps(config), encoding="utf-8")
    (path / "encoding").mkdir()
    words = 'TOOLS_SYSTEM_TEMPLATE = "TOOLS: {tool_schemas}"\n'
    (path / "encoding" / "encoding_dsv32.py").write_text(words, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def v32(folder: Path) -> Iterator[Server]:
    """That folder, served."""
    with serving(folder.parent, str(folder), "--trust-request-chat-template") as server:
        yield server


def ask(client: openai.OpenAI, **fields: object) -> openai.types.chat.ChatCompletion:
    """A short greedy answer."""
    fields = {"messages": HELLO, "max_tokens": 12, "temperature": 0, **fields}
    return client.chat.completions.create(model="v32", **fields)  # type: ignore[call-overload]


def test_calls_are_forced(v32: Server) -> None:
    """The demo model has never seen a tool; under the grammar it calls one, also streamed."""
    level = {"type": "integer", "minimum": 1, "maximum": 9}
    parameters = {
        "type": "object",
        "properties": {"level": level, "mode": {"enum": ["slow", "fast"]}},
        "required": ["level", "mode"],
    }
    tools = [
        {"type": "function", "function": {"name": name, "parameters": parameters}}
        for name in ("start", "stop")
    ]
    named = {"type": "function", "function": {"name": "stop"}}
    with v32.client() as client:
        for choice in ("required", named):
            fields = {"tools": tools, "tool_choice": choice, "max_tokens": 400}
            answer = ask(client, parallel_tool_calls=False, **fields).choices[0]
            assert answer.finish_reason == "tool_calls"
            (call,) = answer.message.tool_calls or []
            assert call.function.name in (("start", "stop") if choice == "required" else ("stop",))
            arguments = json.loads(call.function.arguments)
            assert arguments["level"] in range(1, 10)
            assert arguments["mode"] in ("slow", "fast")
            chunks = list(ask(client, parallel_tool_calls=False, stream=True, **fields))
            parts = [p for chunk in chunks for p in chunk.choices[0].delta.tool_calls or []]
            assert "".join(part.function.arguments for part in parts) == call.function.arguments


def test_tools_thinking_and_templates_reach_the_prompt(v32: Server, folder: Path) -> None:
    tokenizer = Tokenizer.from_folder(folder)
    with v32.client() as client:
        usage = ask(client, tools=TOOLS).usage
        assert usage is not None
        assert usage.prompt_tokens == len(tokenizer.apply_chat_template(HELLO, tools=TOOLS))
        thinking = {"chat_template_kwargs": {"enable_thinking": True}}
        answer = ask(client, extra_body=thinking)
        assert answer.usage is not None
        assert answer.usage.prompt_tokens == len(
            tokenizer.apply_chat_template(HELLO, enable_thinking=True)
        )
        # the demo model never ends its reasoning
        assert answer.choices[0].message.content == ""
        assert answer.choices[0].message.reasoning_content  # type: ignore[attr-defined]
        answer = ask(client, extra_body={"chat_template": "{{ messages[0].content }}"})
        assert answer.usage is not None
        assert answer.usage.prompt_tokens == len(tokenizer.encode(HELLO[0]["content"]))
        with pytest.raises(openai.BadRequestError, match="differ"):
            ask(
                client,
                extra_body={"chat_template_kwargs": {"thinking": True, "enable_thinking": False}},
            )
