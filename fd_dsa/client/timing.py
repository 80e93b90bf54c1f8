"""Times of every token of streamed completions, with a summary and its tables."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import httpx
import numpy as np

from fd_dsa.client.load import FailedAttempt, Request, Sender
from fd_dsa.client.remote import incomplete, read_event
from fd_dsa.command_line.report import Table
from fd_dsa.errors import RemoteError


@dataclass(frozen=True)
class Timing:
    """A request and its times, in seconds.

    Attributes:
        start_s: send time of the last attempt, since the beginning of the run.
        ttft_s: from `start_s` to the first piece of the answer, or None without one.
        itl_s: intervals between the following pieces.
        e2e_s: from `start_s` to the end of the answer.
        prompt_tokens, output_tokens: the server's counts.
        accepted_tokens, rejected_tokens: the server's counts of drafts.
        attempts: number of attempts.
        error: reason of a failure, or None.
    """

    start_s: float = 0.0
    ttft_s: float | None = None
    itl_s: list[float] = field(default_factory=list)
    e2e_s: float = 0.0
    prompt_tokens: int = 0
    output_tokens: int = 0
    accepted_tokens: int = 0
    rejected_tokens: int = 0
    attempts: int = 0
    error: str | None = None


async def measure(
    sender: Sender,
    model: str,
    prompts: Sequence[Sequence[int]],
    starts: Sequence[float],
    output_len: int,
) -> tuple[list[Timing], float]:
    """Return the timings in the order of the prompts, and the seconds of the whole run.

    Args:
        starts: earliest send time of each request, seconds after the beginning.

    Raises:
        RemoteError: the server refuses the key, or has no completions.
    """
    fields = {
        "model": model,
        "max_tokens": output_len,
        "temperature": 0,
        "ignore_eos": True,
        # one chunk per token, even if its text is held back
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
    arrivals: list[float] = []
    tokens, failure = (0, 0, 0, 0), ""
    # read to the end even after an error, because leaving a stream early leaves its generators open
    async for line in reply.aiter_lines():
        try:
            chunk = read_event(line)
        except RemoteError as error:
            failure = failure or str(error)
            continue
        if chunk is None:
            continue
        failure = failure or incomplete(chunk)
        if usage := chunk.get("usage"):
            details = usage.get("completion_tokens_details") or {}
            drafts = [details.get(f"{kind}_prediction_tokens") or 0 for kind in _VERDICTS]
            tokens = usage["prompt_tokens"], usage["completion_tokens"], *drafts
        if chunk.get("choices"):
            arrivals.append(time.perf_counter() - started)
    if failure or not arrivals:
        raise FailedAttempt(failure or "the answer is empty")
    gaps = [after - before for before, after in pairwise(arrivals)]
    return Timing(0.0, arrivals[0], gaps, arrivals[-1], *tokens)


_VERDICTS = ("accepted", "rejected")
PERCENTILES = (50, 90, 95, 99)
LATENCIES = {
    "ttft_ms": "time to first token",
    "tpot_ms": "time per output token, the first left out",
    "itl_ms": "inter-token latency",
    "e2e_ms": "end to end",
}
"""Field of the result -> its description. All in milliseconds."""


def samples(timings: Sequence[Timing]) -> dict[str, list[float]]:
    """Return the values of each of `LATENCIES`, in milliseconds, for answered requests."""
    values: dict[str, list[float]] = {name: [] for name in LATENCIES}
    for timing in timings:
        if timing.error is not None or timing.ttft_s is None:
            continue
        values["ttft_ms"].append(1000 * timing.ttft_s)
        values["e2e_ms"].append(1000 * timing.e2e_s)
        values["itl_ms"] += [1000 * interval for interval in timing.itl_s]
        if timing.output_tokens > 1:
            rest = timing.e2e_s - timing.ttft_s
            values["tpot_ms"].append(1000 * rest / (timing.output_tokens - 1))
    return values


def summarise(timings: Sequence[Timing], duration_s: float) -> dict[str, Any]:
    """Return the figures of a run: counts, throughput, means and percentiles."""
    answered = [timing for timing in timings if timing.error is None]
    prompt_tokens = sum(timing.prompt_tokens for timing in answered)
    output_tokens = sum(timing.output_tokens for timing in answered)
    accepted = sum(timing.accepted_tokens for timing in answered)
    drafts = accepted + sum(timing.rejected_tokens for timing in answered)
    latencies: dict[str, dict[str, float] | None] = dict.fromkeys(LATENCIES)
    for name, values in samples(timings).items():
        if values:
            cuts = map(float, np.percentile(values, PERCENTILES))
            named = {f"p{p}": cut for p, cut in zip(PERCENTILES, cuts, strict=True)}
            latencies[name] = {"mean": float(np.mean(values)), **named}
    return {
        "completed": len(answered),
        "failed": len(timings) - len(answered),
        "retries": sum(timing.attempts - 1 for timing in timings),
        "duration_s": duration_s,
        "total_input_tokens": prompt_tokens,
        "total_output_tokens": output_tokens,
        "draft_tokens": drafts,
        "accepted_tokens": accepted,
        "acceptance_rate": accepted / drafts if drafts else None,
        "request_throughput": len(answered) / duration_s,
        "output_throughput": output_tokens / duration_s,
        "total_token_throughput": (prompt_tokens + output_tokens) / duration_s,
        **latencies,
    }


def tables(result: Mapping[str, Any]) -> list[str | Table]:
    """Return the tables of a summary for the terminal."""
    counts = (
        ("requests answered", f"{result['completed']}"),
        ("requests failed", f"{result['failed']}"),
        ("further attempts", f"{result['retries']}"),
        ("seconds", f"{result['duration_s']:.2f}"),
        ("prompt tokens", f"{result['total_input_tokens']}"),
        ("output tokens", f"{result['total_output_tokens']}"),
        ("requests/s", f"{result['request_throughput']:.2f}"),
        ("output tokens/s", f"{result['output_throughput']:.1f}"),
        ("prompt and output tokens/s", f"{result['total_token_throughput']:.1f}"),
    )
    drafts: tuple[tuple[str, str], ...] = ()
    if result["draft_tokens"]:
        rate = f"{100 * result['acceptance_rate']:.1f} % of {result['draft_tokens']}"
        drafts = (("drafts accepted", rate),)
    columns = ("mean", *(f"p{p}" for p in PERCENTILES))
    rows = []
    for name, label in LATENCIES.items():
        figures = result[name]
        cells = ["-" if figures is None else f"{figures[column]:.2f}" for column in columns]
        rows.append((label, *cells))
    return [
        Table("", ("run", ""), (*counts, *drafts)),
        Table("", ("latency, ms", *columns), tuple(rows)),
    ]
