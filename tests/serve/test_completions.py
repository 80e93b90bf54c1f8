"""/v1/completions, through the real OpenAI client; every parameter of a request is read."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
from pydantic import BaseModel

from fd_dsa.engine.sampling_params import SamplingParams
from fd_dsa.engine.structured_outputs import StructuredOutputsParams
from fd_dsa.serve.completions import CompletionRequest
from fd_dsa.serve.protocol.chat import ChatCompletionRequest
from fd_dsa.serve.protocol.generation import SAMPLING_FIELDS
from fd_dsa.serve.protocol.structured import STRUCTURED_FIELDS
from tests.serve.conftest import Live, running
from tests.serve.fake_engine import WORDS, FakeEngine
from tests.serve.test_errors import complete

REPLY = "".join(WORDS)


def test_text_prompt(live: Live) -> None:
    result = live.client.completions.create(model="demo", prompt="abc", max_tokens=100)
    assert result.object == "text_completion"
    assert result.id.startswith("cmpl-")
    assert result.model == "demo"
    assert result.choices[0].text == REPLY
    assert result.choices[0].finish_reason == "stop"
    assert result.usage is not None
    # three bytes and the special token of `add_special_tokens`
    assert result.usage.prompt_tokens == 4
    assert result.usage.completion_tokens == len(WORDS)
    assert result.usage.total_tokens == 4 + len(WORDS)


def test_lists_give_one_choice_per_prompt(live: Live) -> None:
    for prompt in (["abc", "de"], [[97, 98, 99, 5], [100, 101, 6]]):
        result = live.client.completions.create(model="demo", prompt=prompt, max_tokens=2)
        assert [c.index for c in result.choices] == [0, 1]
        assert [c.text for c in result.choices] == ["Hello wörld"] * 2
        assert [c.finish_reason for c in result.choices] == ["length"] * 2
        assert result.usage is not None
        assert (result.usage.prompt_tokens, result.usage.completion_tokens) == (7, 4)


def test_token_ids_reach_the_engine_as_they_are(live: Live) -> None:
    live.engine.requests.clear()
    live.client.completions.create(model="demo", prompt=[1, 2, 256], max_tokens=1)
    ((prompt, _),) = live.engine.requests.values()
    assert prompt == [1, 2, 256]


def test_wire_format_of_a_stream(live: Live) -> None:
    """`data: {json}` events, [DONE] at the end, usage null in every chunk before the last."""
    body = {"prompt": ["ab", "c"], "max_tokens": 3, "stream": True}
    body["stream_options"] = {"include_usage": True}
    answer = live.http.post("/v1/completions", json=body)
    assert answer.headers["content-type"].startswith("text/event-stream")
    events = answer.text.split("\n\n")
    assert events[-1] == ""
    assert events[-2] == "data: [DONE]"
    assert all(event.startswith("data: {") for event in events[:-2])
    assert all('"usage":null' in event for event in events[:-3])
    last = json.loads(events[-3].removeprefix("data: "))
    assert last["choices"] == []
    assert (last["usage"]["prompt_tokens"], last["usage"]["completion_tokens"]) == (5, 6)


def test_defaults_of_the_model_folder_fill_what_a_request_leaves_out() -> None:
    engine = FakeEngine()
    engine.sampling_defaults = {"temperature": 0.0, "top_k": 5}
    with running(engine) as live:
        live.client.completions.create(model="demo", prompt="a")
        live.client.completions.create(model="demo", prompt="a", temperature=0.5)
        first, second = (params for _, params in live.engine.requests.values())
        assert (first.temperature, first.top_k, first.top_p) == (0.0, 5, 1.0)
        assert (second.temperature, second.top_k) == (0.5, 5)


def test_null_is_the_default_of_every_field(live: Live) -> None:
    names = ("model", "stream", "stream_options", "max_tokens", "temperature", "top_p", "top_k")
    more = ("seed", "stop", "ignore_eos", "n", "logprobs", "echo", "suffix", "logit_bias", "user")
    answer = live.http.post(
        "/v1/completions", json={"prompt": "a", **dict.fromkeys((*names, *more))}
    )
    assert answer.status_code == 200
    # 16 is the default, the scripted reply is shorter
    assert answer.json()["choices"][0]["text"] == REPLY


def test_default_of_max_tokens_is_sixteen_or_what_is_left() -> None:
    with running(FakeEngine(max_model_len=30)) as live:
        body = {"prompt": [1] * 4, "ignore_eos": True}
        answer = live.http.post("/v1/completions", json=body).json()
        assert answer["usage"]["completion_tokens"] == 16
        answer = live.http.post("/v1/completions", json={**body, "prompt": [1] * 25}).json()
        assert answer["usage"]["completion_tokens"] == 5


def test_neutral_values_of_unsupported_fields_are_accepted(live: Live) -> None:
    fields = {"metadata": {"a": "b"}, "store": True, "of_another_server": [1]}
    answer = live.client.completions.create(
        model="default", prompt="a", n=1, best_of=1, user="somebody", extra_body=fields
    )
    assert answer.model == "demo"


@pytest.mark.parametrize("given", ["abc-123", None, "x" * 200, "two words"])
def test_request_id_is_echoed_or_made(live: Live, given: str | None) -> None:
    headers = {} if given is None else {"X-Request-Id": given}
    answer = live.http.post("/v1/completions", json={"prompt": "a"}, headers=headers)
    returned = answer.headers["x-request-id"]
    if given == "abc-123":
        assert returned == given
    else:
        assert len(returned) == 32
        assert returned != given


# field of SamplingParams -> a value that is not its default, as a request of that name has it
SENT: dict[str, Any] = {
    "n": 2,
    "temperature": 0.5,
    "top_p": 0.25,
    "top_k": 3,
    "min_p": 0.125,
    "presence_penalty": 0.5,
    "frequency_penalty": -1.5,
    "repetition_penalty": 1.25,
    "logit_bias": {"3": 5},
    "bad_words": ["bad"],
    "bad_words_token_ids": [5],
    "min_tokens": 2,
    "max_tokens": 9,
    "stop": ["never"],
    "stop_token_ids": [6],
    "include_stop_str_in_output": True,
    "ignore_eos": True,
    "skip_special_tokens": False,
    "logprobs": 4,
    "prompt_logprobs": 5,
    "structured_outputs": {"regex": "a"},
    "seed": 7,
    "cache_salt": "salt",
    "return_topk_positions": True,
}
READ_AS = {"logit_bias": {3: 5}, "structured_outputs": StructuredOutputsParams(regex="a")}
# of Python callers and of the server itself
NOT_SENT = {"skip_reading_prefix_cache", "kept_special_token_ids"}
# what the server reads itself; with another name or in another form a parameter of the engine
BY_THE_SERVER = {"model", "stream", "stream_options", "best_of", "return_token_ids"}
OF_COMPLETIONS = {"prompt", "echo", "logprobs"}
OF_CHAT = {
    *("messages", "max_completion_tokens", "logprobs", "top_logprobs", "tools", "tool_choice"),
    *("parallel_tool_calls", "reasoning_effort", "include_reasoning", "chat_template"),
    *("chat_template_kwargs", "add_generation_prompt", "continue_final_message"),
}


@pytest.mark.parametrize(
    "name", [f.name for f in dataclasses.fields(SamplingParams) if f.name not in NOT_SENT]
)
def test_each_parameter_of_the_engine_can_be_sent(live: Live, name: str) -> None:
    live.engine.requests.clear()
    assert complete(live, **{name: SENT[name]}).status_code == 200
    ((_, params),) = live.engine.requests.values()
    assert getattr(params, name) == READ_AS.get(name, SENT[name])
    assert getattr(params, name) != getattr(SamplingParams(), name)


@pytest.mark.parametrize(
    ("model", "own"), [(CompletionRequest, OF_COMPLETIONS), (ChatCompletionRequest, OF_CHAT)]
)
def test_each_field_of_a_request_is_read_by_somebody(model: type[BaseModel], own: set[str]) -> None:
    read = {*SAMPLING_FIELDS, *STRUCTURED_FIELDS, *BY_THE_SERVER, *own}
    assert read == model.model_fields.keys()
