"""/v1/chat/completions, through the real OpenAI client and a real server."""

from __future__ import annotations

import openai
import pytest

from tests.serve.conftest import Live, running
from tests.serve.fake_engine import WORDS, FakeEngine

REPLY = "".join(WORDS)
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
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    live.client.chat.completions.create(
        model="demo",
        messages=[{"role": "developer", "content": "Rule"}, {"role": "user", "content": parts}],
    )
    assert prompt_text(live) == "system:Rule\nuser:one\ntwo\n>"


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


@pytest.mark.parametrize(
    ("message", "param", "text"),
    [
        (None, "messages", "got []"),
        ({"role": "user"}, "messages[0].content", "is missing"),
        ({"content": "x"}, "messages[0].role", "is missing"),
        ({"role": "robot", "content": "x"}, "messages[0].role", "allowed are system, developer"),
        ({"role": "user", "content": None}, "messages[0].content", "got null"),
        ({"role": "user", "content": []}, "messages[0].content", "got []"),
        ({"role": "user", "content": [{"type": "text"}]}, "messages[0].content", "no text"),
        (
            {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]},
            "messages[0].content",
            'part 0 has type "image_url"',
        ),
        ("text", "messages[0]", "got"),
    ],
)
def test_bad_messages(live: Live, message: object, param: str, text: str) -> None:
    messages = [] if message is None else [message]
    answer = live.http.post("/v1/chat/completions", json={"messages": messages})
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["param"] == param
    assert error["message"].startswith(f"{param}: ")
    assert text in error["message"]


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
        nested = {**body, "chat_template": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}"}
        error = live.http.post("/v1/chat/completions", json=nested).json()["error"]
        assert error["message"] == ("chat_template: chat template of the request: nests too deeply")
        giant = {**body, "chat_template": "{{ 'a' * 10**11 }}"}
        answer = live.http.post("/v1/chat/completions", json=giant)
        assert answer.status_code == 400 and "1048576" in answer.json()["error"]["message"]
        assert live.http.post("/v1/chat/completions", json={**body, **kwargs}).status_code == 200
