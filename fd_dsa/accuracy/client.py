"""A client of OpenAI-compatible servers that asks many questions, some of them at a time."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncGenerator, Iterable
from itertools import islice
from typing import Any, NoReturn

import httpx

from fd_dsa.accuracy.preflight import (
    ServerInfo,
    error_message,
    examine_server,
    http_options,
    key_refused,
    normal_base_url,
    one_line,
    transport_reason,
)
from fd_dsa.accuracy.types import Answer, Question
from fd_dsa.errors import RemoteError

_LONGEST_DELAY_S = 30.0
# with nothing answered, a server that refused so many questions refuses them all
_FAILURES_WITHOUT_ANSWER = 8
_RETRIED_STATUS = frozenset({408, 409, 425, 429, *range(500, 600)})


class _FailedAttempt(Exception):
    """One attempt without an answer: why, and whether and when another one makes sense."""

    def __init__(
        self, reason: str, *, again: bool, after_s: float = 0.0, gone: bool = False
    ) -> None:
        super().__init__(reason)
        self.reason, self.again, self.after_s, self.gone = reason, again, after_s, gone


class ChatClient:
    """Asks an OpenAI-compatible server by `/chat/completions`, without streaming.

    Args:
        base_url: with or without `/v1`; see `normal_base_url`.
        model: name to send; None = the only one that the server has (`preflight` finds it).
        temperature: 0 is greedy.
        seed: sent with every request.
        thinking: sent to the chat template as `thinking` and `enable_thinking`; None sends nothing.
        concurrency: requests in flight.
        retries: further attempts for a question after a failure that may pass.
        timeout_s: longest wait for an answer.
        delay_s: wait before the second attempt, doubled before each further one, up to 30 s.

    Raises:
        ConfigError: `base_url` is none.
    """

    def __init__(
        self,
        base_url: str,
        model: str | None = None,
        *,
        temperature: float = 0.0,
        seed: int = 0,
        thinking: bool | None = None,
        concurrency: int = 32,
        retries: int = 5,
        timeout_s: float = 600.0,
        delay_s: float = 0.5,
    ) -> None:
        self.base_url = normal_base_url(base_url)
        self.model = model
        self.concurrency = concurrency
        self._body: dict[str, Any] = {"temperature": temperature, "seed": seed}
        if thinking is not None:
            switch = {"thinking": thinking, "enable_thinking": thinking}
            self._body["chat_template_kwargs"] = switch
        self._retries = retries
        self._timeout_s = timeout_s
        self._delay_s = delay_s
        self._random = random.Random(seed)
        self._stopped: asyncio.Event | None = None

    def preflight(self) -> ServerInfo:
        """What the server says of itself; `model` is set where it was left open.

        Raises:
            ConfigError: as `examine_server`.
        """
        info = examine_server(self.base_url, self.model)
        self.model = info.model
        return info

    def stop(self) -> None:
        """Let `ask` end: answers that are there are given out, requests in flight are dropped."""
        if self._stopped is not None:
            self._stopped.set()

    async def ask(self, questions: Iterable[Question]) -> AsyncGenerator[Answer, None]:
        """Answers as they come, `concurrency` questions at a time, in no fixed order.

        A question that fails for good gives an answer with `error`. Every answer that the server
        gave is given out, also before an exception and after `stop`.

        Raises:
            RemoteError: the server went away, refuses the key or the model, or refuses every
                question.
        """
        self._stopped = asyncio.Event()
        stopped = asyncio.create_task(self._stopped.wait())
        pending = iter(questions)
        running: set[asyncio.Task[Answer]] = set()
        limits = httpx.Limits(max_connections=self.concurrency)
        refusals = _Refusals(self.base_url)
        async with httpx.AsyncClient(
            **http_options(self.base_url, self._timeout_s), limits=limits
        ) as http:
            try:
                while not stopped.done():
                    for question in islice(pending, self.concurrency - len(running)):
                        running.add(asyncio.create_task(self._answer(http, question)))
                    if not running:
                        return
                    await asyncio.wait([*running, stopped], return_when=asyncio.FIRST_COMPLETED)
                    done = [task for task in running if task.done()]
                    running.difference_update(done)
                    for answer in [task.result() for task in done if task.exception() is None]:
                        refusals.note(answer)
                        yield answer
                    for error in [error for task in done if (error := task.exception())]:
                        raise error
                    refusals.check()
            finally:
                for task in (left := [*running, stopped]):
                    task.cancel()
                await asyncio.gather(*left, return_exceptions=True)

    async def _answer(self, http: httpx.AsyncClient, question: Question) -> Answer:
        """The answer to one question after as many attempts as it takes and may take."""
        for attempt in range(1, self._retries + 2):
            started = time.perf_counter()
            try:
                return await self._attempt(http, question, started)
            except _FailedAttempt as failure:
                last = failure
            if not last.again or attempt > self._retries:
                break
            # not all at once after a common failure
            share = self._random.uniform(0.5, 1.0)
            delay_s = share * min(_LONGEST_DELAY_S, self._delay_s * 2 ** (attempt - 1))
            await asyncio.sleep(max(delay_s, min(last.after_s, 2 * _LONGEST_DELAY_S)))
        reason = f"{last.reason} ({attempt} attempts)" if attempt > 1 else last.reason
        if last.gone:
            raise RemoteError(f"{self.base_url} does not answer any more: {reason}")
        seconds = round(time.perf_counter() - started, 4)
        return Answer(question.key, "", None, None, None, seconds, reason)

    async def _attempt(self, http: httpx.AsyncClient, question: Question, started: float) -> Answer:
        """One request; raises _FailedAttempt, or RemoteError where none can succeed."""
        body = {
            "model": self.model,
            "messages": list(question.messages),
            "max_tokens": question.max_tokens,
            **self._body,
        }
        try:
            reply = await http.post(f"{self.base_url}/chat/completions", json=body)
        except httpx.HTTPError as error:
            gone = isinstance(error, httpx.ConnectError)
            raise _FailedAttempt(transport_reason(error), again=True, gone=gone) from error
        if reply.status_code != 200:
            self._raise_status(reply)
        return _read_answer(question.key, reply, round(time.perf_counter() - started, 4))

    def _raise_status(self, reply: httpx.Response) -> NoReturn:
        """Raise what a status other than 200 means."""
        status, said = reply.status_code, error_message(reply)
        if status in (401, 403):
            raise RemoteError(key_refused(self.base_url, status))
        if status in (404, 405):
            raise RemoteError(f"{self.base_url}/chat/completions answers {status}: {said}")
        after = reply.headers.get("retry-after", "")
        after_s = float(after) if after.isascii() and after.isdigit() else 0.0
        again = status in _RETRIED_STATUS
        raise _FailedAttempt(f"status {status}: {said}", again=again, after_s=after_s)


class _Refusals:
    """Notices that a server answers no question at all."""

    def __init__(self, base_url: str) -> None:
        self._base_url = base_url
        self._reasons: list[str] = []
        self._answered = False

    def note(self, answer: Answer) -> None:
        """Count one answer or failure."""
        if answer.error is None:
            self._answered = True
        else:
            self._reasons.append(answer.error)

    def check(self) -> None:
        """Raise RemoteError after too many failures and no answer."""
        if not self._answered and len(self._reasons) >= _FAILURES_WITHOUT_ANSWER:
            raise RemoteError(f"{self._base_url} answers no question: {self._reasons[-1]}")


def _read_answer(key: str, reply: httpx.Response, seconds: float) -> Answer:
    """The answer in a reply of status 200."""
    try:
        data = reply.json()
        choice = data["choices"][0]
        text = choice["message"].get("content") or ""
        reason = choice.get("finish_reason")
        usage = data.get("usage") or {}
        tokens = usage.get("prompt_tokens"), usage.get("completion_tokens")
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise _FailedAttempt(
            f"status 200 without a chat completion: {one_line(reply.text)}", again=True
        ) from error
    if reason in ("abort", "error"):
        # half an answer of a server that goes down, or of a request that failed
        raise _FailedAttempt(f"finish_reason {reason}", again=True)
    if not isinstance(text, str):
        raise _FailedAttempt(f"the content is no text: {one_line(str(text))}", again=False)
    # half a character of a careless server has no UTF-8 form
    text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return Answer(key, text, reason, *tokens, seconds)
