"""A folder of DeepSeek-V4 over HTTP: prompts, tool calls, reasoning and forced calls."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from fd_dsa.config import demo_model_path
from fd_dsa.engine.tokenizer import Tokenizer
from fd_dsa.serve.flags import ServerOptions
from fd_dsa.serve.info import chat_formats
from tests.chat.recorded import RECORDED, TOOLS
from tests.chat.test_deepseek_v4 import FIRST_RELEASE, LEVELS, words_file
from tests.serve.conftest import Live, running
from tests.serve.fake_engine import FakeEngine
from tests.serve.test_tool_calls import HI, asked, prompt_of

V4 = RECORDED["v4 thinking, calls"]
START, END = "<｜begin▁of▁sentence｜>", "<｜User｜>Hi<｜Assistant｜>"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """The tokenizer of a folder of DeepSeek-V4, which has no template."""
    folder: Path = tmp_path_factory.mktemp("deepseek_v4")
    backend = Backend.from_file(str(demo_model_path() / "tokenizer.json"))
    turns = ["<｜User｜>", "<｜Assistant｜>"]
    backend.add_special_tokens([AddedToken(token, special=True) for token in turns])
    marks = ["<think>", "</think>", "｜DSML｜"]
    backend.add_tokens([AddedToken(token, special=False) for token in marks])
    backend.save(str(folder / "tokenizer.json"))
    shutil.copy(demo_model_path() / "tokenizer_config.json", folder)
    config = json.loads((folder / "tokenizer_config.json").read_text("utf-8"))
    config.pop("chat_template", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / "config.json").write_text('{"model_type": "deepseek_v4"}', encoding="utf-8")
    words_file(folder, FIRST_RELEASE + LEVELS)
    return Tokenizer.from_folder(folder)


@pytest.fixture(scope="module")
def v4(tokenizer: Tokenizer) -> Iterator[Live]:
    """A server of that folder, whose model calls tools."""
    engine = FakeEngine(words=V4.tokens, renderer=tokenizer.chat_renderer, max_model_len=4096)
    with running(engine) as live:
        yield live


def test_the_formats_are_those_of_the_generation(tokenizer: Tokenizer) -> None:
    assert chat_formats(tokenizer, ServerOptions()) == {
        "chat_template": "DeepSeek-V4's own encoding",
        "tool_call_parser": "deepseek_v4",
        "reasoning_parser": "deepseek_v4",
    }


@pytest.mark.parametrize(
    ("fields", "prompt"),
    [
        ({}, f"{START}{END}<think>"),
        ({"reasoning_effort": "none"}, f"{START}{END}</think>"),
        ({"chat_template_kwargs": {"thinking": False}}, f"{START}{END}</think>"),
        ({"reasoning_effort": "high"}, f"{START}ab{END}<think>"),
        ({"chat_template_kwargs": {"reasoning_effort": "max"}}, f"{START}c{END}<think>"),
    ],
)
def test_reasoning_and_its_effort(fields: dict[str, Any], prompt: str, v4: Live) -> None:
    body = {"messages": HI, "max_tokens": 1, **fields}
    assert v4.http.post("/v1/chat/completions", json=body).status_code == 200
    assert prompt_of(v4) == prompt


def test_a_bad_level_is_refused_by_its_field(v4: Live) -> None:
    body = {"messages": HI, "chat_template_kwargs": {"reasoning_effort": "most"}, "tools": TOOLS}
    answer = v4.http.post("/v1/chat/completions", json=body)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "chat_template_kwargs"


def test_a_template_of_a_request_is_read_by_the_generation(tokenizer: Tokenizer) -> None:
    template = "{%- set mark = '｜DSML｜' -%}function_calls{{ '<think>' }}</think><think>"
    engine = FakeEngine(words=V4.tokens, renderer=tokenizer.chat_renderer, max_model_len=4096)
    with running(engine, trust_request_chat_template=True) as live:
        request = {**asked(V4), "extra_body": {"chat_template": template}}
        message = live.client.chat.completions.create(**request).choices[0].message
    assert len(message.tool_calls or []) == 2
