"""Every failure is an OpenAI error object with the right status, and never a raw dump."""

from __future__ import annotations

import json
import math
from typing import Any

import openai
import pytest
from pydantic import BaseModel

from fd_dsa.serve.body import LENIENT_BYTES
from fd_dsa.serve.completions import CompletionRequest
from fd_dsa.serve.protocol.chat import ChatCompletionRequest
from fd_dsa.serve.protocol.known_fields import (
    IGNORED,
    REFUSED_IN_CHAT,
    REFUSED_IN_COMPLETIONS,
)
from fd_dsa.serve.tokenization import DetokenizeRequest, TokenizeRequest
from tests.serve.conftest import Live, running
from tests.serve.fake_engine import FakeEngine

HI = [{"role": "user", "content": "Hi"}]


def error_of(answer: Any, status: int) -> dict[str, Any]:
    """The error object of an answer, after checks that hold for all of them."""
    assert answer.status_code == status, answer.text
    assert answer.headers["x-request-id"]
    content = answer.json()
    assert list(content) == ["error"]
    error: dict[str, Any] = content["error"]
    assert set(error) == {"message", "type", "param", "code"}
    for word in ("pydantic", "Traceback", "'loc'", "'ctx'", "function-plain"):
        assert word not in answer.text
    return error


def complete(live: Live, **fields: Any) -> Any:
    """POST a completion of "a" with further fields."""
    return live.http.post("/v1/completions", json={"prompt": "a", **fields})


def test_fields_of_other_servers_are_refused_unless_they_change_nothing(live: Live) -> None:
    value = {"no": "neutral value"}
    bodies = [
        *(("/v1/completions", {"prompt": "a", name: value}) for name in REFUSED_IN_COMPLETIONS),
        *(("/v1/chat/completions", {"messages": HI, name: value}) for name in REFUSED_IN_CHAT),
        # 0 is not false
        ("/v1/chat/completions", {"messages": HI, "add_special_tokens": 0}),
    ]
    for path, body in bodies:
        error = error_of(live.http.post(path, json=body), 400)
        assert error["param"] == list(body)[1]
        assert "not supported, only" in error["message"]
        assert error["type"] == "invalid_request_error"
    ignored = {name: {"any": ["value"]} for name in IGNORED}
    for path, needed, table in (
        ("/v1/completions", {"prompt": "a"}, REFUSED_IN_COMPLETIONS),
        ("/v1/chat/completions", {"messages": HI}, REFUSED_IN_CHAT),
    ):
        rules = [(name, rule.neutral) for name, rule in table.items() if rule.neutral]
        for fields in (dict.fromkeys(table), {n: v[0] for n, v in rules}, ignored):
            # an object may have at most 128 fields
            for begin in range(0, len(fields), 100):
                some = dict(list(fields.items())[begin : begin + 100])
                answer = live.http.post(path, json={**some, **needed})
                assert answer.status_code == 200, answer.text
                assert "x-ignored-fields" not in answer.headers


@pytest.mark.parametrize(
    ("path", "model", "needed"),
    [
        ("/v1/completions", CompletionRequest, {"prompt": "a"}),
        ("/v1/chat/completions", ChatCompletionRequest, {"messages": HI}),
        ("/tokenize", TokenizeRequest, {"prompt": "a"}),
        ("/detokenize", DetokenizeRequest, {"tokens": [1]}),
    ],
)
def test_wrong_types_are_told_in_our_words(
    live: Live, path: str, model: type[BaseModel], needed: dict[str, Any]
) -> None:
    for name in model.model_fields:
        error = error_of(live.http.post(path, json={**needed, name: [[]]}), 400)
        assert error["message"].startswith(error["param"])
        assert error["param"].split("[")[0] == name
        assert "allowed" in error["message"]
        for word in ("nput", "nstance", "alidation", "ictionary", "another value"):
            assert word not in error["message"]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"temperature": -1}, "temperature"),
        ({"temperature": math.nan}, "temperature"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": "5"}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"max_tokens": 10_000}, "max_tokens"),
        ({"stop": [1]}, "stop"),
        ({"stop": ""}, "stop"),
        ({"ignore_eos": 1}, "ignore_eos"),
        ({"response_format": "json"}, "response_format"),
        ({"response_format": {"type": "xml"}}, "response_format"),
        ({"response_format": {"type": ["text"]}}, "response_format"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"response_format": {"type": "json_schema", "json_schema": {}}}, "response_format"),
        ({"structured_outputs": []}, "structured_outputs"),
        ({"structured_outputs": {}}, "structured_outputs"),
        ({"structured_outputs": {"xml": "a"}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "a", "json": {}}}, "structured_outputs"),
        ({"guided_choice": []}, "guided_choice"),
        ({"guided_regex": ""}, "guided_regex"),
        ({"guided_regex": "a" * 40_000}, "guided_regex"),
        ({"guided_json": {"a": "a" * 40_000}}, "guided_json"),
        ({"guided_json": 5}, "guided_json"),
        ({"guided_regex": "\ud800"}, "guided_regex"),
        ({"guided_json_object": True, "guided_regex": "a"}, "guided_regex"),
        ({"response_format": {"type": "json_object"}, "guided_json": "{}"}, "guided_json"),
        ({"n": 10**40}, "n"),
        ({"n": 2, "best_of": 3}, "best_of"),
        ({"best_of": 0}, "best_of"),
        ({"logprobs": True}, "logprobs"),
        ({"logprobs": -1, "echo": True}, "logprobs"),
        ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"1" * 5000: 1}}, "logit_bias"),
        ({"logit_bias": {"1": True}}, "logit_bias"),
        ({"logit_bias": {"5": 1, "05": 2}}, "logit_bias"),
        ({"logit_bias": [1]}, "logit_bias"),
        ({"logit_bias": {"\ud800": 1}}, "logit_bias"),
        ({"stop": ["\ud800", ""]}, "stop"),
        ({"stop": "\ud800"}, "stop"),
        ({"bad_words": ["\ud800"]}, "bad_words"),
        ({"bad_words_token_ids": ["a"]}, "bad_words_token_ids[0]"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": ["a", 1]}, "prompt"),
        ({"prompt": [1.5]}, "prompt"),
        ({"prompt": [True]}, "prompt"),
        ({"prompt": {"a": 1}}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"prompt": [300]}, "prompt"),
        ({"prompt": "\ud800"}, "prompt"),
    ],
)
def test_bad_values(live: Live, fields: dict[str, Any], param: str) -> None:
    for stream in (False, True):
        # json.dumps escapes the lone surrogate, which a client library would not send
        content = json.dumps({"prompt": "a", "stream": stream, **fields})
        headers = {"Content-Type": "application/json"}
        answer = live.http.post("/v1/completions", content=content, headers=headers)
        error = error_of(answer, 400)
        assert error["param"] == param
        assert error["message"].startswith(param)


def test_a_field_name_that_is_no_unicode_is_told(live: Live) -> None:
    headers = {"Content-Type": "application/json"}
    answer = live.http.post("/v1/completions", content=r'{"\ud800": 1}', headers=headers)
    message = error_of(answer, 400)["message"]
    assert message == r'body: got "\ud800"; allowed is valid Unicode'


def test_an_integer_of_more_than_64_bits_is_named(live: Live) -> None:
    for seed in (2**64, -(2**70)):
        error = error_of(complete(live, seed=seed), 400)
        assert error["message"].endswith("; allowed is an integer of at most 64 bits")


def test_stream_options_need_a_stream(live: Live) -> None:
    error = error_of(complete(live, stream_options={"include_usage": True}), 400)
    assert error["param"] == "stream_options"


def test_prompt_beyond_the_context_names_the_numbers(live: Live) -> None:
    for fields in ({}, {"max_tokens": 5}, {"stream": True}):
        error = error_of(complete(live, prompt=[1] * 256, **fields), 400)
        assert (error["code"], error["param"]) == ("context_length_exceeded", "prompt")
        assert "256 tokens" in error["message"]
        assert "--max-model-len" in error["message"]
    error = error_of(complete(live, prompt=[1] * 200, max_tokens=57), 400)
    assert error["code"] == "context_length_exceeded"
    for number in ("57", "200", "256", "56"):
        assert number in error["message"]
    assert complete(live, prompt=[1] * 200, max_tokens=56).status_code == 200
    body = {"messages": [{"role": "user", "content": "x" * 300}]}
    error = error_of(live.http.post("/v1/chat/completions", json=body), 400)
    assert (error["code"], error["param"]) == ("context_length_exceeded", "messages")


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        (["a", "", "b"], "prompt[1]: has no tokens"),
        (["a", "b", "\ud800"], "prompt[2]: "),
        (["a", "x" * 9999], "prompt[1]: has 9999 bytes of text"),
        ([[1], [1] * 300], "prompt[1]: the prompt has 300 tokens"),
        ([[1], [999]], "prompt[1]: prompt has the token id 999"),
        ([[999]], "prompt: prompt has the token id 999"),
    ],
)
def test_a_bad_prompt_of_several_is_named(live: Live, prompts: list[Any], message: str) -> None:
    content = json.dumps({"prompt": prompts})
    headers = {"Content-Type": "application/json"}
    error = error_of(live.http.post("/v1/completions", content=content, headers=headers), 400)
    assert error["message"].startswith(message)
    assert error["param"] == message.partition(":")[0]


def test_unknown_model_lists_the_served_ones(live: Live) -> None:
    with pytest.raises(openai.NotFoundError, match="demo, alias") as caught:
        live.client.completions.create(model="gpt-4", prompt="a")
    assert caught.value.code == "model_not_found"
    assert caught.value.param == "model"
    with pytest.raises(openai.NotFoundError):
        live.client.models.retrieve("gpt-4")


def test_an_unknown_method(live: Live) -> None:
    answer = live.http.get("/v1/completions")
    assert "POST" in error_of(answer, 405)["message"]
    assert answer.headers["allow"] == "POST"


@pytest.mark.parametrize(
    ("content", "kind", "text"),
    [
        ("{", "application/json", "not valid JSON"),
        ('{"a', "application/json", "body is not valid JSON: Unterminated string starting at char"),
        ("", "application/json", "empty"),
        ("[]", "application/json", "JSON object"),
        ('{"prompt": "a"}', "application/x-www-form-urlencoded", "Content-Type"),
        ("\xff", "application/json", "byte 0 is no utf-8"),
        ("\x1f\x8b\x08", "application/json", "without a Content-Encoding"),
        ("[" * 100_000, "application/json", "body nests too deeply"),
        ('{"seed": ' + "9" * 5000, "application/json", "body cannot be read: exceeds the limit"),
    ],
)
def test_bad_bodies(live: Live, content: str, kind: str, text: str) -> None:
    raw = content.encode("latin-1")
    answer = live.http.post("/v1/completions", content=raw, headers={"Content-Type": kind})
    assert text in error_of(answer, 400)["message"]


@pytest.mark.parametrize(
    ("path", "content", "param"),
    [
        ("/v1/completions", '{"prompt": "a", "seed": 9}', "seed"),
        ("/v1/completions", '{"prompt": "a", "seed": -9}', "seed"),
        ("/v1/completions", '{"prompt": [1, 9]}', "prompt[1]"),
        ("/v1/completions", '{"prompt": [[1], [1, 9], [9]]}', "prompt[1][1]"),
        ("/v1/completions", '{"prompt": "a", "logit_bias": {"5": 9}}', "logit_bias.5"),
        ("/v1/completions", '{"prompt": "a", "unknown": {"x": [{"y": 9}]}}', "unknown.x[0].y"),
        ("/v1/chat/completions", '{"messages": [{"content": 9}]}', "messages[0].content"),
        ("/v1/chat/completions", '{"chat_template_kwargs": {"x": 9}}', "chat_template_kwargs.x"),
        ("/v1/responses", '{"input": 9}', "input"),
        ("/v1/messages", '{"max_tokens": 9}', "max_tokens"),
        ("/detokenize", '{"tokens": [1, 9]}', "tokens[1]"),
        ("/v1/completions", "9", "body"),
        ("/v1/completions", "[9]", "[0]"),
    ],
)
def test_an_integer_that_is_too_long_is_named(
    live: Live, path: str, content: str, param: str
) -> None:
    raw = content.replace("9", "9" * 5000)
    answer = live.http.post(path, content=raw, headers={"Content-Type": "application/json"})
    message = str(answer.json()["error"]["message"])
    assert answer.status_code == 400
    assert message == f"{param}: got an integer of 5000 digits; allowed are at most 4300 digits"


def test_numbers_beyond_the_parsers(live: Live) -> None:
    def message(content: str) -> str:
        headers = {"Content-Type": "application/json"}
        answer = live.http.post("/v1/completions", content=content, headers=headers)
        return str(error_of(answer, 400)["message"])

    long = "9" * 5000
    # the last value of a name counts
    assert message(f'{{"prompt": "a", "n": {long}, "n": 0}}').startswith("n: got 0")
    text = "a" * LENIENT_BYTES
    for number in (long, "1e999"):
        said = message(f'{{"prompt": "{text}", "seed": {number}}}')
        assert said == "body has a number at character 65559 that is too large for float64"
    assert len(message(f'{{"prompt": "a", "stop_token_ids": [{"9" * 4000}]}}')) < 200


def test_one_failing_request_is_its_own_affair() -> None:
    with running(FakeEngine()) as live:
        live.engine.nan_after = 2
        assert "NaN" in error_of(complete(live), 500)["message"]
        with pytest.raises(openai.APIError, match="NaN"):
            list(live.client.completions.create(model="demo", prompt="a", stream=True))
        live.engine.nan_after = None
        assert complete(live).status_code == 200
        assert live.http.get("/health").status_code == 200


def test_unexpected_exception_is_told_to_the_log_only(caplog: pytest.LogCaptureFixture) -> None:
    with running(FakeEngine()) as live:
        live.engine.fail_after = 2
        live.engine.fails_alone = True
        answer = complete(live)
        error = error_of(answer, 500)
        assert error["type"] == "server_error"
        assert answer.headers["x-request-id"] in error["message"]
        assert "secret" not in answer.text
        text = complete(live, stream=True, max_tokens=9).text
        events = text.split("\n\n")
        assert events[-2] == "data: [DONE]"
        assert events[-3].startswith('data: {"error":')
        assert "secret" not in text
        assert len(events) == 5
        assert caplog.text.count("RuntimeError: secret detail") == 2
        assert live.http.get("/health").status_code == 200


def test_engine_failure_inside_a_stream() -> None:
    with running(FakeEngine()) as live:
        live.engine.fail_after = 2
        text = complete(live, stream=True).text
    assert text.endswith("data: [DONE]\n\n")
    assert "the engine has failed" in text
    assert "secret" not in text


@pytest.mark.parametrize("path", ["/v1/a%3Fb", "/v1/a%23b", "/a//b", "/a%0Ab", "/%C3%A9"])
def test_an_unknown_path_is_named_as_it_was_sent(live: Live, path: str) -> None:
    message = error_of(live.http.get(path, headers={"Host": "[::1"}), 404)["message"]
    assert message.startswith(f"path {path} does not exist here; ")


@pytest.mark.parametrize("host", ["elsewhere.example", "[::1", ""])
def test_a_trailing_slash_is_no_way_to_another_host(live: Live, host: str) -> None:
    """A redirect would be made of the Host header, which anybody may have written."""
    answer = live.http.post("/v1/completions/", json={"prompt": "a"}, headers={"Host": host})
    assert "/v1/completions," in error_of(answer, 404)["message"]
    assert "location" not in answer.headers
    answer = live.http.get("/v1/models/", headers={"Host": host})
    assert "path /v1/models/ does not exist" in error_of(answer, 404)["message"]
