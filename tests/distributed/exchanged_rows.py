"""Rows that ranks send to each other, of different numbers for each pair."""

from __future__ import annotations

import numpy as np


def exchanged(rank: int, size: int) -> tuple[np.ndarray, list[int], list[int], np.ndarray]:
    """Return the rows that a rank sends and their bounds, and the bounds and rows that arrive.

    Rank r sends (r + 2 s) % 4 rows to rank s, 0 to 3. There are two more rows at both ends, which
    stay.
    """
    of_pair = [[(sender + 2 * to) % 4 for to in range(size)] for sender in range(size)]

    def rows(sender: int, to: int) -> np.ndarray:
        count = of_pair[sender][to]
        return 100 * sender + 10 * to + np.arange(3 * count, dtype=np.int32).reshape(count, 3)

    kept = np.full((2, 3), -1, np.int32)
    sent = np.concatenate([kept, *(rows(rank, to) for to in range(size)), kept])
    wanted = np.concatenate([kept, *(rows(sender, rank) for sender in range(size)), kept])
    bounds = np.cumsum([2, *of_pair[rank]]).tolist()
    received = np.cumsum([2, *(row[rank] for row in of_pair)]).tolist()
    return sent, bounds, received, wanted
