"""The times of every token of streamed completions."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from itertools import pairwise

import httpx

from fd_dsa.client.load import FailedAttempt, Request, Sender
from fd_dsa.client.remote import read_event
from fd_dsa.errors import RemoteError


@dataclass(frozen=True)
class Timing:
    """One request: what came and when, in seconds.

    Attributes:
        start_s: since the beginning of the run, when the attempt that counts was sent.
        ttft_s: from there to the first piece of the answer; None: none came.
        itl_s: intervals between the pieces after it.
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


async def measure(
    sender: Sender,
    model: str,
    prompts: Sequence[Sequence[int]],
    starts: Sequence[float],
    output_len: int,
) -> tuple[list[Timing], float]:
    """Timings in the order of the prompts, and the seconds of the whole run.

    Args:
        model: name to send.
        prompts: token ids.
        starts: seconds after the beginning before which each is not sent.
        output_len: tokens of each answer.

    Raises:
        RemoteError: the server refuses the key, or has no completions.
    """
    fields = {
        "model": model,
        "max_tokens": output_len,
        "temperature": 0,
        "ignore_eos": True,
        # a chunk for each token, also where its text is held back
        "return_token_ids": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    requests = [
        Request("/completions", {**fields, "prompt": prompt}, start)
        for prompt, start in zip(prompts, starts, strict=True)
    ]
    timings = [Timing()] * len(requests)
    begin = time.perf_counter()
    async with aclosing(sender.run(requests, _read)) as results:
        async for sent in results:
            timing = sent.value or Timing()
            timings[sent.index] = replace(
                timing, start_s=sent.start_s, attempts=sent.attempts, error=sent.error
            )
    return timings, time.perf_counter() - begin


async def _read(reply: httpx.Response, started: float) -> Timing:
    """The times of a stream."""
    arrivals: list[float] = []
    tokens, failure = (0, 0), ""
    # to the end, also after an error: leaving a stream early leaves its generators open
    async for line in reply.aiter_lines():
        try:
            chunk = read_event(line)
        except RemoteError as error:
            failure = failure or str(error)
            continue
        if chunk is None:
            continue
        if usage := chunk.get("usage"):
            tokens = usage["prompt_tokens"], usage["completion_tokens"]
        if chunk.get("choices"):
            arrivals.append(time.perf_counter() - started)
    if failure or not arrivals:
        raise FailedAttempt(failure or "the answer is empty")
    gaps = [after - before for before, after in pairwise(arrivals)]
    return Timing(0.0, arrivals[0], gaps, arrivals[-1], *tokens)
