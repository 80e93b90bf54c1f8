"""The table of fields: complete, disjoint, documented, and honoured over HTTP."""

from __future__ import annotations

import re
import typing
from pathlib import Path
from typing import Any

import pytest
from openai.types import chat, completion_create_params, shared_params
from openai.types.chat import completion_create_params as chat_create_params
from pydantic import BaseModel

from fd_dsa.serve.completions import CompletionRequest
from fd_dsa.serve.protocol.chat import (
    CalledFunction,
    CallInHistory,
    ChatCompletionRequest,
    ChatMessage,
)
from fd_dsa.serve.protocol.generation import StreamOptions
from fd_dsa.serve.protocol.known_fields import (
    IGNORED,
    IGNORED_BECAUSE,
    IGNORED_STREAM_OPTIONS,
    JSON_SCHEMA_FIELDS,
    REFUSED_IN_CHAT,
    REFUSED_IN_COMPLETIONS,
    REFUSED_IN_MESSAGES,
    RESPONSE_FORMAT_FIELDS,
)
from fd_dsa.serve.protocol.tools import FunctionDefinition, Tool
from tests.serve.conftest import Live, chunks_of, running
from tests.serve.fake_engine import FakeEngine
from tests.serve.test_errors import HI, complete, error_of

ENDPOINTS = [(CompletionRequest, REFUSED_IN_COMPLETIONS), (ChatCompletionRequest, REFUSED_IN_CHAT)]
OF_CHAT, OF_COMPLETIONS = (
    {*model.model_fields, *IGNORED, *refused} for model, refused in reversed(ENDPOINTS)
)
# a further field of a message reaches the template; the second ones are of content parts
OF_MESSAGES = {*ChatMessage.model_fields, *REFUSED_IN_MESSAGES, "name"}
OF_PARTS = {"type", "text", "refusal", "prompt_cache_breakpoint"}
OF_FORMATS = {"type", *(name for names in RESPONSE_FORMAT_FIELDS.values() for name in names)}


@pytest.mark.parametrize(
    ("openai_type", "known"),
    [
        (chat_create_params.CompletionCreateParamsStreaming, OF_CHAT),
        (chat_create_params.CompletionCreateParamsNonStreaming, OF_CHAT),
        (completion_create_params.CompletionCreateParamsStreaming, OF_COMPLETIONS),
        (completion_create_params.CompletionCreateParamsNonStreaming, OF_COMPLETIONS),
        (
            chat.ChatCompletionStreamOptionsParam,
            {*StreamOptions.model_fields, *IGNORED_STREAM_OPTIONS},
        ),
        (chat.ChatCompletionSystemMessageParam, OF_MESSAGES),
        (chat.ChatCompletionDeveloperMessageParam, OF_MESSAGES),
        (chat.ChatCompletionUserMessageParam, OF_MESSAGES),
        (chat.ChatCompletionAssistantMessageParam, OF_MESSAGES),
        (chat.ChatCompletionToolMessageParam, OF_MESSAGES),
        (chat.ChatCompletionContentPartTextParam, OF_PARTS),
        (chat.ChatCompletionContentPartRefusalParam, OF_PARTS),
        (chat.ChatCompletionMessageToolCallParam, {*CallInHistory.model_fields}),
        (
            chat.chat_completion_message_tool_call_param.Function,
            {*CalledFunction.model_fields},
        ),
        (chat.ChatCompletionToolParam, {*Tool.model_fields}),
        (shared_params.FunctionDefinition, {*FunctionDefinition.model_fields}),
        (shared_params.ResponseFormatText, OF_FORMATS),
        (shared_params.ResponseFormatJSONObject, OF_FORMATS),
        (shared_params.ResponseFormatJSONSchema, OF_FORMATS),
        (shared_params.response_format_json_schema.JSONSchema, {*JSON_SCHEMA_FIELDS}),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_each_field_of_the_openai_package_is_known(openai_type: Any, known: set[str]) -> None:
    assert typing.get_type_hints(openai_type).keys() - known == set()


@pytest.mark.parametrize(("model", "refused"), ENDPOINTS)
def test_a_field_is_in_one_table(model: type[BaseModel], refused: dict[str, Any]) -> None:
    assert not model.model_fields.keys() & refused.keys()
    assert not model.model_fields.keys() & IGNORED
    assert not refused.keys() & IGNORED
    other = OF_CHAT if model is CompletionRequest else OF_COMPLETIONS
    # a field of the other endpoint is not dropped either
    assert other - {*model.model_fields, *refused, *IGNORED} == set()
    assert sum(map(len, IGNORED_BECAUSE.values())) == len(IGNORED)


def test_a_refusal_names_a_field_that_exists() -> None:
    for name, rule in {**REFUSED_IN_CHAT, **REFUSED_IN_COMPLETIONS}.items():
        words = re.findall(r"[\w/.]*_\w+|/[\w/]+|^\w+", rule.instead)
        for word in words:
            fields = {*ChatCompletionRequest.model_fields, *CompletionRequest.model_fields}
            is_field = word.partition(".")[0] in fields
            assert is_field or word in ("the", "headers", "num_predict") or "/" in word, (
                name,
                word,
            )


def test_the_documentation_lists_the_ignored_fields() -> None:
    text = Path("docs/api.md").read_text("utf-8")
    section = text.partition("### Fields of other servers")[2].partition("\n### ")[0]
    for reason, names in IGNORED_BECAUSE.items():
        (row,) = (line for line in section.splitlines() if line.endswith(f"| {reason} |"))
        assert set(re.findall(r"`([\w.]+)`", row)) == set(names)


def test_unknown_fields_are_reported(caplog: pytest.LogCaptureFixture) -> None:
    fields = {"unknown_of_a_client": 1, "no\nline, é": {}, "null": None, "user": "me"}
    with running(FakeEngine()) as live:
        for stream in (False, True):
            answer = complete(live, **fields, stream=stream)
            assert answer.status_code == 200
            shown = answer.headers["x-ignored-fields"]
            assert shown == "unknown_of_a_client, no\\nline, \\u00e9"
        many = complete(live, **{f"f{i}" + "x" * 100: 1 for i in range(100)})
        assert len(many.headers["x-ignored-fields"]) < 1200
        answer = live.http.post("/detokenize", json={"tokens": [97], "texts": 1})
        assert answer.headers["x-ignored-fields"] == "texts"
        assert "x-ignored-fields" not in complete(live).headers
    told = [r.getMessage() for r in caplog.records if "unknown_of_a_client" in r.getMessage()]
    assert told == ["the field unknown_of_a_client of a request is unknown and ignored"]


@pytest.mark.parametrize(
    ("fields", "form"),
    [
        ({"type": "text"}, None),
        ({"type": "json_object"}, ("json_object", True)),
        ({"type": "json_object", "schema": None}, ("json_object", True)),
        ({"type": "json_object", "schema": {"type": "object"}}, ("json", {"type": "object"})),
        ({"type": "json_object", "value": {"a": 1}}, ("json", {"a": 1})),
        ({"type": "json_object", "value": {}, "schema": None}, ("json", {})),
        ({"type": "json_schema", "schema": {"a": 1}}, ("json", {"a": 1})),
        (
            {
                "type": "json_schema",
                "json_schema": {"name": "n", "strict": False, "schema": {}, "description": "d"},
            },
            ("json", {}),
        ),
    ],
)
def test_forms_of_response_format(live: Live, fields: dict[str, Any], form: Any) -> None:
    live.engine.requests.clear()
    assert complete(live, response_format=fields).status_code == 200
    ((_, params),) = live.engine.requests.values()
    asked = params.structured_outputs
    assert (asked and getattr(asked, form[0])) == (form and form[1])


@pytest.mark.parametrize(
    "fields",
    [
        {"type": "text", "schema": {}},
        {"type": "json_object", "json_schema": {"schema": {}}},
        {"type": "json_object", "schema": "{}"},
        {"type": "json_object", "value": "{}"},
        {"type": "json_object", "schema": {}, "value": {}},
        {"type": "json_schema", "value": {}},
        {"type": "json_schema", "schema": {}, "json_schema": {"schema": {}}},
        {"type": "json_schema", "json_schema": {"schema": {}, "grammar": "x"}},
        {"type": "json_schema", "json_schema": []},
        {"type": "structural_tag"},
    ],
)
def test_forms_that_are_not_dropped(live: Live, fields: dict[str, Any]) -> None:
    error = error_of(complete(live, response_format=fields), 400)
    assert error["param"] == "response_format"


def test_further_fields_of_structured_outputs(live: Live) -> None:
    for name in ("whitespace_pattern", "disable_any_whitespace", "structural_tag"):
        error = error_of(complete(live, structured_outputs={"regex": "a", name: True}), 400)
        assert name in error["message"]
    fine = {"regex": "a", "disable_fallback": True, "disable_any_whitespace": False}
    assert complete(live, structured_outputs=fine).status_code == 200


def test_stream_options(live: Live) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True, "include_obfuscation": True}
    for path, body in (("completions", {"prompt": "ab"}), ("chat/completions", {"messages": HI})):
        body = {**body, "stream": True, "stream_options": options, "max_tokens": 3}
        chunks = chunks_of(live.http.post(f"/v1/{path}", json=body))
        counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
        assert counts == sorted(counts) and counts[-1] == 3 and 1 in counts
        assert len({chunk["usage"]["prompt_tokens"] for chunk in chunks}) == 1
        body["stream_options"] = {"continuous_usage_stats": True}
        assert all("usage" not in c for c in chunks_of(live.http.post(f"/v1/{path}", json=body)))
    error = error_of(complete(live, stream=True, stream_options={"usage": True}), 400)
    assert error["param"] == "stream_options.usage"


def test_tool_choice_has_no_further_fields(live: Live) -> None:
    choice = {"type": "function", "function": {"name": "f"}, "mode": "auto"}
    body = {"messages": HI, "tools": [], "tool_choice": choice}
    error = error_of(live.http.post("/v1/chat/completions", json=body), 400)
    assert error["param"] == "tool_choice"
