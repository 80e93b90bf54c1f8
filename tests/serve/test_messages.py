"""The Messages API over HTTP, by the client of the anthropic package."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import anthropic
import pytest
from anthropic.types import Message
from pydantic import BaseModel

from fd_dsa.serve.protocol.messages import (
    IGNORED,
    REFUSED,
    REFUSED_IN,
    CountTokensRequest,
    MessagesRequest,
)
from fd_dsa.serve.protocol.translation import EXTENSIONS
from tests.chat.recorded import RECORDED, SCHEMAS, TOOLS, Recorded
from tests.serve.conftest import Live, exchange, running, wait_until
from tests.serve.fake_engine import FakeEngine
from tests.serve.test_responses import CountingEngine
from tests.serve.test_tool_calls import HI, RENDERERS, V32, engine_of, prompt_of

OWN_TOOLS: Any = [
    {"name": name, "description": "d", "input_schema": schema} for name, schema in SCHEMAS.items()
]
ON = {"type": "enabled", "budget_tokens": 1024}
V32_FIELDS: Any = {
    "model": "demo",
    "max_tokens": 2048,
    "messages": HI,
    "tools": OWN_TOOLS,
    "thinking": ON,
}


@contextmanager
def client_of(live: Live, **kwargs: Any) -> Iterator[anthropic.Anthropic]:
    """The client of the package, without retries."""
    fields = {"api_key": "none", "max_retries": 0, **kwargs}
    with anthropic.Anthropic(base_url=live.url, **fields) as client:
        yield client


@pytest.fixture(scope="module")
def v32() -> Iterator[Live]:
    """A server of DeepSeek-V3.2's encoding."""
    with running(engine_of(V32)) as live:
        yield live


@pytest.fixture(scope="module")
def client(v32: Live) -> Iterator[anthropic.Anthropic]:
    """A client of that server."""
    with client_of(v32) as made:
        yield made


def asked(recorded: Recorded, **fields: Any) -> dict[str, Any]:
    """A request for that answer."""
    thinking = ON if recorded.in_reasoning else {"type": "disabled"}
    return {**V32_FIELDS, "thinking": thinking, **fields}


def parts_of(message: Message) -> dict[str, Any]:
    """Reasoning, text and calls of a message."""
    found: dict[str, Any] = {"reasoning": "", "text": "", "calls": []}
    for block in message.content:
        if block.type == "thinking":
            found["reasoning"] += block.thinking
            assert block.signature == "unsigned"
        elif block.type == "text":
            found["text"] += block.text
        elif block.type == "tool_use":
            found["calls"].append((block.name, block.input))
    return found


@pytest.mark.parametrize("recorded", RECORDED.values(), ids=RECORDED)
def test_whole_and_streamed_messages(recorded: Recorded) -> None:
    calls = [(c.name, json.loads(c.arguments)) for c in recorded.message.tool_calls]
    expected = {
        "reasoning": recorded.message.reasoning,
        "text": recorded.message.content,
        "calls": calls,
    }
    with running(engine_of(recorded)) as live, client_of(live) as client:
        whole = client.messages.create(**asked(recorded))
        raw = list(client.messages.create(**asked(recorded), stream=True))
        with client.messages.stream(**asked(recorded)) as stream:
            streamed = stream.get_final_message()
    for message in (whole, streamed):
        assert parts_of(message) == expected
        assert message.stop_reason == ("tool_use" if calls else "end_turn")
        assert message.usage.output_tokens == len(recorded.tokens)
    kinds = [event.type for event in raw]
    assert (kinds[0], kinds[-2:]) == ("message_start", ["message_delta", "message_stop"])
    # blocks follow each other, each between its start and its stop
    places = [(e.type, e.index) for e in raw if e.type.startswith("content_block")]
    runs = list(dict.fromkeys(places))
    names = ("content_block_start", "content_block_delta", "content_block_stop")
    assert runs == [(name, i) for i in range(len(whole.content)) for name in names]
    assert places == sorted(places, key=lambda place: (place[1], names.index(place[0])))


def test_a_conversation_with_tools_goes_round(v32: Live, client: anthropic.Anthropic) -> None:
    """Blocks sent back as they came render to what the model had written."""
    for is_streamed in (False, True):
        if is_streamed:
            with client.messages.stream(**V32_FIELDS) as stream:
                answer: Any = stream.get_final_message()
        else:
            answer = client.messages.create(**V32_FIELDS)
        first = prompt_of(v32)
        results = [
            {
                "type": "tool_result",
                "tool_use_id": block.id,
                "content": [{"type": "text", "text": block.name}],
            }
            for block in answer.content
            if block.type == "tool_use"
        ]
        content = [*reversed(results), {"type": "text", "text": "And?"}]
        history = [
            *HI,
            {"role": "assistant", "content": answer.content},
            {"role": "user", "content": content[:-1]},
        ]
        client.messages.create(**{**V32_FIELDS, "messages": history})
        second = prompt_of(v32)
        assert second.startswith(first + V32.text)
        assert second.endswith("<result>now</result>\n</function_results>\n\n<think>")
        history[-1]["content"] = content
        client.messages.create(**{**V32_FIELDS, "messages": history})
        assert "And?" in prompt_of(v32)


def test_blocks_become_the_messages_of_a_chat(v32: Live, client: anthropic.Anthropic) -> None:
    text = {"type": "text", "text": "Hm", "cache_control": {"type": "ephemeral"}}
    messages: Any = [
        {"role": "user", "content": [text, {"type": "text", "text": "Hi"}]},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "I think", "signature": "any"},
                {"type": "redacted_thinking", "data": "x"},
                {"type": "text", "text": "Let "},
                {"type": "text", "text": "me."},
                {"type": "tool_use", "id": "a", "name": "now", "input": {}},
                {"type": "tool_use", "id": "b", "name": "now", "input": {"zone": "ü"}},
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "a", "content": "12"},
                {"type": "tool_result", "tool_use_id": "b", "content": "none", "is_error": True},
                {"type": "text", "text": "Well?"},
            ],
        },
    ]
    client.messages.create(**{**V32_FIELDS, "messages": messages, "system": [text]})
    as_blocks = prompt_of(v32)
    calls = [
        {"id": name, "type": "function", "function": {"name": "now", "arguments": arguments}}
        for name, arguments in (("a", "{}"), ("b", '{"zone": "ü"}'))
    ]
    chat = {
        "messages": [
            {"role": "system", "content": "Hm"},
            {"role": "user", "content": "Hm\nHi"},
            {
                "role": "assistant",
                "content": "Let me.",
                "reasoning_content": "I think",
                "tool_calls": calls,
            },
            {"role": "tool", "tool_call_id": "a", "content": "12"},
            {"role": "tool", "tool_call_id": "b", "content": "Error: none"},
            {"role": "user", "content": "Well?"},
        ],
        "tools": TOOLS,
        "chat_template_kwargs": {"thinking": True},
    }
    assert v32.http.post("/v1/chat/completions", json=chat).status_code == 200
    assert as_blocks == prompt_of(v32)
    counted = client.messages.count_tokens(
        model="demo", messages=messages, tools=OWN_TOOLS, thinking=V32_FIELDS["thinking"]
    )
    client.messages.create(**{**V32_FIELDS, "messages": messages})
    assert counted.input_tokens == len(prompt_of(v32).encode())


def test_thinking_is_switched_and_hidden(v32: Live, client: anthropic.Anthropic) -> None:
    def ending(**fields: Any) -> str:
        client.messages.create(
            model="demo", max_tokens=1, messages=V32_FIELDS["messages"], **fields
        )
        return prompt_of(v32)

    assert ending().endswith("</think>")
    assert ending(thinking={"type": "disabled"}).endswith("</think>")
    assert ending(thinking={"type": "adaptive"}).endswith("<think>")
    assert ending(output_config={"effort": "high"}).endswith("<think>")
    fields: Any = {"thinking": {"type": "disabled"}, "output_config": {"effort": "low"}}
    assert ending(**fields).endswith("</think>")
    hidden = client.messages.create(**{**V32_FIELDS, "thinking": {**ON, "display": "omitted"}})
    assert parts_of(hidden)["reasoning"] == ""
    assert hidden.usage.output_tokens == len(V32.tokens)


def test_an_answer_goes_on_with_the_last_message(v32: Live, client: anthropic.Anthropic) -> None:
    messages: Any = [*HI, {"role": "assistant", "content": "The answer is"}]
    client.messages.create(model="demo", max_tokens=4, messages=messages)
    assert prompt_of(v32).endswith("</think>The answer is")


def test_why_a_message_has_ended() -> None:
    fields: Any = {"model": "demo", "messages": HI}
    with running(FakeEngine()) as live, client_of(live) as client:
        cut = client.messages.create(**fields, max_tokens=2)
        assert (cut.stop_reason, cut.stop_sequence) == ("max_tokens", None)
        # more than the context has room for is no error, as in the API
        live.engine.words = ("a",) * 10_000
        full = client.messages.create(**fields, max_tokens=20_000)
        assert full.stop_reason == "model_context_window_exceeded"
        live.engine.words = ("Hello", " you", " END", " more")
        stopped = client.messages.create(**fields, max_tokens=9, stop_sequences=["END"])
        assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", "END")
        with client.messages.stream(**fields, max_tokens=9, stop_sequences=["END"]) as stream:
            assert stream.get_final_message().stop_sequence == "END"
            assert stream.get_final_text() == "Hello you"


def test_a_call_that_was_cut_off(client: anthropic.Anthropic) -> None:
    """Whole and streamed, its input is the part that has come."""
    for num_tokens in range(len(V32.tokens) // 2, len(V32.tokens), 3):
        fields = {**V32_FIELDS, "max_tokens": num_tokens}
        whole = client.messages.create(**fields)
        assert whole.stop_reason == "max_tokens"
        with client.messages.stream(**fields) as stream:
            streamed = stream.get_final_message()
        assert parts_of(whole) == parts_of(streamed)
        history = [*HI, {"role": "assistant", "content": whole.content}, *HI]
        client.messages.create(**{**V32_FIELDS, "messages": history})


def test_usage() -> None:
    renderer = RENDERERS["deepseek_v32"]
    engine = CountingEngine(words=V32.tokens, renderer=renderer, max_model_len=4096)
    with running(engine) as live, client_of(live) as client:
        with client.messages.stream(**V32_FIELDS) as stream:
            start = next(event for event in stream if event.type == "message_start")
            streamed = stream.get_final_message().usage
        whole = client.messages.create(**V32_FIELDS).usage
        num_prompt = len(prompt_of(live).encode())
    for usage in (start.message.usage, whole, streamed):
        assert (usage.input_tokens, usage.cache_read_input_tokens) == (1, num_prompt - 1)
    assert whole.output_tokens == streamed.output_tokens == len(V32.tokens)
    details = whole.to_dict()["output_tokens_details"]
    assert details == {"thinking_tokens": V32.tokens.index("</think>") + 1}


class City(BaseModel):
    """A form of answers."""

    name: str


def test_structured_output_is_parsed() -> None:
    fields: Any = {"model": "demo", "messages": HI, "max_tokens": 9}
    schema = {"type": "object", "properties": {"name": {"type": "string"}}}
    form = {"type": "json_schema", "schema": schema}
    with running(FakeEngine(words=('{"name":', ' "Rome"}'))) as live, client_of(live) as client:
        parsed = client.messages.parse(**fields, output_format=City)
        assert parsed.parsed_output == City(name="Rome")
        for own in ({"output_config": {"format": form}}, {"extra_body": {"output_format": form}}):
            client.messages.create(**fields, **own)
            params = list(live.engine.requests.values())[-1][1]
            assert params.structured_outputs.json == schema


def test_tool_choices(v32: Live, client: anthropic.Anthropic) -> None:
    def params(choice: Any) -> Any:
        client.messages.create(**{**V32_FIELDS, "tool_choice": choice})
        return list(v32.engine.requests.values())[-1][1]

    assert params({"type": "auto"}).structured_outputs is None
    assert params({"type": "any"}).structured_outputs is not None
    assert params({"type": "tool", "name": "now"}).structured_outputs is not None
    assert params({"type": "none"}).structured_outputs is None
    assert "get_weather" not in prompt_of(v32)
    one: Any = {"type": "auto", "disable_parallel_tool_use": True}
    answer = client.messages.create(**{**V32_FIELDS, "tool_choice": one})
    assert (len(parts_of(answer)["calls"]), answer.stop_reason) == (1, "tool_use")


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
        ({"max_tokens": 0}, "max_tokens: got 0"),
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
        ({"tools": [{"name": "w"}]}, "tools[0].input_schema: got null"),
        ({"tools": [{"name": "a b", "input_schema": {}}]}, "tools[0].name: got"),
        ({"tool_choice": {"type": "any"}}, "tool_choice: asks for a call"),
        ({"tool_choice": {"type": "tool"}}, "tool_choice.name: is missing"),
        ({"thinking": {"type": "between_tools"}}, "thinking.type: got"),
        ({"output_config": {"effort": "huge"}}, "output_config.effort: got"),
        ({"output_config": {"format": {"type": "x"}}}, "output_config.format.type: got"),
        ({"stop_sequences": [""]}, "stop_sequences: got"),
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


def test_a_failure_in_the_stream_is_an_error() -> None:
    engine = FakeEngine()
    fields: Any = {"model": "demo", "max_tokens": 9, "messages": HI}
    with running(engine) as live, client_of(live) as client:
        engine.nan_after = 2
        with pytest.raises(anthropic.APIStatusError, match="NaN"):
            list(client.messages.create(**fields, stream=True))
        engine.nan_after, engine.fail_after, engine.fails_alone = None, 0, True
        with pytest.raises(anthropic.APIStatusError) as raised:
            list(client.messages.create(**fields, stream=True))
        assert raised.value.body["error"]["type"] == "api_error"
        assert "secret" not in str(raised.value)
        with pytest.raises(anthropic.InternalServerError):
            client.messages.create(**fields)


def test_a_client_that_leaves_ends_its_message() -> None:
    engine = FakeEngine(step_s=0.01)
    body = {"max_tokens": 200, "messages": HI, "ignore_eos": True, "stream": True}
    with running(engine) as live:
        with live.http.stream("POST", "/v1/messages", json=body) as answer:
            next(answer.iter_lines())
        wait_until(lambda: len(engine.closed) == 1)


def test_every_field_of_the_client_is_known() -> None:
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
