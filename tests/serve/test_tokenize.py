"""/tokenize and /detokenize."""

from __future__ import annotations

from typing import Any

import pytest

from tests.chat.recorded import TOOLS
from tests.serve.conftest import Live, running
from tests.serve.fake_engine import FakeEngine
from tests.serve.test_errors import error_of
from tests.serve.test_tool_calls import RENDERERS

CHAT = [{"role": "user", "content": "Hi"}]


def tokenize(live: Live, **fields: Any) -> Any:
    """POST to /tokenize."""
    return live.http.post("/tokenize", json=fields)


def test_a_prompt_is_what_a_completion_begins_with(live: Live) -> None:
    told = tokenize(live, prompt="añ").json()
    assert told == {"count": 4, "max_model_len": 256, "tokens": [256, 97, 195, 177]}
    usage = live.http.post("/v1/completions", json={"prompt": "añ"}).json()["usage"]
    assert usage["prompt_tokens"] == told["count"]
    assert tokenize(live, prompt="a", add_special_tokens=False).json()["tokens"] == [97]
    assert tokenize(live, prompt="").json()["tokens"] == []


def test_messages_are_what_a_chat_completion_begins_with(live: Live) -> None:
    told = tokenize(live, messages=CHAT, model="alias").json()
    assert bytes(told["tokens"]) == b"user:Hi\n>"
    usage = live.http.post("/v1/chat/completions", json={"messages": CHAT}).json()["usage"]
    assert usage["prompt_tokens"] == told["count"]
    bare = tokenize(live, messages=CHAT, add_generation_prompt=False).json()["tokens"]
    assert bytes(bare) == b"user:Hi\n"


def test_tools_and_switches_change_the_prompt_as_in_a_chat_completion() -> None:
    engine = FakeEngine(renderer=RENDERERS["deepseek_v32"], max_model_len=4096)
    with running(engine) as live:
        prompts = set()
        for more in ({}, {"tools": TOOLS}, {"chat_template_kwargs": {"thinking": True}}):
            fields = {"messages": CHAT, **more}
            told = tokenize(live, **fields).json()
            answer = live.http.post("/v1/chat/completions", json=fields).json()
            assert answer["usage"]["prompt_tokens"] == told["count"]
            prompts.add(bytes(told["tokens"]))
        assert len(prompts) == 3


def test_each_token_as_a_text(live: Live) -> None:
    told = tokenize(live, prompt="aé", return_token_strs=True).json()
    assert told["token_strs"] == ["<s>", "a", "�", "�"]


def test_there_and_back(live: Live) -> None:
    for text in ("", "Hello wörld 🙂"):
        tokens = tokenize(live, prompt=text, add_special_tokens=False).json()["tokens"]
        assert live.http.post("/detokenize", json={"tokens": tokens}).json() == {"prompt": text}
    told = live.http.post("/detokenize", json={"tokens": [256, 97]}).json()
    assert told == {"prompt": "<s>a"}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({}, "prompt"),
        ({"prompt": "a", "messages": CHAT}, "prompt"),
        ({"prompt": 5}, "prompt"),
        ({"prompt": "a", "add_special_tokens": "yes"}, "add_special_tokens"),
        ({"messages": []}, "prompt"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages"),
    ],
)
def test_what_cannot_be_tokenized(live: Live, fields: dict[str, Any], param: str) -> None:
    assert error_of(tokenize(live, **fields), 400)["param"].startswith(param)


@pytest.mark.parametrize("tokens", [[257], [-1], [10**40], ["a"], [1.5], [True], "a", None, [[1]]])
def test_tokens_that_are_none(live: Live, tokens: Any) -> None:
    answer = live.http.post("/detokenize", json={"tokens": tokens})
    error = error_of(answer, 400)
    assert error["param"] == "tokens"
    assert len(error["message"]) < 200


def test_other_models_are_not_there(live: Live) -> None:
    error_of(tokenize(live, prompt="a", model="gpt-4"), 404)
    error_of(live.http.post("/detokenize", json={"tokens": [1], "model": "gpt-4"}), 404)
