"""Time of a decode step with the plug-in and without, as FastDeploy #7367 measured its own change.

A step gives every running request its next token, so its time is the gap between two tokens of a
stream while all streams run.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from benchmarks._harness import percentiles
from tools.fastdeploy_check.servers import OURS, UPSTREAM, CheckFailed, Server

BATCHES = (1, 8, 32)
_TOKENS = 128
# words of a prompt that no other request has
_WORDS = 256


def gaps_us(server: Server, batch: int, tokens: int = _TOKENS) -> list[float]:
    """Return gaps between tokens of `batch` streams, microseconds, while all of them run.

    Raises:
        CheckFailed: a stream failed, or they never all ran at once.
    """
    arrivals: list[list[float]] = [[] for _ in range(batch)]
    errors: list[BaseException] = []

    def run(row: int) -> None:
        words = " ".join(f"{row}-{number}" for number in range(_WORDS))
        fields = {"prompt": words, "max_tokens": tokens, "min_tokens": tokens, "temperature": 0}
        try:
            for event in server.stream("/v1/completions", **fields):
                if event["choices"][0].get("text"):
                    arrivals[row].append(time.perf_counter())
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(row,)) for row in range(batch)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise CheckFailed(f"a stream of {server.path} failed: {errors[0]}")
    return overlapping_gaps_us(arrivals)


def overlapping_gaps_us(arrivals: Sequence[Sequence[float]]) -> list[float]:
    """Return gaps inside the time in which every stream had begun and none had ended.

    Args:
        arrivals: seconds at which each stream's tokens came.

    Raises:
        CheckFailed: there is no such gap.
    """
    if not all(arrivals):
        raise CheckFailed("a stream had no token")
    begin, end = max(times[0] for times in arrivals), min(times[-1] for times in arrivals)
    found = [
        1e6 * (later - earlier)
        for times in arrivals
        for earlier, later in pairwise(times)
        if begin <= earlier and later <= end
    ]
    if not found:
        raise CheckFailed("the streams did not run at the same time; give more --max-num-seqs")
    return found


def report(rounds: Sequence[tuple[str, dict[int, list[float]]]]) -> list[dict[str, Any]]:
    """Return an entry for each batch size, over all rounds of one run.

    Args:
        rounds: path and gaps by batch size, in the order in which they were taken.

    Returns:
        entries with `baseline` (FastDeploy's path) and `candidate` (ours), each with `us` (p20,
        p50, p80), and `ratio_p50`, the candidate's time over the baseline's: below 1 is faster.
    """
    entries = []
    for batch in rounds[0][1]:
        sides = {}
        for path in (UPSTREAM, OURS):
            taken = [gaps[batch] for name, gaps in rounds if name == path]
            every = [gap for gaps in taken for gap in gaps]
            medians = [percentiles(gaps)["p50"] for gaps in taken]
            sides[path] = {"label": path, "us": percentiles(every), "p50_of_rounds": medians}
        ratio = sides[OURS]["us"]["p50"] / sides[UPSTREAM]["us"]["p50"]
        entries.append(
            {
                "case": {"batch": batch, "tokens": _TOKENS, "mode": "decode"},
                "baseline": sides[UPSTREAM],
                "candidate": sides[OURS],
                "ratio_p50": round(ratio, 4),
            }
        )
    return entries
