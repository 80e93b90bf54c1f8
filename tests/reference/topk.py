"""Oracle of the top-k selection: one sort of the positions of each row.

Source: DeepSeek-V3.2 paper (arXiv 2512.02556) §2; ties go to the lower position.
"""

from __future__ import annotations

import math
from typing import Any


def ref_topk(scores: Any, length: int, k: int) -> list[int]:
    """Positions of the k best of the first `length` scores, ascending, then -1 up to k entries.

    Higher scores come first, then lower positions; -0.0 equals 0.0, NaN comes after -inf.
    """

    def rank(position: int) -> tuple[bool, float, int]:
        score = float(scores[position])
        return (True, 0.0, position) if math.isnan(score) else (False, -score, position)

    valid = range(min(length, len(scores)))
    chosen = sorted(sorted(valid, key=rank)[:k])
    return chosen + [-1] * (k - len(chosen))


def ref_slot(position: int, block_table: Any, block_size: int) -> int:
    """Cache slot of a position of the row that owns `block_table`; -1 stays -1."""
    if position < 0:
        return -1
    return int(block_table[position // block_size]) * block_size + position % block_size
