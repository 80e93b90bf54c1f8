"""What is known of one request's drafts: the next ones, and how many pay."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from math import prod
from operator import mul
from typing import Any

# least share of a new observation in a rate
_WEIGHT = 0.05
# of drafts that nothing is known of yet, and as how many observations it counts
_FIRST_RATE, _FIRST_COUNT = 0.7, 5
# steps before a draft more is tried; twice as many after each try that fails
_FIRST_REST, _LONGEST_REST = 16, 512


class DraftPace:
    """How many drafts a request gets, by the rate at which those before were accepted.

    A rate is the mean of what was seen, and of the last twenty or so once there are more. With
    rates r1, r2 and so on a step with n drafts gives 1 + r1 + r1 r2 + ... tokens. The number
    that gives the most tokens for the time of a step is taken, which may be none. After 16 steps
    with fewer than the most, one more is tried, if it pays when it stands. Each try that fails
    doubles these steps, up to 512; one that stands counts as the usual rate.

    Args:
        most: drafts of a step.
    """

    def __init__(self, most: int) -> None:
        self._rates, self._counts = [_FIRST_RATE] * most, [_FIRST_COUNT] * most
        self._rest = _FIRST_REST
        # drafts of the newest try, 0 = none; steps may be planned before it is observed
        self._num_rested, self._tried = 0, 0

    def best(self, costs: Sequence[float], rows: float = 1.0) -> int:
        """Drafts that give the most tokens for the time of a step; 0 where none pay.

        Args:
            costs: [n] time of a step with n drafts a row, from 0 to the most.
            rows: of the step, for each one with drafts.
        """
        tokens = accumulate(accumulate(self._rates, mul), initial=rows)
        gains = [count / cost for count, cost in zip(tokens, costs, strict=True)]
        return gains.index(max(gains))

    def length(self, best: int, costs: Sequence[float], rows: float = 1.0) -> int:
        """Drafts of the next step, of a request that has got a token since the call before.

        Args:
            best: of that step.
            costs, rows: as of `best`.
        """
        if best == len(self._rates):
            return best
        self._num_rested += 1
        if self._num_rested > self._rest:
            known = self._rates[:best]
            tokens, chance = rows + sum(accumulate(known, mul)), prod(known)
            if (tokens + chance) / costs[best + 1] > tokens / costs[best]:
                best = self._tried = best + 1
        return best

    def observe(self, num_drafts: int, num_accepted: int) -> None:
        """Take in how many of a step's drafts stood, the first ones."""
        for place in range(min(num_accepted + 1, num_drafts)):
            self._counts[place] += 1
            weight = max(_WEIGHT, 1 / self._counts[place])
            self._rates[place] += weight * ((place < num_accepted) - self._rates[place])
        if num_drafts == self._tried:
            self._num_rested, self._tried = 0, 0
            self._rest = min(2 * self._rest, _LONGEST_REST)
            if num_accepted == num_drafts:
                self._rest = _FIRST_REST
                self._rates[num_drafts - 1] = max(self._rates[num_drafts - 1], _FIRST_RATE)


@dataclass(slots=True)
class DraftState:
    """Drafts of a request.

    Attributes:
        pace: how many pay.
        proposal: tokens that may follow those that the request has.
        memory: what the drafter keeps of the request.
    """

    pace: DraftPace
    proposal: list[int] = field(default_factory=list)
    memory: Any = None
