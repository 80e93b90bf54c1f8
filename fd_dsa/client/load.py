"""Load on one OpenAI-compatible server: concurrent requests with retries."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, NoReturn, TypeVar

import httpx

from fd_dsa.client.remote import error_message, http_options, key_refused, transport_reason
from fd_dsa.errors import RemoteError

MAX_RETRIES = 1000
"""Maximum value of --retries, with which a server may be away for about six hours."""

_LONGEST_DELAY_S = 30.0
# delays are at their longest before this attempt
_MAX_DOUBLINGS = 16
_RETRIED_STATUS = frozenset({408, 409, 425, 429, *range(500, 600)})

T = TypeVar("T")
Reader = Callable[[httpx.Response, float], Awaitable[T]]
"""Makes a value of a reply with status 200 and its send time (`time.perf_counter`)."""


@dataclass(eq=False)
class FailedAttempt(Exception):
    """An attempt without an answer: the reason, and if and when a retry makes sense.

    Attributes:
        reply: reply with another status than 200, or None.
    """

    reason: str
    again: bool = True
    after_s: float = 0.0
    gone: bool = False
    reply: httpx.Response | None = None


@dataclass(frozen=True)
class Request:
    """A request to be sent.

    Attributes:
        start_s: earliest send time, seconds after the beginning of the run.
    """

    path: str
    body: dict[str, Any]
    start_s: float = 0.0


@dataclass(frozen=True)
class TimedRequest(Generic[T]):
    """The outcome of a request.

    Attributes:
        error: one line, or None with a value.
        start_s: send time of the last attempt, seconds after the beginning of the run.
        seconds: duration of the last attempt up to the end of its reply.
        gone: True if the last attempt could not connect.
        reply: last reply with another status than 200, or None.
    """

    index: int
    value: T | None
    error: str | None
    attempts: int
    start_s: float
    seconds: float
    gone: bool = False
    reply: httpx.Response | None = None


@dataclass
class Sender:
    """Sends requests to one server.

    Args:
        retries: maximum number of further attempts after a failure that may pass.
        timeout_s: maximum silence of the server, seconds.
        delay_s: wait before the second attempt, seconds. Doubled for each further attempt, up to 30
            s.
    """

    base_url: str
    concurrency: int | None = None
    retries: int = 3
    timeout_s: float = 600.0
    delay_s: float = 0.5

    def __post_init__(self) -> None:
        self._random = random.Random(0)

    async def run(
        self, requests: Sequence[Request], read: Reader[T]
    ) -> AsyncGenerator[TimedRequest[T], None]:
        """Yield a result for each request as it arrives, in no fixed order.

        Raises:
            RemoteError: the server refuses the key or the path. Raised after all earlier results.
        """
        results: asyncio.Queue[TimedRequest[T] | Exception] = asyncio.Queue()
        pending = enumerate(requests)
        limits = httpx.Limits(max_connections=self.concurrency)
        options = http_options(self.base_url, self.timeout_s)
        begin = time.perf_counter()
        async with httpx.AsyncClient(**options, limits=limits) as http:

            async def work() -> None:
                for index, request in pending:
                    await asyncio.sleep(max(0.0, begin + request.start_s - time.perf_counter()))
                    try:
                        results.put_nowait(await self._send(http, index, request, read, begin))
                    except Exception as error:
                        # the exception ends the run
                        results.put_nowait(error)
                        return

            count = min(len(requests), self.concurrency or len(requests))
            workers = [asyncio.create_task(work()) for _ in range(count)]
            try:
                for _ in requests:
                    result = await results.get()
                    if isinstance(result, Exception):
                        raise result
                    yield result
            finally:
                for worker in workers:
                    worker.cancel()
                await asyncio.gather(*workers, return_exceptions=True)

    async def _send(
        self,
        http: httpx.AsyncClient,
        index: int,
        request: Request,
        read: Reader[T],
        begin: float,
    ) -> TimedRequest[T]:
        for attempt in range(1, self.retries + 2):
            started = time.perf_counter()
            try:
                value = await self._attempt(http, request, read, started)
                seconds = time.perf_counter() - started
                return TimedRequest(index, value, None, attempt, started - begin, seconds)
            except FailedAttempt as failure:
                last = failure
            if not last.again or attempt > self.retries:
                break
            # random, so that requests do not retry together after a common failure
            share = self._random.uniform(0.5, 1.0)
            doubled_s = self.delay_s * 2 ** min(attempt - 1, _MAX_DOUBLINGS)
            delay_s = share * min(_LONGEST_DELAY_S, doubled_s)
            await asyncio.sleep(max(delay_s, min(last.after_s, 2 * _LONGEST_DELAY_S)))
        reason = f"{last.reason} ({attempt} attempts)" if attempt > 1 else last.reason
        seconds = time.perf_counter() - started
        return TimedRequest(
            index, None, reason, attempt, started - begin, seconds, last.gone, last.reply
        )

    async def _attempt(
        self, http: httpx.AsyncClient, request: Request, read: Reader[T], started: float
    ) -> T:
        url = self.base_url + request.path
        try:
            async with http.stream("POST", url, json=request.body) as reply:
                if reply.status_code != 200:
                    await reply.aread()
                    self._raise_status(url, reply)
                return await read(reply, started)
        except httpx.HTTPError as error:
            gone = isinstance(error, httpx.ConnectError)
            raise FailedAttempt(transport_reason(error), gone=gone) from error

    def _raise_status(self, url: str, reply: httpx.Response) -> NoReturn:
        status, reason = reply.status_code, error_message(reply)
        if status in (401, 403):
            raise RemoteError(key_refused(self.base_url, status))
        if status in (404, 405):
            raise RemoteError(f"{url} answers {status}: {reason}")
        after = reply.headers.get("retry-after", "")
        after_s = float(after) if after.isascii() and after.isdigit() else 0.0
        again = status in _RETRIED_STATUS
        text = f"status {status}: {reason}"
        raise FailedAttempt(text, again=again, after_s=after_s, reply=reply)
