"""Draft tokens of a request, and acceptance statistics that choose their number."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from operator import mul
from typing import Any

# least share of a new observation in a rate
_WEIGHT = 0.05
# as how many observations the usual rate counts
_FIRST_COUNT = 3
# share of the way back to the usual rate in a step without the draft
_DRIFT = 1 / 1024


@dataclass(frozen=True, slots=True)
class Drafts:
    """Draft tokens of a request for one step.

    Attributes:
        tokens: their ids, or their indices in the `TokenBuffer` if only the device has the ids.
        is_pending: True if `tokens` are indices.
    """

    tokens: list[int]
    is_pending: bool = False

    def __len__(self) -> int:
        return len(self.tokens)

    def first(self, count: int) -> Drafts:
        """Return the first `count` drafts."""
        return Drafts(self.tokens[:count], self.is_pending)


NO_DRAFTS = Drafts([])


class DraftState:
    """Drafts of a request, and how many pay by the rate at which those before were accepted.

    A rate is the mean of what was seen, and of the last twenty or so once there are more. With
    rates r1, r2 and so on a step with n drafts gives 1 + r1 + r1 r2 + ... tokens. The number
    that gives the most tokens for the time of a step is taken, which may be none. Rates of the
    drafts that are left out drift back to the usual one, so that they are tried now and then.

    Args:
        most: drafts of a step.
        usual_rate: assumed of drafts that nothing is known of yet.

    Attributes:
        memory: what the drafter keeps of the request.
    """

    def __init__(self, most: int, usual_rate: float) -> None:
        self.memory: Any = None
        self._usual_rate = usual_rate
        self._rates, self._counts = [usual_rate] * most, [_FIRST_COUNT] * most

    def length(self, costs: Sequence[float], rows: float = 1.0) -> int:
        """Drafts of the next step, which give the most tokens for its time; 0 where none pay.

        Args:
            costs: [n] time of a step with n drafts a row, from 0 to the most.
            rows: of the step, for each one with drafts.
        """
        tokens = accumulate(accumulate(self._rates, mul), initial=rows)
        gains = [count / cost for count, cost in zip(tokens, costs, strict=True)]
        best = gains.index(max(gains))
        for place in range(best, len(self._rates)):
            self._rates[place] += _DRIFT * (self._usual_rate - self._rates[place])
        return best

    def observe(self, num_drafts: int, num_accepted: int) -> None:
        """Take in how many of a step's drafts stood, the first ones."""
        for place in range(min(num_accepted + 1, num_drafts)):
            self._counts[place] += 1
            weight = max(_WEIGHT, 1 / self._counts[place])
            self._rates[place] += weight * ((place < num_accepted) - self._rates[place])
