"""Cost table of drafts: time of a decode step by its rows and drafts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

# more rows than any step has
_FAR = 1 << 20


class StepCosts:
    """Seconds of a decode step by its rows and drafts.

    Args:
        seconds: number of rows -> times of a step of which each row has 0, 1, ... drafts, seconds.
    """

    def __init__(self, seconds: Mapping[int, Sequence[float]]) -> None:
        # a larger step that took less time shows what was noise
        least = np.array([*seconds.values()])[::-1, ::-1]
        least = np.minimum.accumulate(np.minimum.accumulate(least, 0), 1)[::-1, ::-1]
        # each row past the last that were measured takes as long as each of those before
        rows, least = np.array([0, *seconds]), np.vstack([np.zeros_like(least[:1]), least])
        a_row = (least[-1] - least[-2]) / (rows[-1] - rows[-2])
        self._rows = [*seconds, _FAR]
        self._seconds = np.vstack([least[1:], least[-1] + (_FAR - rows[-1]) * a_row])

    def of(self, num_rows: int, num_drafting: int) -> list[float]:
        """Return the times of a step whose drafting rows have 0, 1, ... drafts each, seconds.

        Args:
            num_rows: rows of the step.
            num_drafting: rows that have drafts.
        """
        # a step has the cost of the smaller step that has as many tokens if all rows draft
        rows = [(num_rows + n * num_drafting) / (1 + n) for n in range(self._seconds.shape[1])]
        columns = zip(rows, self._seconds.T, strict=True)
        return [float(np.interp(count, self._rows, seconds)) for count, seconds in columns]
