"""Questions to a chat server: what is asked, what came back, and the client that asks many."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Any

import httpx

from fd_dsa.client.load import FailedAttempt, Request, Sender
from fd_dsa.client.remote import ServerInfo, examine_server, normal_base_url, one_line
from fd_dsa.client.settings import reasoning_switch
from fd_dsa.errors import RemoteError

# with nothing answered, a server that refused so many questions refuses them all
_FAILURES_WITHOUT_ANSWER = 8


@dataclass(frozen=True)
class Question:
    """One request of a run.

    Attributes:
        key: unique in the run; answers are found again by it.
        metadata: what scoring needs; kept with the answer, never sent.
    """

    key: str
    messages: tuple[dict[str, str], ...]
    max_tokens: int
    metadata: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Answer:
    """What a server answered to one question, or why it did not.

    Attributes:
        text: the message's content; empty with an error.
        finish_reason: `stop`, `length`, ...; None with an error.
        prompt_tokens, completion_tokens: as the server counts them; None where it does not say.
        seconds: from the last attempt's request to its whole answer.
        error: one line, None when the question was answered.
        messages, metadata: of the question, in a run that is kept.
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

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Answer:
        """The answer of a JSON object; raises KeyError without a field, TypeError without texts."""
        if not (isinstance(data["key"], str) and isinstance(data["text"], str)):
            raise TypeError(f"key {data['key']!r} and text have to be texts")
        fields = {name: data[name] for name in cls.__dataclass_fields__}
        return cls(**{**fields, "messages": tuple(data["messages"])})


class ChatClient:
    """A server and the fields that all questions share.

    Args:
        thinking: sent to the chat template as `thinking` and `enable_thinking`; None sends nothing.
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
        """What the server says of itself; `model` is set where it was left open."""
        info = examine_server(self.base_url, self.model)
        self.model = info.model
        return info

    def stop(self) -> None:
        """Let `ask` end: it still yields answers that are there and drops requests in flight."""
        self._sender.stop()

    async def ask(self, questions: Sequence[Question]) -> AsyncGenerator[Answer, None]:
        """Answers as they come, in no fixed order; with `error` where a question fails for good.

        Every answer that the server gave is yielded, also before an exception and after `stop`.

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
    """The whole answer, without its key."""
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
    if reason in ("abort", "error"):
        # half an answer of a server that goes down, or of a request that failed
        raise FailedAttempt(f"finish_reason {reason}")
    if not isinstance(text, str):
        raise FailedAttempt(f"the content is no text: {one_line(str(text))}", again=False)
    # half a character of a careless server has no UTF-8 form
    text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return Answer("", text, reason, prompt, completion)
