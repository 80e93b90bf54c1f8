"""`return_topk_positions` over HTTP: shapes, streams, refusals."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from fd_dsa.config import EngineConfig, demo_model_path
from fd_dsa.startup.build import build_engine
from tests.engine.fakes import make_engine
from tests.engine.threaded import threaded
from tests.serve.conftest import Live, chunks_of, running

TOPK = 8
ASKING: dict[str, Any] = {"max_tokens": 6, "temperature": 0, "return_topk_positions": True}
CHAT = {**ASKING, "messages": [{"role": "user", "content": "What is the capital of France?"}]}


@pytest.fixture(scope="module")
def demo() -> Iterator[Live]:
    """The demo model, its indexer choosing 8 keys."""
    config = EngineConfig(max_model_len=256, max_num_seqs=4, index_topk=TOPK)
    with running(threaded(build_engine(config))) as live:
        yield live


def post(live: Live, path: str, body: dict[str, Any]) -> httpx.Response:
    """The reply to a request."""
    return live.http.post(path, json=body, timeout=120)


def check(found: dict[str, Any], usage: dict[str, Any]) -> None:
    """Check the rules of every answer."""
    config = json.loads((demo_model_path() / "config.json").read_text("utf-8"))
    # neither the token that was drawn last nor one after it was ever attended to
    position = usage["total_tokens"] - 2
    assert found["position"] == position
    assert len(found["layers"]) == config["num_hidden_layers"]
    for layer in found["layers"]:
        assert len(layer) == TOPK
        assert layer == sorted(set(layer))
        assert layer[0] >= 0
        assert layer[-1] <= position
    assert len(found["tokens"]) == position + 1


def test_whole_and_streamed_chat_tell_the_same(demo: Live) -> None:
    whole = post(demo, "/v1/chat/completions", CHAT).json()
    found = whole["choices"][0]["topk_positions"]
    check(found, whole["usage"])
    assert "France" in "".join(found["tokens"])
    body = {**CHAT, "stream": True, "stream_options": {"include_usage": True}}
    chunks = chunks_of(post(demo, "/v1/chat/completions", body))
    told = [c for chunk in chunks for c in chunk["choices"] if "topk_positions" in c]
    assert [choice["finish_reason"] is not None for choice in told] == [True]
    assert told[0]["topk_positions"] == found
    unasked = {**CHAT, "return_topk_positions": False}
    assert "topk_positions" not in post(demo, "/v1/chat/completions", unasked).text


def test_completions_of_several_prompts_and_choices(demo: Live) -> None:
    body = {**ASKING, "prompt": [[5, 6, 7, 8, 9] * 4, [9, 8] * 8], "n": 2, "ignore_eos": True}
    whole = post(demo, "/v1/completions", body).json()
    found = [choice["topk_positions"] for choice in whole["choices"]]
    assert [entry["position"] for entry in found] == [24, 24, 20, 20]
    assert found[0] == found[1] != found[2]
    chunks = chunks_of(post(demo, "/v1/completions", {**body, "stream": True}))
    streamed = {
        choice["index"]: choice["topk_positions"]
        for chunk in chunks
        for choice in chunk["choices"]
        if "topk_positions" in choice
    }
    assert [streamed[index] for index in range(4)] == found


def test_a_server_that_cannot_tell_says_so() -> None:
    with running(threaded(make_engine())) as live:
        reply = post(live, "/v1/completions", {**ASKING, "prompt": [5, 6]})
    assert reply.status_code == 400
    error = reply.json()["error"]
    assert error["param"] == "return_topk_positions"
    assert "serve with --device cpu" in error["message"]
