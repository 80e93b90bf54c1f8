"""The Messages API over HTTP, by the client of the anthropic package."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest
from pydantic import BaseModel

from tests.chat.recorded import RECORDED, SCHEMAS, TOOLS, Recorded
from tests.serve.conftest import Live, running, wait_until
from tests.serve.fake_engine import FakeEngine
from tests.serve.test_responses import CountingEngine
from tests.serve.test_tool_calls import HI, RENDERERS, V32, engine_of, prompt_of

if TYPE_CHECKING:
    # a large package, which other workers need not load
    import anthropic
    from anthropic.types import Message

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
    import anthropic

    fields = {"api_key": "none", "max_retries": 0, **kwargs}
    with anthropic.Anthropic(base_url=live.url, **fields) as client:
        yield client


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
    more: Any = {"betas": ["x"], "context_management": {"edits": []}}
    client.beta.messages.create(**{**V32_FIELDS, "messages": messages}, **more)
    assert counted.input_tokens == len(prompt_of(v32).encode())


def test_a_whole_body_of_a_message_is_counted(v32: Live) -> None:
    body: dict[str, Any] = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 5}
    answer = v32.http.post("/v1/messages", json=body)
    usage = answer.json()["usage"]
    for more in ({}, {"max_tokens": 0}, {"stream": True, "stop_sequences": ["a"]}):
        counted = v32.http.post("/v1/messages/count_tokens", json={**body, **more})
        total = usage["input_tokens"] + usage["cache_read_input_tokens"]
        assert counted.json() == {"input_tokens": total}
        assert "X-Ignored-Fields" not in counted.headers


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
        # an explicit number counts more than the folder's default
        live.engine.sampling_defaults = {"max_tokens": 3}
        live.engine.words = ("a",) * 100
        cut = client.messages.create(**fields, max_tokens=50)
        assert (cut.stop_reason, cut.usage.output_tokens) == ("max_tokens", 50)
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


def test_a_failure_in_the_stream_is_an_error() -> None:
    import anthropic

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
