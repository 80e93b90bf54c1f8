"""Forced calls that `max_tokens` or a stop string cuts off, whole and in a stream."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import pytest

from tests.chat.test_grammar_walks import BOUNDED
from tests.serve.conftest import Live

pytest.importorskip("llguidance", reason="the extra [structured] is not installed")
from tests.serve.test_forced_calls import body_of, check_calls, serving

Parts = tuple[str, str, list[list[str]], str | None]
PAIRS = [("special", "deepseek_v31"), ("not special", "deepseek_v4"), ("glm", "glm47")]
STOPS = {
    "deepseek_v31": ["<｜tool▁sep｜>", "ls▁begin｜>", '"}', '": '],
    "deepseek_v4": ["</｜DSML｜parameter>", "｜DSML｜", '">', "\n\n<"],
    "glm47": ["</arg_value>", "<arg_key>", "<tool_call>"],
}
ENDS = {"deepseek_v31": "<｜tool▁call▁end｜>", "deepseek_v4": "</｜DSML｜invoke>"}


def whole(live: Live, body: dict[str, Any]) -> list[Parts]:
    """Content, reasoning, calls and finish reason of each choice."""
    answer = live.http.post("/v1/chat/completions", json=body)
    assert answer.status_code == 200, answer.text
    made = []
    for choice in answer.json()["choices"]:
        message = choice["message"]
        calls = [one["function"] for one in message.get("tool_calls") or ()]
        texts = [[call["name"], call["arguments"]] for call in calls]
        thoughts = message.get("reasoning_content") or ""
        made.append((message["content"] or "", thoughts, texts, choice["finish_reason"]))
    return made


def streamed(live: Live, body: dict[str, Any]) -> list[Parts]:
    """The same, joined from a stream."""
    found: dict[int, dict[str, Any]] = {}
    with live.http.stream("POST", "/v1/chat/completions", json={**body, "stream": True}) as lines:
        chunks = [line[6:] for line in lines.iter_lines() if line.startswith("data: {")]
    for choice in (choice for chunk in chunks for choice in json.loads(chunk)["choices"]):
        one = found.setdefault(choice["index"], {"text": "", "thoughts": "", "calls": []})
        delta = choice["delta"]
        one["text"] += delta.get("content") or ""
        one["thoughts"] += delta.get("reasoning_content") or ""
        for call in delta.get("tool_calls") or ():
            if call["index"] == len(one["calls"]):
                one["calls"].append([call["function"]["name"], ""])
            one["calls"][call["index"]][1] += call["function"].get("arguments") or ""
        one["reason"] = choice["finish_reason"]
    return [(o["text"], o["thoughts"], o["calls"], o["reason"]) for _, o in sorted(found.items())]


@pytest.mark.parametrize(("kind", "tool_format"), PAIRS)
def test_a_forced_call_that_is_cut_off(kind: str, tool_format: str) -> None:
    """No markup is content, and no call with lost arguments looks complete."""
    cuts: list[dict[str, Any]] = [{"max_tokens": size} for size in (5, 21, 45, 60)]
    for stop in STOPS[tool_format]:
        cuts.append({"stop": [stop], "include_stop_str_in_output": len(stop) % 2 == 0})
    num_partial = 0
    with serving(kind, tool_format) as live:
        for fields in cuts:
            body = body_of(kind, tool_choice="required", **fields)
            answers = whole(live, body)
            assert streamed(live, body) == answers
            for content, _, calls, reason in answers:
                assert not content, fields
                assert reason == ("length" if "max_tokens" in fields else "stop") or calls
                for number, (name, arguments) in enumerate(calls, 1):
                    if number == len(calls) and reason != "tool_calls":
                        num_partial += 1
                    else:
                        jsonschema.validate(json.loads(arguments), BOUNDED[name])
    assert num_partial


@pytest.mark.parametrize("tool_format", ENDS)
def test_a_stop_string_may_be_the_end_of_a_call(tool_format: str) -> None:
    kind = "special"
    with serving(kind, tool_format) as live:
        for fields in ({}, {"include_stop_str_in_output": True}):
            body = body_of(kind, tool_choice="required", stop=ENDS[tool_format], **fields)
            for choice in live.http.post("/v1/chat/completions", json=body).json()["choices"]:
                check_calls(choice)
                assert len(choice["message"]["tool_calls"]) == 1
