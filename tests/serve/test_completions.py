"""/v1/completions, through the real OpenAI client and a real server."""

from __future__ import annotations

import json

import pytest

from tests.serve.conftest import Live, running
from tests.serve.fake_engine import WORDS, FakeEngine

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


def test_stream_equals_the_whole_answer(live: Live) -> None:
    chunks = list(
        live.client.completions.create(model="demo", prompt=["a", "b"], max_tokens=100, stream=True)
    )
    for index in (0, 1):
        own = [c.choices[0] for c in chunks if c.choices[0].index == index]
        assert "".join(c.text for c in own) == REPLY
        assert [c.finish_reason for c in own[:-1]] == [None] * (len(own) - 1)
        assert own[-1].finish_reason == "stop"
    assert len({c.id for c in chunks}) == 1
    assert all(c.usage is None for c in chunks)


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
