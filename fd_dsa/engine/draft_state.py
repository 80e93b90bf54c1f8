"""Number of drafts that pays: acceptance rates of a request, and costs of steps with drafts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from operator import mul
from typing import Any

import numpy as np

# minimum weight of a new observation
_WEIGHT = 0.05
# weight of the prior rate, in observations
_FIRST_COUNT = 3
# share of the difference to the prior rate that a rate loses in a step without its draft
_DRIFT = 1 / 1024
# row count above that of any step
_FAR = 1 << 20


class DraftState:
    """Acceptance rates of a request's drafts, by position, and the number of drafts that pays.

    A rate is the mean of about the last twenty observations. With rates r1, r2 and so on a step
    with n drafts gives 1 + r1 + r1 r2 + ... tokens. The best number of drafts gives the most tokens
    for the time of a step, and may be 0. Rates of drafts that are left out drift back to the prior
    rate, so that the drafts are tried again now and then.

    Args:
        max_drafts: maximum number of drafts in a step.
        prior_acceptance_rate: acceptance rate that is assumed before any draft was verified.

    Attributes:
        memory: data that the drafter keeps for the request.
    """

    def __init__(self, max_drafts: int, prior_acceptance_rate: float) -> None:
        self.memory: Any = None
        self._prior_rate = prior_acceptance_rate
        self._rates, self._counts = (
            [prior_acceptance_rate] * max_drafts,
            [_FIRST_COUNT] * max_drafts,
        )

    def length(self, costs: Sequence[float], rows: float = 1.0) -> int:
        """Return the number of drafts that gives the most tokens for the time of a step.

        Args:
            costs: time of a step with 0, 1 and so on drafts a row.
            rows: number of rows of the step for each row with drafts.
        """
        tokens = accumulate(accumulate(self._rates, mul), initial=rows)
        gains = [count / cost for count, cost in zip(tokens, costs, strict=True)]
        best = gains.index(max(gains))
        for place in range(best, len(self._rates)):
            self._rates[place] += _DRIFT * (self._prior_rate - self._rates[place])
        return best

    def record(self, num_drafts: int, num_accepted: int) -> None:
        """Record that a step accepted the first `num_accepted` of its drafts."""
        for place in range(min(num_accepted + 1, num_drafts)):
            self._counts[place] += 1
            weight = max(_WEIGHT, 1 / self._counts[place])
            self._rates[place] += weight * ((place < num_accepted) - self._rates[place])


class DraftCosts:
    """Table of the time of a decode step by its rows and drafts, seconds.

    Args:
        seconds: number of rows -> times of a step with 0, 1, ... drafts a row, seconds.
    """

    def __init__(self, seconds: Mapping[int, Sequence[float]]) -> None:
        # times must not fall with the size, so a faster larger step corrects smaller ones
        lowest = np.array([*seconds.values()])[::-1, ::-1]
        lowest = np.minimum.accumulate(np.minimum.accumulate(lowest, 0), 1)[::-1, ::-1]
        # extrapolate along the last two measured sizes
        rows, lowest = np.array([0, *seconds]), np.vstack([np.zeros_like(lowest[:1]), lowest])
        a_row = (lowest[-1] - lowest[-2]) / (rows[-1] - rows[-2])
        self._rows = [*seconds, _FAR]
        self._seconds = np.vstack([lowest[1:], lowest[-1] + (_FAR - rows[-1]) * a_row])

    def of(self, num_rows: int, num_drafting: int) -> list[float]:
        """Return the times of a step whose drafting rows have 0, 1, ... drafts each, seconds.

        Args:
            num_rows: rows of the step.
            num_drafting: rows that have drafts.
        """
        # use the cost of a smaller step with the same number of tokens in which all rows draft
        rows = [(num_rows + n * num_drafting) / (1 + n) for n in range(self._seconds.shape[1])]
        columns = zip(rows, self._seconds.T, strict=True)
        return [float(np.interp(count, self._rows, seconds)) for count, seconds in columns]
