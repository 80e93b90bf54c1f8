"""The Responses API over HTTP, by the client of the openai package."""

from __future__ import annotations

from typing import Any

import openai
import pytest
from openai.types.responses import Response
from pydantic import BaseModel

from fd_dsa.engine.output import RequestOutput
from tests.chat.recorded import RECORDED, TOOLS, Recorded
from tests.serve.conftest import Live, running, wait_until
from tests.serve.fake_engine import FakeEngine
from tests.serve.test_tool_calls import HI, RENDERERS, V32, engine_of, prompt_of

FUNCTIONS = [{"type": "function", **tool["function"]} for tool in TOOLS]
V32_FIELDS: dict[str, Any] = {
    "model": "demo",
    "input": "Hi",
    "tools": FUNCTIONS,
    "reasoning": {"effort": "high"},
}


def asked(recorded: Recorded, **fields: Any) -> dict[str, Any]:
    """A request for that answer."""
    effort = "high" if recorded.in_reasoning else "none"
    return {**V32_FIELDS, "reasoning": {"effort": effort}, **fields}


def parts_of(response: Response) -> dict[str, Any]:
    """Reasoning, text and calls of a response."""
    found: dict[str, Any] = {"reasoning": "", "calls": [], "text": response.output_text}
    for item in response.output:
        if item.type == "reasoning":
            found["reasoning"] += "".join(part["text"] for part in item.to_dict()["content"])
        elif item.type == "function_call":
            found["calls"].append((item.name, item.arguments))
    return found


@pytest.mark.parametrize("recorded", RECORDED.values(), ids=RECORDED)
def test_whole_and_streamed_responses(recorded: Recorded) -> None:
    expected = {
        "reasoning": recorded.message.reasoning,
        "calls": [(call.name, call.arguments) for call in recorded.message.tool_calls],
        "text": recorded.message.content,
    }
    with running(engine_of(recorded)) as live:
        whole = live.client.responses.create(**asked(recorded))
        assert parts_of(whole) == expected
        assert (whole.status, whole.error, whole.incomplete_details) == ("completed", None, None)
        assert {item.status for item in whole.output} == {"completed"}
        with live.client.responses.stream(**asked(recorded)) as stream:
            events = list(stream)
            streamed = stream.get_final_response()
    assert parts_of(streamed) == expected
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type for event in events]
    assert kinds[:2] == ["response.created", "response.in_progress"]
    assert kinds[-1] == "response.completed"
    check_items(events, streamed)


def check_items(events: list[Any], response: Response) -> None:
    """Each item is added, grows by its deltas, and is done, before the next one begins."""
    inner = {
        "message": ("content_part.added", "output_text", "content_part.done"),
        "reasoning": ("content_part.added", "reasoning_text", "content_part.done"),
        "function_call": ("function_call_arguments",),
    }
    rest = iter(events[2:-1])
    for index, item in enumerate(response.output):
        added, text = next(rest), ""
        assert (added.type, added.output_index) == ("response.output_item.added", index)
        assert (added.item.id, added.item.status) == (item.id, "in_progress")
        for step in inner[item.type]:
            event = next(rest)
            while event.type == f"response.{step}.delta":
                text += event.delta
                event = next(rest)
            assert (event.item_id, event.output_index) == (item.id, index)
            if "content_part" in step:
                assert (event.type, event.part.text) == (f"response.{step}", text)
            else:
                whole = event.arguments if item.type == "function_call" else event.text
                assert (event.type, whole) == (f"response.{step}.done", text)
        done = next(rest)
        assert done.type == "response.output_item.done"
        final = events[-1].response.output[index].to_dict()
        assert final == {**done.item.to_dict(), **final}
    assert next(rest, None) is None


def test_a_conversation_with_tools_goes_round(v32: Live) -> None:
    """Items sent back as they came render to what the model had written."""
    for is_streamed in (False, True):
        if is_streamed:
            with v32.client.responses.stream(**V32_FIELDS) as stream:
                answer: Response = stream.get_final_response()
        else:
            answer = v32.client.responses.create(**V32_FIELDS)
        first = prompt_of(v32)
        results = [
            {"type": "function_call_output", "call_id": item.call_id, "output": item.name}
            for item in answer.output
            if item.type == "function_call"
        ]
        history = [{"role": "user", "content": "Hi"}, *answer.output, *reversed(results)]
        v32.client.responses.create(**{**V32_FIELDS, "input": history})
        second = prompt_of(v32)
        assert second.startswith(first + V32.text)
        assert second.endswith("<result>now</result>\n</function_results>\n\n<think>")


def test_items_become_the_messages_of_a_chat(v32: Live) -> None:
    items = [
        {"role": "developer", "content": [{"type": "input_text", "text": "Be"}]},
        {"type": "message", "role": "user", "content": "Hi"},
        {"id": "rs_1", "type": "reasoning", "summary": [{"type": "summary_text", "text": "Hm"}]},
        {"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]},
        {"role": "assistant", "content": "Yes."},
        {"role": "user", "content": "Well?"},
        {"type": "reasoning", "id": "rs_2", "summary": [], "encrypted_content": "x"},
        {"type": "function_call", "call_id": "a", "name": "now", "arguments": "{}"},
        {"type": "function_call", "call_id": "b", "name": "now", "arguments": ""},
        {
            "type": "function_call_output",
            "call_id": "a",
            "output": [{"type": "input_text", "text": "12"}],
        },
        {"type": "function_call_output", "call_id": "b", "output": "13"},
    ]
    calls = [
        {"id": name, "type": "function", "function": {"name": "now", "arguments": arguments}}
        for name, arguments in (("a", "{}"), ("b", ""))
    ]
    messages = [
        {"role": "system", "content": "Speak"},
        {"role": "system", "content": "Be"},
        *HI,
        {"role": "assistant", "content": "No.", "reasoning_content": "Hm"},
        {"role": "assistant", "content": "Yes."},
        {"role": "user", "content": "Well?"},
        {"role": "assistant", "content": "", "tool_calls": calls},
        {"role": "tool", "tool_call_id": "a", "content": "12"},
        {"role": "tool", "tool_call_id": "b", "content": "13"},
    ]
    fields = {**V32_FIELDS, "input": items, "instructions": "Speak"}
    v32.client.responses.create(**fields)
    as_items = prompt_of(v32)
    chat = {"messages": messages, "tools": TOOLS, "reasoning_effort": "high"}
    assert v32.http.post("/v1/chat/completions", json=chat).status_code == 200
    assert as_items == prompt_of(v32)


def test_the_request_is_repeated_and_nothing_is_stored(v32: Live) -> None:
    fields = {
        "instructions": "Be brief.",
        "max_output_tokens": 3,
        "metadata": {"a": "b"},
        "parallel_tool_calls": False,
        "prompt_cache_key": "k",
        "safety_identifier": "s",
        "store": True,
        "temperature": 0.5,
        "tool_choice": "none",
        "top_p": 0.25,
        "truncation": "auto",
        "user": "u",
    }
    answer = v32.client.responses.create(**V32_FIELDS, extra_body=fields).to_dict()
    kept = {name: answer[name] for name in fields}
    assert kept == {**fields, "store": False, "truncation": "disabled"}
    assert (answer["object"], answer["model"]) == ("response", "demo")
    assert answer["tools"] == FUNCTIONS
    params = list(v32.engine.requests.values())[-1][1]
    assert (params.max_tokens, params.temperature, params.top_p) == (3, 0.5, 0.25)
    found = v32.http.get(f"/v1/responses/{answer['id']}")
    assert found.status_code == 404
    assert "storage of responses is out of its scope" in found.json()["error"]["message"]


@pytest.mark.parametrize("fields", [{}, {"reasoning": None}, {"tool_choice": "none"}])
def test_tokens_of_an_input_are_counted(v32: Live, fields: dict[str, Any]) -> None:
    body = {**V32_FIELDS, "instructions": "Be short.", **fields}
    usage = v32.http.post("/v1/responses", json=body).json()["usage"]
    num_requests = len(v32.engine.requests)
    for more in ({}, {"max_output_tokens": 5}, {"stream": True}):
        counted = v32.http.post("/v1/responses/input_tokens", json={**body, **more})
        assert counted.json() == {
            "object": "response.input_tokens",
            "input_tokens": usage["input_tokens"],
        }
    assert len(v32.engine.requests) == num_requests


def test_refusals_of_a_count_name_the_field(v32: Live) -> None:
    for fields, param in (
        ({"input": []}, "input"),
        ({"input": "a" * 9999}, "input"),
        ({"input": "a", "previous_response_id": "r"}, "previous_response_id"),
        ({"input": "a", "model": "x"}, "model"),
    ):
        answer = v32.http.post("/v1/responses/input_tokens", json=fields)
        assert answer.status_code == (404 if param == "model" else 400)
        assert answer.json()["error"]["param"] == param


def test_cut_by_its_length(v32: Live) -> None:
    for num_tokens in (2, len(V32.tokens) // 2):
        fields = {**V32_FIELDS, "max_output_tokens": num_tokens}
        whole = v32.client.responses.create(**fields)
        assert whole.status == "incomplete"
        assert whole.incomplete_details is not None
        assert whole.incomplete_details.reason == "max_output_tokens"
        statuses = [item.status for item in whole.output]
        assert statuses == ["completed"] * (len(statuses) - 1) + ["incomplete"]
        assert whole.usage is not None
        assert whole.usage.output_tokens == num_tokens
        events = list(v32.client.responses.create(**fields, stream=True))
        assert events[-1].type == "response.incomplete"
        assert parts_of(events[-1].response) == parts_of(whole)
        # what was cut is valid input
        history = [{"role": "user", "content": "Hi"}, *whole.output, *HI]
        v32.client.responses.create(**{**V32_FIELDS, "input": history})


class CountingEngine(FakeEngine):
    """An engine whose prompts were cached up to their last token."""

    def make_output(self, *args: Any) -> RequestOutput:
        output = super().make_output(*args)
        output.num_cached_tokens = len(output.prompt_token_ids) - 1
        return output


def test_usage() -> None:
    renderer = RENDERERS["deepseek_v32"]
    engine = CountingEngine(words=V32.tokens, renderer=renderer, max_model_len=4096)
    with running(engine) as live:
        with live.client.responses.stream(**V32_FIELDS) as stream:
            streamed = stream.get_final_response().usage
        usage = live.client.responses.create(**V32_FIELDS).usage
        num_prompt = len(prompt_of(live).encode())
    assert usage is not None
    assert streamed == usage
    num_thoughts = V32.tokens.index("</think>") + 1
    assert usage.input_tokens == num_prompt
    assert usage.input_tokens_details.cached_tokens == num_prompt - 1
    assert usage.output_tokens == len(V32.tokens)
    assert usage.output_tokens_details.reasoning_tokens == num_thoughts
    assert usage.total_tokens == num_prompt + len(V32.tokens)


class City(BaseModel):
    """A form of answers."""

    name: str
    people: int


def test_structured_output_is_parsed() -> None:
    with running(FakeEngine(words=('{"name": "Rome"', ', "people": 3}'))) as live:
        parsed = live.client.responses.parse(model="demo", input="Hi", text_format=City)
        assert parsed.output_parsed == City(name="Rome", people=3)
        with live.client.responses.stream(model="demo", input="Hi", text_format=City) as stream:
            assert stream.get_final_response().output_parsed == City(name="Rome", people=3)
        params = list(live.engine.requests.values())[-1][1]
        assert params.structured_outputs.json == City.model_json_schema() | {
            "additionalProperties": False
        }
        for form, expected in (("json_object", True), ("text", None)):
            text: Any = {"format": {"type": form}}
            live.client.responses.create(model="demo", input="Hi", text=text)
            outputs = list(live.engine.requests.values())[-1][1].structured_outputs
            assert (outputs and outputs.json_object) == expected


def test_tool_choices(v32: Live) -> None:
    def params(**fields: Any) -> Any:
        v32.client.responses.create(**{**V32_FIELDS, **fields})
        return list(v32.engine.requests.values())[-1][1]

    assert params(tool_choice="auto").structured_outputs is None
    assert params(tool_choice="required").structured_outputs is not None
    named = {"type": "function", "name": "now"}
    assert params(tool_choice=named).structured_outputs.grammar is not None
    allowed = {"type": "allowed_tools", "mode": "auto", "tools": [named]}
    assert params(tool_choice=allowed).structured_outputs is None
    assert "get_weather" not in prompt_of(v32)
    one = v32.client.responses.create(**{**V32_FIELDS, "parallel_tool_calls": False})
    assert len(parts_of(one)["calls"]) == 1


def test_a_failure_in_the_stream_fails_the_response() -> None:
    engine = FakeEngine()
    with running(engine) as live:
        engine.nan_after = 2
        events = list(live.client.responses.create(model="demo", input="Hi", stream=True))
        assert events[-1].type == "response.failed"
        failed = events[-1].response
        assert (failed.status, failed.error.code) == ("failed", "server_error")
        assert "NaN" in failed.error.message
        assert failed.output_text == "Hello wörld"
        engine.nan_after, engine.fail_after, engine.fails_alone = None, 1, True
        last = list(live.client.responses.create(model="demo", input="Hi", stream=True))[-1]
        assert last.type == "response.failed"
        assert "secret" not in last.response.error.message
        with pytest.raises(openai.InternalServerError):
            live.client.responses.create(model="demo", input="Hi")


def test_a_client_that_leaves_ends_its_response() -> None:
    engine = FakeEngine(step_s=0.01)
    with running(engine) as live:
        fields = {"input": "Hi", "stream": True, "ignore_eos": True}
        with live.http.stream("POST", "/v1/responses", json=fields) as answer:
            assert answer.headers["content-type"].startswith("text/event-stream")
            next(answer.iter_lines())
        wait_until(lambda: len(engine.closed) == 1)
        assert engine.closed[0].startswith("resp_")
