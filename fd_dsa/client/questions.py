"""Questions to a chat server, and its answers."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Any

import httpx

from fd_dsa.client.load import FailedAttempt, Request, Sender
from fd_dsa.client.remote import incomplete, one_line, shown_url
from fd_dsa.client.settings import fields_of
from fd_dsa.errors import RemoteError

# a server that refused this many questions without an answer refuses all of them
_FAILURES_WITHOUT_ANSWER = 8


@dataclass(frozen=True)
class Question:
    """A question of a run.

    Attributes:
        key: unique in the run. Identifies the answer.
        metadata: data for scoring, stored with the answer and never sent.
    """

    key: str
    messages: tuple[dict[str, str], ...]
    max_tokens: int
    metadata: dict[str, Any] = field(default_factory=dict)

    @property
    def text(self) -> str:
        """Content of the last message."""
        return self.messages[-1]["content"]


@dataclass(frozen=True)
class Answer:
    """The answer to one question, or the reason of its failure.

    Attributes:
        text: content of the message, empty with an error.
        finish_reason: `stop`, `length`, ..., or None with an error.
        prompt_tokens, completion_tokens: the server's counts, or None if unknown.
        seconds: duration of the last attempt, up to the whole answer.
        error: one line, or None if the question was answered.
        messages, metadata: those of the question, in a stored run.
    """

    key: str
    text: str
    finish_reason: str | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    seconds: float = 0.0
    error: str | None = None
    messages: tuple[dict[str, str], ...] = field(default=(), compare=False)
    metadata: dict[str, Any] = field(default_factory=dict, compare=False)


async def ask(
    sender: Sender, model: str, questions: Sequence[Question], settings: dict[str, Any]
) -> AsyncGenerator[Answer, None]:
    """Yield answers as they arrive, in no fixed order, with `error` for failures.

    Every answer of the server is yielded, also before an exception.

    Args:
        settings: fields of every request, see `fd_dsa.client.settings`.

    Raises:
        RemoteError: the server went away, refuses the key or the model, or refuses every question.
    """
    fields = {"model": model, **fields_of(settings)}
    base_url = shown_url(sender.base_url)
    requests = []
    for question in questions:
        body = {**fields, "messages": list(question.messages), "max_tokens": question.max_tokens}
        requests.append(Request("/chat/completions", body))
    answered, failures = False, 0
    async with aclosing(sender.run(requests, _read)) as results:
        async for sent in results:
            if sent.gone:
                raise RemoteError(f"{base_url} does not answer any more: {sent.error}")
            key, seconds = questions[sent.index].key, round(sent.seconds, 4)
            answer = sent.value or Answer(key, "")
            yield replace(answer, key=key, seconds=seconds, error=sent.error)
            answered |= sent.error is None
            failures += sent.error is not None
            if not answered and failures >= _FAILURES_WITHOUT_ANSWER:
                raise RemoteError(f"{base_url} answers no question: {sent.error}")


async def _read(reply: httpx.Response, started: float) -> Answer:
    """Read a whole answer, without its key."""
    await reply.aread()
    try:
        data = reply.json()
        choice = data["choices"][0]
        text = choice["message"].get("content") or ""
        reason = choice.get("finish_reason")
        usage = data.get("usage") or {}
        prompt, completion = usage.get("prompt_tokens"), usage.get("completion_tokens")
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        text = one_line(reply.text)
        raise FailedAttempt(f"status 200 without a chat completion: {text}") from error
    if failure := incomplete(data):
        raise FailedAttempt(failure)
    if not isinstance(text, str):
        raise FailedAttempt(f"the content is no text: {one_line(str(text))}", again=False)
    # half of a surrogate pair has no UTF-8 form
    text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return Answer("", text, reason, prompt, completion)
