"""Fields, keys and failures of Messages requests, in the words of the Anthropic API."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fd_dsa.serve.protocol.messages import (
    IGNORED,
    REFUSED,
    REFUSED_IN,
    CountTokensRequest,
    MessagesRequest,
)
from fd_dsa.serve.protocol.translation import EXTENSIONS
from tests.serve.conftest import Live, exchange, running
from tests.serve.fake_engine import FakeEngine
from tests.serve.test_messages import client_of
from tests.serve.test_tool_calls import HI


def error_of(answer: Any) -> dict[str, Any]:
    """The error object of a failure, in the shape of the Anthropic API."""
    body = answer.json()
    assert set(body) == {"type", "error"}
    assert body["type"] == "error"
    assert set(body["error"]) == {"type", "message"}
    assert answer.headers["request-id"] == answer.headers["x-request-id"]
    error: dict[str, Any] = body["error"]
    return error


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"max_tokens": None}, "max_tokens: got null"),
        ({"max_tokens": 0}, "max_tokens: got 0; allowed is 1 or more"),
        ({"messages": []}, "messages: got []"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role: got"),
        ({"messages": [{"role": "user", "content": []}]}, "messages[0].content: has no blocks"),
        (
            {"messages": [*HI, {"role": "user", "content": [{"type": "image"}]}]},
            'messages[1].content[0].type: got "image"; this server reads text only',
        ),
        (
            {"messages": [{"role": "assistant", "content": [{"type": "tool_use", "input": "x"}]}]},
            "messages[0].content[0].input: got",
        ),
        ({"messages": [{"role": "user", "content": "x" * 9999}]}, "prompt has"),
        ({"system": 3}, "system: got 3"),
        ({"system": [{"type": "image"}]}, "system[0].type"),
        ({"tools": [{"type": "web_search_20250305", "name": "w"}]}, "tools[0].type: got"),
        (
            {"tools": [{"type": "bash_20250124", "name": "bash"}]},
            'tools[0].type: got "bash_20250124"; this server runs no tools itself, the client '
            "does, and describes each by a schema; allowed is custom",
        ),
        ({"tools": [{"name": "w"}]}, "tools[0].input_schema: got null"),
        ({"tools": [{"name": "a b", "input_schema": {}}]}, "tools[0].name: got"),
        ({"tool_choice": {"type": "any"}}, "tool_choice: requires a call"),
        ({"tool_choice": {"type": "tool"}}, "tool_choice.name: is missing"),
        ({"thinking": {"type": "between_tools"}}, "thinking.type: got"),
        ({"output_config": {"effort": "huge"}}, "output_config.effort: got"),
        ({"output_config": {"format": {"type": "x"}}}, "output_config.format.type: got"),
        ({"stop_sequences": [""]}, "stop_sequences: got"),
        ({"stop": ["x"]}, 'stop: got ["x"]; not supported, only [] or null; use stop_sequences'),
        ({"n": 2}, "n: got 2; a message has one answer"),
        ({"prompt_logprobs": 2}, "prompt_logprobs: got 2; not supported"),
        ({"allowed_token_ids": [2]}, "allowed_token_ids: got [2]; not supported"),
        ({"container": "c"}, "container: got"),
        ({"mcp_servers": [{}]}, "mcp_servers: got"),
        ({"temperature": -1}, "temperature"),
    ],
)
def test_refusals_name_the_field(v32: Live, fields: dict[str, Any], reason: str) -> None:
    body = {"max_tokens": 9, "messages": HI, **fields}
    answer = v32.http.post("/v1/messages", json=body)
    assert answer.status_code == 400
    error = error_of(answer)
    assert error["type"] == "invalid_request_error"
    assert reason in error["message"]
    assert error["message"].startswith(reason) or reason == "prompt has"


@pytest.mark.parametrize(
    "thread", [{"type": "create"}, {"type": "continue", "previous_message_id": "msg_1"}]
)
def test_a_thread_is_refused_by_the_code_of_the_api(v32: Live, thread: dict[str, str]) -> None:
    body = {"max_tokens": 9, "messages": HI, "thread": thread}
    answer = v32.http.post("/v1/messages?beta=true", json=body)
    assert answer.status_code == 400
    error = answer.json()["error"]
    # the client sends the whole conversation after this code
    assert error.pop("details") == {"error_code": "thread_unsupported_request"}
    assert error.keys() == {"type", "message"}
    assert error["message"].startswith("thread: got {")
    assert v32.http.post("/v1/messages", json={**body, "thread": None}).status_code == 200


def test_failures_of_every_part_of_the_server(v32: Live) -> None:
    body = {"max_tokens": 9, "messages": HI}
    http, path = v32.http, "/v1/messages"
    json_type = {"Content-Type": "application/json"}
    found = {
        "not_found_error": [
            http.post(path, json={**body, "model": "x"}),
            http.get(f"{path}/batches"),
        ],
        "invalid_request_error": [
            http.get(path),
            http.post(path, content=b"{", headers=json_type),
            http.post(path, content=b"", headers=json_type),
            http.post(f"{path}/count_tokens", json={}),
            http.post(path, json=body, headers={"Content-Encoding": "gzip"}),
        ],
    }
    for kind, answers in found.items():
        assert {error_of(answer)["type"] for answer in answers} == {kind}
    assert [answer.status_code for answer in found["not_found_error"]] == [404, 404]
    chunks = b"1\r\nx\r\n" * 5000
    head = b"POST /v1/messages HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
    assert b'{"type":"error","error":{"type":"invalid' in exchange(v32.url, head + chunks)


def test_keys_come_in_either_header() -> None:
    import anthropic

    with running(FakeEngine(), api_key=("right",)) as live:
        fields: Any = {"model": "demo", "max_tokens": 1, "messages": HI}
        for keys in ({"api_key": "right"}, {"auth_token": "right", "api_key": None}):
            with client_of(live, **keys) as client:
                assert client.messages.create(**fields).content
        with client_of(live, api_key="wrong") as client:
            with pytest.raises(anthropic.AuthenticationError) as raised:
                client.messages.create(**fields)
            assert raised.value.request_id
            assert "x-api-key: KEY" in str(raised.value)
        # of other paths it is no key
        answer = live.http.get("/v1/models", headers={"x-api-key": "right"})
        assert answer.status_code == 401
        assert answer.json()["error"]["code"] == "invalid_api_key"


def test_a_full_or_ending_server_is_overloaded() -> None:
    engine = FakeEngine(step_s=0.01)
    body = {"max_tokens": 200, "messages": HI, "ignore_eos": True}
    streamed = {"method": "POST", "url": "/v1/messages", "json": {**body, "stream": True}}
    with running(engine, max_concurrency=1) as live, live.http.stream(**streamed) as answer:
        lines = answer.iter_lines()
        assert next(lines) == "event: message_start"
        full = live.http.post("/v1/messages", json=body)
        assert (full.status_code, error_of(full)["type"]) == (429, "rate_limit_error")
        live.state.draining = True
        late = live.http.post("/v1/messages", json=body)
        assert (late.status_code, error_of(late)["type"]) == (503, "overloaded_error")
        for request_id in tuple(live.state.active):
            engine.end(request_id)
        rest = list(lines)
    assert rest[-3] == "event: error"
    assert rest[-2].startswith('data: {"type":"error","error":{"type":"overloaded_error"')


def test_every_field_of_the_client_is_known() -> None:
    page = (Path(__file__).parents[2] / "docs/api.md").read_text("utf-8")
    own = MessagesRequest.model_fields.keys() | IGNORED
    assert [name for name in sorted(own) if f"`{name}" not in page] == []
    from anthropic.types import (
        beta,
        message_count_tokens_params,
        message_create_params,
        output_config_param,
        tool_param,
    )
    from anthropic.types.beta import message_create_params as beta_params

    known = MessagesRequest.model_fields.keys() | REFUSED | IGNORED | EXTENSIONS
    for module in (message_create_params, beta_params):
        base = module.MessageCreateParamsBase.__annotations__
        streaming = module.MessageCreateParamsStreaming.__annotations__
        assert base.keys() | streaming.keys() <= known
    counting = message_count_tokens_params.MessageCountTokensParams.__annotations__
    assert counting.keys() <= CountTokensRequest.model_fields.keys() | REFUSED | IGNORED
    read = {
        "output_config": {"effort", "format"},
        "tools": {
            *("type", "name", "description", "input_schema", "input_examples", "strict"),
            # hints about caching and streaming
            *("cache_control", "eager_input_streaming"),
        },
    }
    types: dict[str, Any] = {
        "output_config": [output_config_param.OutputConfigParam, beta.BetaOutputConfigParam],
        "tools": [tool_param.ToolParam, beta.BetaToolParam],
    }
    for name, typed in types.items():
        fields = {field for one in typed for field in one.__annotations__}
        assert fields <= read[name] | REFUSED_IN[name].keys(), name
