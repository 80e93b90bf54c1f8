"""Fields of Responses requests: refused by name, passed on, and known to the last one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fd_dsa.serve.protocol.responses import IGNORED, REFUSED, REFUSED_IN, ResponsesRequest
from tests.serve.conftest import Live
from tests.serve.test_responses import FUNCTIONS
from tests.serve.test_tool_calls import HI


def error_of(live: Live, **fields: Any) -> dict[str, Any]:
    """The error object of a request that is refused with 400."""
    answer = live.http.post("/v1/responses", json={"input": "Hi", **fields})
    assert answer.status_code == 400, answer.text
    error: dict[str, Any] = answer.json()["error"]
    return error


@pytest.mark.parametrize(
    ("fields", "param", "reason"),
    [
        ({"input": []}, "input", "not empty"),
        ({"input": None}, "input", "allowed is a text or a list"),
        ({"input": [3]}, "input[0]", "allowed is an object"),
        ({"input": [{"role": "robot", "content": "x"}]}, "input[0].role", "system, developer"),
        ({"input": [{"role": "user"}]}, "input[0].content", "list of text parts"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]},
            "input[0].content[0].type",
            "this server reads text only",
        ),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0].type", "stores none"),
        ({"input": [{"id": "x"}]}, "input[0].type", "stores none"),
        ({"input": [{"type": "web_search_call", "id": "x"}]}, "input[0].type", "no tools"),
        (
            {"input": [{"type": "function_call", "call_id": "a", "name": "n", "arguments": 3}]},
            "input[0].arguments",
            "JSON text of an object",
        ),
        (
            {"input": [{"type": "function_call_output", "output": "x"}]},
            "input[0].call_id",
            "missing",
        ),
        ({"input": "x" * 9999}, "input", "max_model_len"),
        ({"max_output_tokens": 99999}, "max_output_tokens", "max_model_len"),
        ({"max_output_tokens": 0}, "max_output_tokens", ""),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type", "the client does"),
        ({"tools": [{"type": "custom", "name": "patch"}]}, "tools[0].type", "by a schema"),
        ({"tools": [{"type": "function"}]}, "tools[0].name", "missing"),
        ({"tools": [{"type": "function", "name": "a b"}]}, "tools[0].name", "white space"),
        ({"tools": [FUNCTIONS[0], FUNCTIONS[0]]}, "tools[1].name", "a second time"),
        (
            {"tools": [{"type": "function", "name": "a", "parameters": 3}]},
            "tools[0].parameters",
            "an object",
        ),
        ({"tool_choice": {"type": "web_search"}}, "tool_choice.type", "no tools"),
        (
            {"tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": FUNCTIONS}},
            "tool_choice.tools",
            "not in tools",
        ),
        ({"tool_choice": "any"}, "tool_choice", "allowed are none, auto, required"),
        ({"reasoning": {"effort": "huge"}}, "reasoning.effort", "'high'"),
        ({"reasoning": {"mode": "pro"}}, "reasoning.mode", "standard"),
        ({"text": {"format": {"type": "xml"}}}, "text.format.type", "json_schema"),
        ({"text": {"format": {"type": "json_schema"}}}, "text.format.schema", "JSON schema"),
        ({"text": {"verbosity": "low"}}, "text.verbosity", "in words"),
        ({"include": ["everything"]}, "include[0]", "message.output_text.logprobs"),
        ({"metadata": {"a": 1}}, "metadata", "16 texts"),
        ({"top_logprobs": 21}, "top_logprobs", "0 to 20"),
        ({"previous_response_id": "resp_1"}, "previous_response_id", "stores no responses"),
        ({"background": True}, "background", "stores no responses"),
        ({"messages": HI}, "messages", "use input"),
        ({"max_tokens": 3}, "max_tokens", "use max_output_tokens"),
        ({"n": 2}, "n", "one answer"),
        ({"return_token_ids": True}, "return_token_ids", "use /v1/chat/completions"),
        ({"allowed_token_ids": [2]}, "allowed_token_ids", "not supported"),
        ({"temperature": -1}, "temperature", ""),
        ({"top_k": -5}, "top_k", ""),
    ],
)
def test_refusals_name_the_field(
    v32: Live, fields: dict[str, Any], param: str, reason: str
) -> None:
    error = error_of(v32, **fields)
    assert error["param"] == param
    assert reason in error["message"]
    assert error["type"] == "invalid_request_error"


def test_extensions_of_chat_pass(v32: Live) -> None:
    more = {"top_k": 5, "seed": 3, "stop": ["x"], "chat_template_kwargs": {"thinking": False}}
    sent = {**more, "store": True, "image": {}, "colour": "red"}
    answer = v32.http.post("/v1/responses", json={"input": "Hi", **sent})
    assert (answer.status_code, answer.headers["X-Ignored-Fields"]) == (200, "colour")
    prompt, params = list(v32.engine.requests.values())[-1]
    assert (params.top_k, params.seed, params.stop_strings) == (5, 3, ("x",))
    assert bytes(prompt).endswith(b"</think>")


def test_odd_values_are_repeated_or_refused(v32: Live) -> None:
    odd = {"user": "\ud800", "max_tool_calls": 10**40, "tools": [{**FUNCTIONS[0], "x": 10**40}]}
    headers = {"Content-Type": "application/json"}
    for stream in (False, True):
        content = json.dumps({"input": "Hi", "stream": stream, **odd})
        answer = v32.http.post("/v1/responses", content=content, headers=headers)
        assert answer.status_code == 200
        for shown in ('"user":"\\ud800"', f'"max_tool_calls":{10**40}', f'"x": {10**40}'):
            assert shown in answer.text
    content = '{"input": "Hi", "text": {"x": NaN}}'
    answer = v32.http.post("/v1/responses", content=content, headers=headers)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "text")


def test_every_field_of_the_client_is_known() -> None:
    page = (Path(__file__).parents[2] / "docs/api.md").read_text("utf-8")
    own = ResponsesRequest.model_fields.keys() | IGNORED
    assert [name for name in sorted(own) if f"`{name}" not in page] == []
    from openai.types import shared_params
    from openai.types.responses import (
        FunctionToolParam,
        ResponseTextConfigParam,
        response_create_params,
    )

    asked_for = response_create_params.ResponseCreateParamsStreaming.__annotations__
    base = response_create_params.ResponseCreateParamsBase.__annotations__
    known = ResponsesRequest.model_fields.keys() | REFUSED | IGNORED
    assert base.keys() | asked_for.keys() <= known
    read = {
        "reasoning": {"effort", "generate_summary", "summary"},
        "text": {"format"},
        "tools": {"type", "name", "description", "parameters", "strict", "output_schema"},
    }
    types: dict[str, Any] = {
        "reasoning": shared_params.Reasoning,
        "text": ResponseTextConfigParam,
        "tools": FunctionToolParam,
    }
    for name, typed in types.items():
        assert typed.__annotations__.keys() <= read[name] | REFUSED_IN[name].keys(), name
