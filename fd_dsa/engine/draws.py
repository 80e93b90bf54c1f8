"""Draws of tokens from rows of logits, with or without min-p, top-k and top-p."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from fd_dsa.engine.row_draw import NOT_FINITE, RowDraw
from fd_dsa.ops._host import Scratch

Bool = npt.NDArray[np.bool_]
Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]
Int64 = npt.NDArray[np.int64]

DRAW = np.dtype(
    [
        ("row", np.int64),
        ("temperature", np.float64),
        ("min_p", np.float64),
        ("top_k", np.int64),
        ("top_p", np.float64),
        ("uniform", np.float64),
    ]
)
"""One draw: its row of logits; temperature > 0; min_p in [0, 1], 0 = off; top_k, 0 = off; top_p in
[0, 1], 1 = off; uniform in [0, 1). The weight of a token is exp((logit - largest) / temperature).
"""

# bounds the temporaries where calls for each row would take longer than memory
_GROUP_LOGITS = 2**20
_MAX_GROUP_SIZE = 64
_LOWEST = np.finfo(np.float32).min


def draw_tokens(
    logits: Float32, draws: npt.NDArray[np.void], row_draw: RowDraw, scratch: Scratch
) -> Int64:
    """Token of each draw: min-p, then top-k, then top-p of what they left.

    Args:
        logits: float32 [rows, vocab_size].
        draws: DRAW [n], rows ascending.
        row_draw: for draws without min-p and top-k.
        scratch: for temporaries as large as some rows.

    Returns:
        int64 [n]; token ids or NOT_FINITE.
    """
    vocab_size = logits.shape[1]
    draws["top_k"][draws["top_k"] >= vocab_size] = 0
    is_cut = (draws["min_p"] > 0) | (draws["top_k"] > 0)
    tokens = np.empty(len(draws), np.int64)
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        (cut,), (single,) = is_cut.nonzero(), (~is_cut).nonzero()
        group_size = max(1, _GROUP_LOGITS // vocab_size)
        for begin in range(0, len(cut), group_size):
            group = cut[begin : begin + group_size]
            tokens[group] = _draw_cut(logits, draws[group], scratch)
        for place, draw in zip(single.tolist(), draws[single].tolist(), strict=True):
            row, temperature, _, _, top_p, uniform = draw
            tokens[place] = row_draw.draw(logits[row], temperature, top_p, uniform)
    return tokens


def rows_of(logits: Float32, rows: Int64) -> Float32:
    """Some rows, in ascending order; a view where they are neighbours."""
    if len(rows) and rows[-1] - rows[0] + 1 == len(rows):
        return logits[rows[0] : rows[-1] + 1]
    return logits[rows]


def lower_bound(logits: Float32, width: int) -> Float32:
    """A value in each row which at least `width` logits reach, and few more.

    The maxima of disjoint groups of columns are that many logits of their own: their width-th
    largest is a bound. With few columns for the width, the width-th largest logit itself.
    """
    num_rows, vocab_size = logits.shape
    if width >= vocab_size:
        return np.full(num_rows, -np.inf, np.float32)
    group_size = min(_MAX_GROUP_SIZE, vocab_size // (4 * width))
    if group_size < 2:
        return np.partition(logits, vocab_size - width, axis=1)[:, vocab_size - width]
    num_columns = vocab_size // group_size
    head = logits[:, : num_columns * group_size].reshape(num_rows, group_size, num_columns)
    maxima = head.max(axis=1)
    return np.partition(maxima, num_columns - width, axis=1)[:, num_columns - width]


def _draw_cut(logits: Float32, draws: Any, scratch: Scratch) -> Int64:
    """Draws with min-p, top-k or both, and top-p of what they left."""
    tokens = np.full(len(draws), NOT_FINITE, np.int64)
    largest = rows_of(logits, draws["row"]).max(axis=1)
    usable = np.flatnonzero(np.isfinite(largest))
    if not len(usable):
        return tokens
    draws, largest = draws[usable], largest[usable].astype(np.float64)
    rows = rows_of(logits, draws["row"])
    bounds = largest + draws["temperature"] * np.log(draws["min_p"])
    is_top_k = draws["top_k"] > 0
    if is_top_k.any():
        few = lower_bound(rows, int(draws["top_k"].max()))
        bounds = np.maximum(bounds, np.where(is_top_k, few, -np.inf))
    kept, places, begins = _candidates(rows, bounds, scratch)
    weights = kept - largest[:, None]
    weights /= draws["temperature"][:, None]
    np.exp(weights, out=weights)
    ranked = np.flatnonzero(is_top_k | (draws["top_p"] < 1))
    if len(ranked):
        weights[ranked] *= _is_ranked(kept[ranked], weights[ranked], draws[ranked])
    # in the order of ids, so that rounding in the logits moves no token's place in the sum
    ends = weights.cumsum(axis=1)
    # the first column of positive weight whose running sum is above the draw
    target = np.minimum(draws["uniform"] * ends[:, -1], np.nextafter(ends[:, -1], 0.0))
    columns = (ends <= target[:, None]).sum(axis=1)
    tokens[usable] = places[begins + columns] % logits.shape[1]
    return tokens


def _candidates(logits: Float32, bounds: Float64, scratch: Scratch) -> tuple[Float32, Int64, Int64]:
    """The logits of each row that are at least its bound, never -inf, in the order of their ids.

    Args:
        logits: float32 [rows, vocab_size] without NaN.
        bounds: float64 [rows], each at most the largest logit of its row.
        scratch: where the comparison is kept.

    Returns:
        float32 [rows, n], -inf after a row's last candidate; int64, where the candidates of all
        rows are in the flattened logits; int64 [rows], each row's first entry of these.

    Cost: two passes over the logits.
    """
    num_rows, vocab_size = logits.shape
    nearest = bounds.astype(np.float32)
    rounded_up = np.where(nearest < bounds, np.nextafter(nearest, np.float32(np.inf)), nearest)
    marks = scratch.take("marks", logits.shape, np.bool_)
    np.greater_equal(logits, np.maximum(rounded_up, _LOWEST)[:, None], out=marks)
    places = np.flatnonzero(marks)
    begins = np.searchsorted(places, np.arange(num_rows + 1) * vocab_size)
    values = logits.reshape(-1)[places]
    kept = np.full((num_rows, int(np.diff(begins).max())), -np.inf, np.float32)
    for row, (begin, end) in enumerate(pairwise(begins.tolist())):
        kept[row, : end - begin] = values[begin:end]
    return kept, places, begins[:-1]


def _is_ranked(logits: Float32, weights: Float64, draws: Any) -> Bool:
    """Which candidates, [n, m], top-k and then top-p keep."""
    index, num_columns = np.arange(len(weights)), weights.shape[1]
    # stable, so that ties go to the lower id
    order = np.argsort(-logits, axis=1, kind="stable")
    mass = np.take_along_axis(weights, order, axis=1).cumsum(axis=1)
    top_k = draws["top_k"]
    count = np.where(top_k > 0, np.minimum(top_k, num_columns), num_columns)
    nucleus_mass = draws["top_p"] * mass[index, count - 1]
    nucleus = (mass < nucleus_mass[:, None]).sum(axis=1) + 1
    count = np.where(draws["top_p"] < 1, np.minimum(nucleus, count), count)
    keep = np.empty(weights.shape, np.bool_)
    np.put_along_axis(keep, order, np.arange(num_columns) < count[:, None], axis=1)
    return keep
