"""Questions to a chat server, its answers, and the client that asks many questions."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Any

import httpx

from fd_dsa.client.load import FailedAttempt, Request, Sender
from fd_dsa.client.remote import (
    ServerInfo,
    examine_server,
    incomplete,
    normal_base_url,
    one_line,
)
from fd_dsa.client.settings import reasoning_switch
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


class ChatClient:
    """A server and the request fields that all questions share.

    Args:
        thinking: sent to the chat template as `thinking` and `enable_thinking`. None = not sent.
    """

    def __init__(
        self,
        base_url: str,
        model: str | None = None,
        *,
        temperature: float = 0.0,
        seed: int = 0,
        thinking: bool | None = None,
        **options: Any,
    ) -> None:
        self.base_url = normal_base_url(base_url)
        self.model = model
        self._fields: dict[str, Any] = {"temperature": temperature, "seed": seed}
        if thinking is not None:
            self._fields["chat_template_kwargs"] = reasoning_switch(thinking)
        self._sender = Sender(self.base_url, **options)

    def preflight(self) -> ServerInfo:
        """Return the server's description of itself. `model` is set if it was None."""
        info = examine_server(self.base_url, self.model)
        self.model = info.model
        return info

    async def ask(self, questions: Sequence[Question]) -> AsyncGenerator[Answer, None]:
        """Yield answers as they arrive, in no fixed order, with `error` for failures.

        Every answer of the server is yielded, also before an exception.

        Raises:
            RemoteError: the server went away, refuses the key or the model, or refuses every
                question.
        """
        requests = []
        for question in questions:
            body = {"model": self.model, "messages": list(question.messages), **self._fields}
            body["max_tokens"] = question.max_tokens
            requests.append(Request("/chat/completions", body))
        answered, failures = False, 0
        async with aclosing(self._sender.run(requests, _read)) as results:
            async for sent in results:
                if sent.gone:
                    raise RemoteError(f"{self.base_url} does not answer any more: {sent.error}")
                key, seconds = questions[sent.index].key, round(sent.seconds, 4)
                answer = sent.value or Answer(key, "")
                yield replace(answer, key=key, seconds=seconds, error=sent.error)
                answered |= sent.error is None
                failures += sent.error is not None
                if not answered and failures >= _FAILURES_WITHOUT_ANSWER:
                    raise RemoteError(f"{self.base_url} answers no question: {sent.error}")


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
