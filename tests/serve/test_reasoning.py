"""Reasoning over HTTP: how it is asked for, and left out."""

from __future__ import annotations

from typing import Any

import pytest

from fd_dsa.chat.template import ChatTemplate
from tests.chat.recorded import RECORDED, Recorded
from tests.serve.conftest import Live, running
from tests.serve.fake_engine import FakeEngine
from tests.serve.test_tool_calls import HI, V32, asked, engine_of, prompt_of


def test_reasoning_effort_switches_the_reasoning(v32: Live) -> None:
    def ending(**fields: Any) -> str:
        body = {"messages": HI, "max_tokens": 1, **fields}
        assert v32.http.post("/v1/chat/completions", json=body).status_code == 200
        return prompt_of(v32).removeprefix("<｜begin▁of▁sentence｜><｜User｜>Hi<｜Assistant｜>")

    assert ending() == ending(reasoning_effort="none") == "</think>"
    for effort in ("minimal", "low", "medium", "high", "xhigh", "max"):
        assert ending(reasoning_effort=effort) == "<think>"
    # a template argument takes precedence, under either name
    for name in ("thinking", "enable_thinking"):
        assert ending(reasoning_effort="high", chat_template_kwargs={name: False}) == "</think>"
    # the names of hosted APIs, which take precedence over the effort
    for value, end in ((True, "<think>"), (False, "</think>")):
        kind = {"type": "enabled" if value else "disabled"}
        for fields in ({"enable_thinking": value}, {"thinking": value}, {"thinking": kind}):
            assert ending(**fields) == end
            assert ending(reasoning_effort="none" if value else "high", **fields) == end
            assert ending(**fields, chat_template_kwargs={"thinking": not value}) != end
    for wrong in (1, "on", {}, {"type": "auto"}, {"type": "enabled", "budget_tokens": 5}):
        body = {"messages": HI, "thinking": wrong}
        error = v32.http.post("/v1/chat/completions", json=body).json()["error"]
        assert error["param"] == "thinking"
    body = {"messages": HI, "thinking": True, "enable_thinking": False}
    assert v32.http.post("/v1/chat/completions", json=body).json()["error"]["param"] == "thinking"
    given = {"messages": HI, "reasoning_effort": "high"}
    tokens = v32.http.post("/tokenize", json=given).json()["tokens"]
    assert bytes(tokens).decode().endswith("<think>")


def test_reasoning_effort_is_a_variable_of_templates() -> None:
    template = ChatTemplate("{{ reasoning_effort }} {{ enable_thinking }} {{ thinking }}", {})
    with running(FakeEngine(renderer=template)) as live:
        body = {"messages": HI, "reasoning_effort": "low", "max_tokens": 1}
        assert live.http.post("/v1/chat/completions", json=body).status_code == 200
        assert prompt_of(live) == "low True True"


@pytest.mark.parametrize("recorded", RECORDED.values(), ids=RECORDED)
def test_reasoning_is_left_out_with_its_tokens(recorded: Recorded) -> None:
    switches = {
        "chat_template_kwargs": {"thinking": recorded.in_reasoning},
        "return_token_ids": True,
        "include_reasoning": False,
    }
    fields = asked(recorded, extra_body=switches)
    with running(engine_of(recorded)) as live:
        whole = live.client.chat.completions.create(**fields)
        (choice,) = whole.choices
        assert choice.message.content == (recorded.message.content or None)
        assert not hasattr(choice.message, "reasoning_content")
        assert len(choice.message.tool_calls or []) == len(recorded.message.tool_calls)
        thought = 0
        if recorded.message.reasoning:
            thought = recorded.tokens.index("</think>") + 1
        assert choice.token_ids == list(range(thought, len(recorded.tokens)))
        assert whole.usage is not None
        assert whole.usage.completion_tokens == len(recorded.tokens)
        parts = [c.choices[0] for c in live.client.chat.completions.create(**fields, stream=True)]
        assert [t for part in parts for t in getattr(part, "token_ids", [])] == choice.token_ids
        assert not any(hasattr(part.delta, "reasoning_content") for part in parts)


def test_reasoning_that_is_not_told_apart_cannot_be_left_out() -> None:
    body = {"messages": HI, "include_reasoning": False}
    with running(engine_of(V32), reasoning_parser="none") as live:
        assert live.http.post("/v1/chat/completions", json=body).status_code == 200
        body["reasoning_effort"] = "high"
        answer = live.http.post("/v1/chat/completions", json=body)
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == "include_reasoning"
