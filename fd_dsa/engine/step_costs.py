"""Cost table of drafts: time of a decode step by its rows and drafts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

# row count above that of any step
_FAR = 1 << 20


class StepCosts:
    """Seconds of a decode step by its rows and drafts.

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
