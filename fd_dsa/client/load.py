"""Sends the requests of a benchmark and takes the times of every token."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx

from fd_dsa.accuracy.preflight import error_message, http_options, key_refused, transport_reason
from fd_dsa.client.events import read_event
from fd_dsa.errors import RemoteError

_RETRIED_STATUS = frozenset({408, 425, 429, 500, 502, 503, 504})
_DELAY_S = 0.5
_LONGEST_DELAY_S = 30.0


@dataclass
class Timing:
    """One request: what came and when, in seconds.

    Attributes:
        start_s: since the beginning of the run, when the attempt that counts was sent.
        ttft_s: from there to the first piece of the answer; None: none came.
        itl_s: intervals between the pieces behind it.
        e2e_s: from `start_s` to the end of the answer.
        prompt_tokens, output_tokens: as the server counts them.
        attempts: how often it was sent.
        error: why there is no answer; None where there is one.
    """

    start_s: float = 0.0
    ttft_s: float | None = None
    itl_s: list[float] = field(default_factory=list)
    e2e_s: float = 0.0
    prompt_tokens: int = 0
    output_tokens: int = 0
    attempts: int = 0
    error: str | None = None


class _Again(Exception):
    """An attempt that may succeed later."""

    def __init__(self, reason: str, after_s: float = 0.0) -> None:
        super().__init__(reason)
        self.after_s = after_s


@dataclass(frozen=True)
class Load:
    """How the requests are sent.

    Attributes:
        base_url: with `/v1`.
        model: name to send.
        output_len: tokens of each answer.
        max_concurrency: requests in flight; None: no limit.
        retries: further attempts for a request that was refused or lost.
        timeout_s: longest silence of the server.
    """

    base_url: str
    model: str
    output_len: int
    max_concurrency: int | None = None
    retries: int = 3
    timeout_s: float = 600.0

    async def run(
        self, prompts: Sequence[Sequence[int]], starts: Sequence[float]
    ) -> tuple[list[Timing], float]:
        """Timings in the order of the prompts, and the seconds of the whole run.

        Raises:
            RemoteError: the server refuses the key, or has no completions.
        """
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=self.max_concurrency)
        options = http_options(self.base_url, self.timeout_s)
        gate: contextlib.AbstractAsyncContextManager[Any] = contextlib.nullcontext()
        if self.max_concurrency is not None:
            gate = asyncio.Semaphore(self.max_concurrency)
        async with httpx.AsyncClient(**options, limits=limits) as http:
            begin = time.perf_counter()

            async def one(prompt: Sequence[int], start_s: float) -> Timing:
                await asyncio.sleep(max(0.0, begin + start_s - time.perf_counter()))
                async with gate:
                    return await self._request(http, prompt, begin)

            tasks = [
                asyncio.create_task(one(prompt, start))
                for prompt, start in zip(prompts, starts, strict=True)
            ]
            try:
                timings = await asyncio.gather(*tasks)
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
            return timings, time.perf_counter() - begin

    async def _request(
        self, http: httpx.AsyncClient, prompt: Sequence[int], begin: float
    ) -> Timing:
        """One request, with its further attempts."""
        for attempt in range(1, self.retries + 2):
            timing = Timing(start_s=time.perf_counter() - begin, attempts=attempt)
            try:
                await self._attempt(http, prompt, timing)
                return timing
            except _Again as failure:
                timing.error, after_s = str(failure), failure.after_s
            except httpx.HTTPError as failure:
                timing.error, after_s = transport_reason(failure), 0.0
            if attempt <= self.retries:
                delay_s = min(_LONGEST_DELAY_S, _DELAY_S * 2 ** (attempt - 1))
                await asyncio.sleep(max(delay_s, min(after_s, _LONGEST_DELAY_S)))
        return timing

    async def _attempt(
        self, http: httpx.AsyncClient, prompt: Sequence[int], timing: Timing
    ) -> None:
        """One attempt; fills `timing`."""
        body = {
            "model": self.model,
            "prompt": prompt,
            "max_tokens": self.output_len,
            "temperature": 0,
            "ignore_eos": True,
            # a chunk for each token, also where its text is held back
            "return_token_ids": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        failure = ""
        begin = last = time.perf_counter()
        async with http.stream("POST", f"{self.base_url}/completions", json=body) as reply:
            if reply.status_code != 200:
                await reply.aread()
                self._refuse(reply)
            # to the end, also behind an error: who leaves a stream leaves its generators open
            async for line in reply.aiter_lines():
                try:
                    chunk = read_event(line)
                except RemoteError as error:
                    failure = failure or str(error)
                    continue
                if chunk is None:
                    continue
                now = time.perf_counter()
                if usage := chunk.get("usage"):
                    timing.prompt_tokens = usage["prompt_tokens"]
                    timing.output_tokens = usage["completion_tokens"]
                if not chunk.get("choices"):
                    continue
                if timing.ttft_s is None:
                    timing.ttft_s = now - begin
                else:
                    timing.itl_s.append(now - last)
                last = now
        timing.e2e_s = last - begin
        if failure or timing.ttft_s is None:
            raise _Again(failure or "the answer is empty")

    def _refuse(self, reply: httpx.Response) -> None:
        """Raise what a status other than 200 means."""
        status, said = reply.status_code, error_message(reply)
        if status in (401, 403):
            raise RemoteError(key_refused(self.base_url, status))
        if status not in _RETRIED_STATUS:
            raise RemoteError(f"{self.base_url}/completions answers {status}: {said}")
        after = reply.headers.get("retry-after", "")
        after_s = float(after) if after.isascii() and after.isdigit() else 0.0
        raise _Again(f"status {status}: {said}", after_s)
