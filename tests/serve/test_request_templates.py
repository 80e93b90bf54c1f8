"""Templates of requests: only where they are trusted, and a bad one is the request's error."""

from __future__ import annotations

from fd_dsa.serve.options import ChatSettings
from tests.serve.conftest import running
from tests.serve.fake_engine import FakeEngine
from tests.serve.test_tool_calls import HI, prompt_of


def test_a_template_of_the_request_needs_trust() -> None:
    body = {"messages": HI, "chat_template": "{{ bos_token }}{{ messages[0].content }}!{{ k }}"}
    kwargs = {"chat_template_kwargs": {"k": 3}}
    with running(FakeEngine()) as live:
        error = live.http.post("/v1/chat/completions", json=body).json()["error"]
        assert error["param"] == "chat_template"
        assert "--trust-request-chat-template" in error["message"]
    trusting = ChatSettings(trust_request_chat_template=True)
    with running(FakeEngine(), chat_settings=trusting) as live:
        assert live.http.post("/v1/chat/completions", json={**body, **kwargs}).status_code == 200
        assert prompt_of(live) == "<bos>Hi!3"
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
