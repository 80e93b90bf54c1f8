"""Completions and chat completions through the real OpenAI client; every parameter is read."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import openai
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


def test_the_model_folder_proposes_how_long_answers_are() -> None:
    engine = FakeEngine(max_model_len=60)
    engine.sampling_defaults = {"max_tokens": 20}
    with running(engine) as live:
        question = [{"role": "user", "content": "a"}]
        sent: list[tuple[str, dict[str, object], int]] = [
            ("chat/completions", {"messages": question}, 20),
            ("chat/completions", {"messages": question, "max_tokens": 25}, 25),
            ("chat/completions", {"messages": question, "max_completion_tokens": 7}, 7),
            ("responses", {"input": "a"}, 20),
            ("completions", {"prompt": "a"}, 16),
            ("completions", {"prompt": "a", "max_tokens": 25}, 25),
        ]
        for path, body, _ in sent:
            assert live.http.post(f"/v1/{path}", json=body).status_code == 200
        asked = [params.max_tokens for _, params in live.engine.requests.values()]
        assert asked == [expected for *_, expected in sent]
        engine.sampling_defaults = {"max_tokens": 7}
        assert live.http.post("/v1/completions", json={"prompt": "b"}).is_success
        assert list(live.engine.requests.values())[-1][1].max_tokens == 7
        # a proposal beyond the context is no error
        engine.sampling_defaults = {"max_tokens": 1000}
        assert live.http.post("/v1/chat/completions", json={"messages": question}).is_success


def test_neutral_values_of_unsupported_fields_are_accepted(live: Live) -> None:
    fields = {"metadata": {"a": "b"}, "store": True, "of_another_server": [1]}
    answer = live.client.completions.create(
        model="default", prompt="a", n=1, best_of=1, user="somebody", extra_body=fields
    )
    assert answer.model == "demo"
    question = {"role": "user", "content": "Hi"}
    messages = [question, {"role": "assistant", "content": []}, question]
    answer = live.http.post("/v1/chat/completions", json={"model": "", "messages": messages})
    assert answer.json()["model"] == "demo"


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
    "speculative": False,
    "return_topk_positions": True,
}
READ_AS = {"logit_bias": {3: 5}, "structured_outputs": StructuredOutputsParams(regex="a")}
# of Python callers and of the server itself
NOT_SENT = {
    *("skip_reading_prefix_cache", "kept_special_token_ids", "reasoning"),
    "constrain_reasoning",
}
# what the server reads itself; with another name or in another form a parameter of the engine
BY_THE_SERVER = {"model", "stream", "stream_options", "best_of", "return_token_ids"}
OF_COMPLETIONS = {"prompt", "echo", "logprobs"}
OF_CHAT = {
    *("messages", "max_completion_tokens", "logprobs", "top_logprobs", "tools", "tool_choice"),
    *("parallel_tool_calls", "reasoning_effort", "include_reasoning", "chat_template"),
    *("enable_thinking", "thinking"),
    *("chat_template_kwargs", "add_generation_prompt", "continue_final_message"),
    "constrain_reasoning",
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


HELLO = [{"role": "user", "content": "Hi"}]


def prompt_text(live: Live) -> str:
    """The text of the only prompt that the engine has got."""
    ((prompt, _),) = live.engine.requests.values()
    live.engine.requests.clear()
    return bytes(prompt).decode()


def test_answer(live: Live) -> None:
    live.engine.requests.clear()
    result = live.client.chat.completions.create(model="alias", messages=HELLO)
    assert result.object == "chat.completion"
    assert result.id.startswith("chatcmpl-")
    assert result.model == "alias"
    assert result.choices[0].message.role == "assistant"
    assert result.choices[0].message.content == REPLY
    assert result.choices[0].finish_reason == "stop"
    prompt = prompt_text(live)
    assert prompt == "user:Hi\n>"
    assert result.usage is not None
    assert result.usage.prompt_tokens == len(prompt)
    assert result.usage.total_tokens == len(prompt) + len(WORDS)


def test_stream_has_role_texts_finish_and_usage(live: Live) -> None:
    chunks = list(
        live.client.chat.completions.create(
            model="demo", messages=HELLO, stream=True, stream_options={"include_usage": True}
        )
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    assert {c.object for c in chunks} == {"chat.completion.chunk"}
    texts = [c.choices[0].delta.content or "" for c in chunks[:-1]]
    assert "".join(texts) == REPLY
    reasons = [c.choices[0].finish_reason for c in chunks[:-1]]
    assert reasons == [None] * (len(reasons) - 1) + ["stop"]
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == len(WORDS)
    assert len({c.id for c in chunks}) == 1


def test_text_parts_and_developer_role(live: Live) -> None:
    live.engine.requests.clear()
    # a string is a part too, as in vLLM
    parts: Any = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}, "three"]
    live.client.chat.completions.create(
        model="demo",
        messages=[{"role": "developer", "content": "Rule"}, {"role": "user", "content": parts}],
    )
    assert prompt_text(live) == "system:Rule\nuser:one\ntwo\nthree\n>"


def test_a_result_of_a_tool_may_be_empty(live: Live) -> None:
    """As in the Responses and Messages APIs, a tool may return no parts."""
    call = {"id": "a", "function": {"name": "f", "arguments": ""}}
    called = {"role": "assistant", "content": [], "tool_calls": [call]}
    for content in ("", []):
        result = {"role": "tool", "tool_call_id": "a", "content": content}
        body = {"messages": [*HELLO, called, result]}
        assert live.http.post("/v1/chat/completions", json=body).status_code == 200
        assert prompt_text(live).endswith("assistant:\ntool:\n>")


def test_output_limit_is_the_rest_of_the_context_by_default() -> None:
    with running(FakeEngine(max_model_len=40)) as live:
        body = {"messages": HELLO, "ignore_eos": True}
        usage = live.http.post("/v1/chat/completions", json=body).json()["usage"]
        assert usage["total_tokens"] == 40


@pytest.mark.parametrize(
    ("fields", "length"),
    [
        ({"max_tokens": 3}, 3),
        ({"max_completion_tokens": 2}, 2),
        ({"max_tokens": 5, "max_completion_tokens": 4}, 4),
    ],
)
def test_both_names_of_the_output_limit(live: Live, fields: dict[str, int], length: int) -> None:
    result = live.client.chat.completions.create(model="demo", messages=HELLO, **fields)
    assert result.usage is not None
    assert result.usage.completion_tokens == length
    assert result.choices[0].finish_reason == "length"


def test_a_refused_limit_has_the_name_that_the_client_sent(live: Live) -> None:
    for name in ("max_tokens", "max_completion_tokens"):
        for number in (0, -(2**40)):
            body = {"messages": HELLO, name: number}
            error = live.http.post("/v1/chat/completions", json=body).json()["error"]
            assert error["message"] == f"{name}: got {number}; must be an integer >= 1"
            assert error["param"] == name


def test_without_a_template_completions_work_and_chat_says_why() -> None:
    with running(FakeEngine(chat=False)) as live:
        assert live.client.completions.create(model="demo", prompt="a").choices[0].text == REPLY
        with pytest.raises(openai.BadRequestError, match="no chat template") as caught:
            live.client.chat.completions.create(model="demo", messages=HELLO)
        assert caught.value.param == "messages"


def test_refusal_of_the_template_is_a_bad_request(live: Live) -> None:
    messages = [*HELLO, {"role": "assistant", "content": "x"}]
    with pytest.raises(openai.BadRequestError, match="must be the user's") as caught:
        live.client.chat.completions.create(model="demo", messages=messages)
    assert caught.value.param == "messages"


def test_a_template_of_the_request_needs_trust() -> None:
    body = {"messages": HELLO, "chat_template": "{{ bos_token }}{{ messages[0].content }}!{{ k }}"}
    kwargs = {"chat_template_kwargs": {"k": 3}}
    with running(FakeEngine()) as live:
        error = live.http.post("/v1/chat/completions", json=body).json()["error"]
        assert error["param"] == "chat_template"
        assert "--trust-request-chat-template" in error["message"]
    with running(FakeEngine(), trust_request_chat_template=True) as live:
        assert live.http.post("/v1/chat/completions", json={**body, **kwargs}).status_code == 200
        assert prompt_text(live) == "<bos>Hi!3"
        broken = {**body, "chat_template": "{% for %}"}
        error = live.http.post("/v1/chat/completions", json=broken).json()["error"]
        assert error["param"] == "chat_template"
        giant = {**body, "chat_template": "{{ 'a' * 10**11 }}"}
        answer = live.http.post("/v1/chat/completions", json=giant)
        assert answer.status_code == 400 and "than there is memory for" in answer.text
        assert live.http.post("/v1/chat/completions", json={**body, **kwargs}).status_code == 200
