"""Arrivals of a load, and the figures of its answers.

Two engines read the same arrivals: seeded exponential gaps, and lengths of four distributions. The
token ids are random, so that no prompt begins like another.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks._harness import table

ARRIVING_S = 90.0
"""Seconds in which requests arrive."""
WARM_UP_S = 15.0
"""Seconds at the beginning whose requests are not counted."""
RUNS = 2
"""Runs of a load, of which the last counts."""
_ERROR_LENGTH = 200


@dataclass(frozen=True)
class Lengths:
    """A distribution of prompt and answer lengths in tokens, and the limits of a good answer.

    Attributes:
        prompt, answer: least, largest, and (mu, sigma) of a lognormal distribution. Without them
            all lengths are equally likely.
        first_token_s, token_s: longest time to the first token and time per token of a good answer.
    """

    prompt: tuple[int, int, tuple[float, float] | None]
    answer: tuple[int, int, tuple[float, float] | None]
    first_token_s: float = 1.0
    token_s: float = 0.05


LENGTHS = {
    # ShareGPT's requests have a mean of 219 and 197 tokens
    "chat": Lengths((4, 4096, (4.6, 1.35)), (8, 1024, (4.85, 1.0))),
    "1k1k": Lengths((819, 1229, None), (819, 1229, None)),
    "8k1k": Lengths((6554, 9830, None), (819, 1229, None), first_token_s=2.0),
    "short": Lengths((100, 2000, None), (64, 256, None)),
}
# number of GPUs at least -> distribution -> requests a second
RATES: dict[int, dict[str, tuple[float, ...]]] = {
    1: {"chat": (8, 24, 48), "1k1k": (2, 6), "8k1k": (1, 4), "short": (8, 24)},
    4: {"chat": (2, 6, 10), "1k1k": (0.5, 1.5), "short": (2, 6)},
    8: {"chat": (2, 6, 12), "1k1k": (1, 2), "8k1k": (0.3, 0.6), "short": (2, 6)},
}


def rates_of(ranks: int) -> dict[str, tuple[float, ...]]:
    """Return the rates of each distribution for a number of GPUs."""
    return RATES[max(known for known in RATES if known <= ranks)]


@dataclass(frozen=True)
class Arrival:
    """A request of a load.

    Attributes:
        at: seconds after the beginning.
        prompt: token ids.
        new_tokens: tokens of the answer, which ends at no other token.
    """

    at: float
    prompt: list[int]
    new_tokens: int


@dataclass(frozen=True)
class Load:
    """Requests of one distribution that arrive at random.

    Attributes:
        lengths: name of the distribution.
        rate: mean number of requests a second.
        seconds: seconds in which requests arrive.
        warm_up_s: seconds at the beginning whose requests are not counted.
        seed: seed of times, lengths and token ids.
    """

    lengths: str
    rate: float
    seconds: float = ARRIVING_S
    warm_up_s: float = WARM_UP_S
    seed: int = 1

    @property
    def name(self) -> str:
        """Name of the load in results."""
        return f"{self.lengths}, {self.rate:g}/s"

    def arrivals(self, run: int, vocab_size: int, most_tokens: int) -> list[Arrival]:
        """Draw the requests of a run.

        Runs differ in their token ids alone, and so do loads. A repeated prompt would be found in
        the caches of the engine.

        Args:
            run: number of the run.
            most_tokens: tokens of a prompt and its answer at most; each is cut to half of it.
        """
        lengths, rng = LENGTHS[self.lengths], np.random.default_rng(self.seed)
        own = [self.seed, run, round(1e3 * self.rate), *self.lengths.encode()]
        ids = np.random.default_rng(own)
        found, at = [], rng.exponential(1 / self.rate)
        while at < self.seconds:
            size, new_tokens = (
                min(_draw(rng, one), most_tokens // 2) for one in (lengths.prompt, lengths.answer)
            )
            found.append(Arrival(at, ids.integers(10, vocab_size, size).tolist(), new_tokens))
            at += rng.exponential(1 / self.rate)
        return found


def _draw(rng: np.random.Generator, rule: tuple[int, int, tuple[float, float] | None]) -> int:
    low, high, shape = rule
    if shape is None:
        return int(rng.integers(low, high + 1))
    return int(min(max(rng.lognormal(*shape), low), high))


def figures(
    load: Load, requests: Sequence[Arrival], answers: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Return the figures of a run.

    Args:
        load: the load.
        requests: its requests.
        answers: of each request, `times`, the seconds after the beginning at which its tokens came,
            and `error` if there was one.

    Returns:
        Of all requests: `failed`, the number of those with an error or without all of their tokens,
        the number of each error, and `tokens_per_s`. Of the requests after the warm-up: their
        number, good answers a second, and median and p99 of three latencies in milliseconds. A
        failed request has no latencies and is not good.
    """
    firsts, per_token, gaps, good = [], [], [], 0
    errors: Counter[str] = Counter()
    lengths = LENGTHS[load.lengths]
    for request, answer in zip(requests, answers, strict=True):
        came = answer["times"]
        if error := answer.get("error") or _missing(request, came):
            errors[error[:_ERROR_LENGTH]] += 1
        if error or request.at < load.warm_up_s:
            continue
        first = came[0] - request.at
        each = (came[-1] - came[0]) / max(len(came) - 1, 1)
        firsts.append(first)
        per_token.append(each)
        gaps += np.diff(came).tolist()
        good += first <= lengths.first_token_s and each <= lengths.token_s
    all_times = [time for answer in answers for time in answer["times"]]
    return {
        "requests": sum(request.at >= load.warm_up_s for request in requests),
        "failed": errors.total(),
        "errors": dict(errors.most_common()),
        "first_token_ms": _spread(firsts),
        "token_ms": _spread(per_token),
        "gap_ms": _spread(gaps),
        "tokens_per_s": len(all_times) / max(all_times) if all_times else 0.0,
        "good_per_s": good / (load.seconds - load.warm_up_s),
    }


def _missing(request: Arrival, came: Sequence[float]) -> str:
    """Return the error of an answer with too few or too many tokens, or ""."""
    if len(came) == request.new_tokens:
        return ""
    return "the answer lacks tokens" if len(came) < request.new_tokens else "too many tokens"


def _spread(seconds: Sequence[float]) -> dict[str, float | None]:
    """Return median and p99 in milliseconds, None without a value."""
    if not seconds:
        return {"p50": None, "p99": None}
    p50, p99 = np.percentile(seconds, (50, 99))
    return {"p50": 1e3 * float(p50), "p99": 1e3 * float(p99)}


def rates_table() -> str:
    """Return a table of the loads for each number of GPUs, with the minutes of their arrivals."""
    half = ARRIVING_S / 2
    rows = [["GPUs", "lengths", "requests a second", "minutes", f"with `--seconds {half:g}`"]]
    for ranks, known in RATES.items():
        for name, rates in known.items():
            minutes = [f"{RUNS * len(rates) * each / 60:g}" for each in (ARRIVING_S, half)]
            rows.append([str(ranks), name, ", ".join(f"{rate:g}" for rate in rates), *minutes])
    return table(rows)


def lengths_table() -> str:
    """Return a table of the distributions and of their limits of a good answer."""
    rows = [["lengths", "prompt, tokens", "answer, tokens", "good: first token, s", "a token, ms"]]
    for name, one in LENGTHS.items():
        spans = [f"{low:,} to {high:,}" for low, high, _ in (one.prompt, one.answer)]
        rows.append([name, *spans, f"{one.first_token_s:g}", f"{1e3 * one.token_s:g}"])
    return table(rows)
