"""Exact, deterministic top-k of indexer logits, and its translation to cache slots."""

from __future__ import annotations

from typing import Any

import numpy as np

from fd_dsa.ops._host import as_numpy, check_array, check_values
from fd_dsa.ops.topk.paddle_impl import ordered_bits, positions_to_slots, select_positions

__all__ = ["ordered_bits", "positions_to_slots", "topk_indices"]


def topk_indices(logits: Any, lengths: Any, k: int) -> np.ndarray:
    """Positions of the k best columns of each row, ascending, -1 where a row has fewer.

    A column ranks by higher score, then by lower position; -0.0 equals +0.0 and NaN ranks below
    every number. The result is a function of the scores alone: no atomics, no order of threads.

    Args:
        logits: float32 [num_rows, width]; columns at or past a row's length are not looked at.
        lengths: int32 or int64 [num_rows]; valid columns of each row, 0 to width.
        k: entries wanted, at least 1.

    Returns:
        int32 [num_rows, k].

    Raises:
        ShapeError, DtypeError, ValueError: before any work.
    """
    name = "topk_indices"
    check_array(name, "logits", logits, (None, None), ("float32",))
    check_array(name, "lengths", lengths, (logits.shape[0],), ("int32", "int64"))
    if k < 1:
        raise ValueError(f"{name}: k is {k}, allowed is at least 1")
    check_values(name, "lengths", as_numpy(lengths), 0, logits.shape[1] + 1)
    return select_positions(logits, lengths, k)
