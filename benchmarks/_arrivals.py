"""Arrivals of a load, and the figures of its answers.

Two engines read the same arrivals: seeded exponential gaps, and lengths of four distributions. The
token ids are random, so that no prompt begins like another.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

ARRIVING_S = 90.0
"""Seconds in which requests arrive."""
WARM_UP_S = 15.0
"""Seconds at the beginning whose requests are not counted."""


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
# number of GPUs -> distribution -> requests a second
RATES: dict[int, dict[str, tuple[float, ...]]] = {
    1: {"chat": (8, 24, 48), "1k1k": (2, 6), "8k1k": (1, 4), "short": (8, 24)},
    4: {"chat": (2, 6, 10), "1k1k": (0.5, 1.5), "short": (2, 6)},
    8: {"chat": (2, 6, 12), "1k1k": (1, 2), "8k1k": (0.3, 0.6), "short": (2, 6)},
}


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


def arrivals(
    lengths: Lengths, rate: float, seed: int, vocab_size: int, seconds: float, most_tokens: int
) -> list[Arrival]:
    """Draw the requests of a load.

    Args:
        rate: mean number of requests a second.
        most_tokens: tokens of a prompt and its answer at most; each is cut to half of it.
    """
    rng = np.random.default_rng(seed)
    found, at = [], rng.exponential(1 / rate)
    while at < seconds:
        size, new_tokens = (
            min(_draw(rng, one), most_tokens // 2) for one in (lengths.prompt, lengths.answer)
        )
        prompt = rng.integers(10, vocab_size, size).tolist()
        found.append(Arrival(float(at), prompt, new_tokens))
        at += rng.exponential(1 / rate)
    return found


def _draw(rng: np.random.Generator, rule: tuple[int, int, tuple[float, float] | None]) -> int:
    low, high, shape = rule
    if shape is None:
        return int(rng.integers(low, high + 1))
    return int(min(max(rng.lognormal(*shape), low), high))


def figures(
    load: Sequence[Arrival], times: Sequence[Sequence[float]], lengths: Lengths, warm_up_s: float
) -> dict[str, Any]:
    """Return the figures of a load: milliseconds, output tokens a second, share of good answers.

    Args:
        load: its requests.
        times: of each request, the seconds after the beginning at which its tokens came.
        warm_up_s: requests that arrive earlier are not counted.

    Raises:
        ValueError: an answer lacks tokens.
    """
    firsts, per_token, gaps, good = [], [], [], []
    for request, came in zip(load, times, strict=True):
        if len(came) != request.new_tokens:
            raise ValueError(f"an answer has {len(came)} tokens, wanted {request.new_tokens}")
        if request.at < warm_up_s:
            continue
        first = came[0] - request.at
        each = (came[-1] - came[0]) / max(len(came) - 1, 1)
        firsts.append(first)
        per_token.append(each)
        gaps += np.diff(came).tolist()
        good.append(first <= lengths.first_token_s and each <= lengths.token_s)
    ends = [came[-1] for came in times]
    return {
        "requests": len(firsts),
        "first_token_ms": _spread(firsts),
        "token_ms": _spread(per_token),
        "gap_ms": _spread(gaps),
        "tokens_per_s": sum(map(len, times)) / max(ends, default=math.nan),
        "good_share": float(np.mean(good)) if good else math.nan,
    }


def _spread(seconds: Iterable[float]) -> dict[str, float]:
    """Return median and p99 in milliseconds, NaN without a value."""
    values = [1e3 * one for one in seconds]
    if not values:
        return {"p50": math.nan, "p99": math.nan}
    p50, p99 = np.percentile(values, (50, 99))
    return {"p50": float(p50), "p99": float(p99)}
