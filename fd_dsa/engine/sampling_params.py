"""What a caller may ask of sampler, stop rules and prefix cache, checked when it is made."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

SEED_MIN = -(2**63)
SEED_MAX = 2**64 - 1


@dataclass(frozen=True)
class SamplingParams:
    """How one request is sampled and when it ends.

    The order is temperature, then top-k, then top-p over what top-k left.

    Args:
        temperature: >= 0; 0 (and anything below 1e-5) is greedy, ties to the lowest id.
        top_p: in [0, 1]; the smallest set of most likely tokens with this mass. 1 = off.
        top_k: number of most likely tokens kept; -1 or 0 = off.
        max_tokens: output tokens, >= 1; None = whatever is left of the context.
        stop: a string or several; the output ends before the first one that is completed.
        ignore_eos: go on after an end-of-sequence token.
        seed: draws of the request depend on it and the position in the output alone;
            None = derived from the engine's seed and the request's arrival number.
        cache_salt: a text, not empty; the request shares cache blocks only with requests of the
            same one. None = with all that have none.
        skip_reading_prefix_cache: compute the whole prompt, also where earlier requests have;
            what is computed can be found by later ones.

    Raises:
        ValueError: a field is out of range or of another type; names field and value.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    max_tokens: int | None = 16
    stop: str | Sequence[str] | None = None
    ignore_eos: bool = False
    seed: int | None = None
    cache_salt: str | None = None
    skip_reading_prefix_cache: bool = False

    def __post_init__(self) -> None:
        """Check every field."""
        _check_float("temperature", self.temperature, 0.0, math.inf)
        _check_float("top_p", self.top_p, 0.0, 1.0)
        _check_int("top_k", self.top_k, -1, None)
        if self.max_tokens is not None:
            _check_int("max_tokens", self.max_tokens, 1, None)
        if self.seed is not None:
            _check_int("seed", self.seed, SEED_MIN, SEED_MAX)
        for name in ("ignore_eos", "skip_reading_prefix_cache"):
            value = getattr(self, name)
            if not isinstance(value, bool):
                raise ValueError(f"{name} is {value!r}; it must be true or false")
        salt = self.cache_salt
        if salt is not None and (not isinstance(salt, str) or not salt):
            raise ValueError(f"cache_salt is {salt!r}; it must be a non-empty string")
        for text in self.stop_strings:
            if not isinstance(text, str) or not text:
                raise ValueError(f"stop has the entry {text!r}; it must be a non-empty string")

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """The stop strings as a tuple, empty when there are none."""
        if self.stop is None:
            return ()
        if isinstance(self.stop, str):
            return (self.stop,)
        if not isinstance(self.stop, Sequence):
            raise ValueError(f"stop is {self.stop!r}; it must be a string or a list of strings")
        return tuple(self.stop)


def _check_float(name: str, value: Any, low: float, high: float) -> None:
    """ValueError unless `value` is a finite number in [low, high]."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or not low <= value <= high:
        allowed = f"in [{low:g}, {high:g}]" if math.isfinite(high) else f"finite and >= {low:g}"
        raise ValueError(f"{name} is {value!r}; it must be a number {allowed}")


def _check_int(name: str, value: Any, low: int, high: int | None) -> None:
    """ValueError unless `value` is an integer in [low, high]."""
    integer = isinstance(value, int) and not isinstance(value, bool)
    if not integer or value < low or (high is not None and value > high):
        allowed = f">= {low}" if high is None else f"in [{low}, {high}]"
        raise ValueError(f"{name} is {value!r}; it must be an integer {allowed}")
