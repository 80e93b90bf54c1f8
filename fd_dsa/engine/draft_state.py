"""Acceptance statistics of a request's drafts, which choose the number of drafts."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from operator import mul
from typing import Any

# minimum weight of a new observation
_WEIGHT = 0.05
# weight of the prior rate, in observations
_FIRST_COUNT = 3
# share of the difference to the prior rate that a rate loses in a step without its draft
_DRIFT = 1 / 1024


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
