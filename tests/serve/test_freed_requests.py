"""Requests of clients are free without a garbage collection, which would delay streams."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterator
from typing import Any

import pytest

from fd_dsa.engine.loop import UtilityCall
from fd_dsa.engine.output import RequestOutput
from fd_dsa.serve.errors import ApiError
from fd_dsa.serve.generation import Job
from fd_dsa.serve.protocol.generation import GenerationRequest
from tests.engine.byte_model import VOCAB_SIZE, make_engine
from tests.engine.test_freed_requests import FORM, all_freed
from tests.engine.threaded import threaded
from tests.serve.conftest import Live, running
from tests.serve.fake_engine import FakeEngine

PROMPT = list(range(100, 140))
SENT: dict[str, tuple[int, dict[str, Any]]] = {
    "several": (200, {"prompt": [PROMPT, PROMPT], "n": 2, "logprobs": 1}),
    "scores": (200, {"prompt": PROMPT, "prompt_logprobs": 1}),
    "form": (200, {"prompt": PROMPT, "structured_outputs": {"regex": FORM.regex}}),
    "text": (200, {"prompt": "a" * 400, "stop": ["b"]}),
    "unknown token": (400, {"prompt": [*PROMPT, VOCAB_SIZE]}),
    "long text": (400, {"prompt": "a" * 400_000}),
    "broken form": (400, {"prompt": PROMPT, "structured_outputs": {"regex": "(("}}),
    "no token": (400, {"prompt": [PROMPT, PROMPT], "bad_words_token_ids": list(range(VOCAB_SIZE))}),
}


@pytest.fixture(scope="module")
def server() -> Iterator[Live]:
    """A server over an engine whose requests the tests count."""
    with running(threaded(make_engine())) as live:
        yield live


@pytest.mark.parametrize(
    ("name", "stream"),
    [(name, False) for name in SENT] + [(name, True) for name in SENT if name != "scores"],
)
def test_answered_and_refused_requests_are_free(server: Live, name: str, stream: bool) -> None:
    status, body = SENT[name]
    body = {"max_tokens": 10, "ignore_eos": True, "stream": stream, **body}
    server.http.get("/health")
    with all_freed(Job, UtilityCall, GenerationRequest, ApiError):
        answer = server.http.post("/v1/completions", json=body)
        # the status of a stream is sent before its tokens
        assert answer.status_code == status or (stream and name == "no token")


class FailingEngine(FakeEngine):
    """Fails each request alone."""

    async def generate(self, *_: object) -> AsyncGenerator[RequestOutput, None]:
        # the log would keep another exception
        raise ApiError(503, "no output for this request")
        yield


def test_failures_of_several_prompts_are_free() -> None:
    with running(FailingEngine()) as live, all_freed(Job):
        body = {"prompt": [PROMPT, PROMPT, PROMPT], "max_tokens": 10}
        assert live.http.post("/v1/completions", json=body).status_code == 503
