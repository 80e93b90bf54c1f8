"""Draws of tokens from rows of logits, with or without min-p, top-k and top-p.

A row is read a few times while it is in the processor's cache, and nothing of its size is sorted:
a bound leaves the tokens that the cuts may keep, and few more.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from fd_dsa.ops.sampling.token_buffer import NOT_FINITE

Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]
Int64 = npt.NDArray[np.int64]

# weights of a block: what is looked for is in one, so no running sum over all of them is needed
_BLOCK = 512
# farther below 1 than rounding brings a sum
_NEARLY = 0.999
_MAX_GROUP_SIZE = 64
_LOWEST = np.finfo(np.float32).min


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


class RowDraw:
    """Draws from one row after another; weights are exp((logit - largest) / temperature).

    Cuts are exact: bounds decide how many tokens are sorted, never which are kept. Of equal weights
    the larger logits are kept, which float32 may not distinguish, then the lower ids.
    """

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self._weights = np.empty(vocab_size, np.float32)
        self._marks = np.empty(vocab_size, np.bool_)
        # of a sample, which takes more time than it saves where there are few
        self._stride = vocab_size // 1024 if vocab_size > 16384 else 0

    def draw(
        self,
        logits: Float32,
        uniform: float,
        temperature: float,
        min_p: float,
        top_k: int,
        top_p: float,
    ) -> int:
        """Token of a row, or NOT_FINITE: min-p, then top-k, then top-p of what they left.

        Args:
            logits: float32 [vocab_size].
            uniform: in [0, 1).
            temperature: > 0.
            min_p: in [0, 1]; 0 = off.
            top_k: 0 = off, as everything from vocab_size on.
            top_p: in [0, 1]; 1 = off.
        """
        largest = np.maximum.reduce(logits)
        if not math.isfinite(largest):
            return NOT_FINITE
        if min_p or 0 < top_k < self.vocab_size:
            kept = self._above_bounds(logits, float(largest), temperature, min_p, top_k)
            return _draw_ranked(logits, *kept, uniform, top_k, top_p)
        weights = np.subtract(logits, largest, out=self._weights)
        if temperature != 1:
            np.divide(weights, np.float32(temperature), out=weights)
        np.exp(weights, out=weights)
        if top_p == 1:
            return _place(weights, uniform)
        mass = float(_sums(weights).sum(dtype=np.float64))
        left_out = _NEARLY * (1 - top_p) * mass
        # all tokens below it together have less mass than is left out
        bounds = [left_out / self.vocab_size]
        if self._stride:
            # those below it two thirds of that or so, thus fewer are sorted
            sample = np.sort(weights[:: self._stride])
            place = sample[:-1].cumsum(dtype=np.float64).searchsorted(0.7 * left_out / self._stride)
            bounds.insert(0, sample[place])
        for bound in bounds:
            ids = np.greater_equal(weights, bound, out=self._marks).nonzero()[0]
            heavy = weights[ids]
            if heavy.sum(dtype=np.float64) >= mass - left_out:
                break
        return _draw_ranked(logits, ids, heavy, uniform, 0, top_p, mass)

    def _above_bounds(
        self, logits: Float32, largest: float, temperature: float, min_p: float, top_k: int
    ) -> tuple[Int64, Float64]:
        """Ids, ascending, and weights of all tokens that min-p and top-k may keep, and few more."""
        bound = largest + temperature * np.log(min_p) if min_p else -np.inf
        if 0 < top_k < self.vocab_size:
            bound = max(bound, lower_bound(logits[None], top_k).item())
        nearest = np.float32(bound)
        if nearest < bound:
            nearest = np.nextafter(nearest, np.float32(np.inf))
        np.greater_equal(logits, max(nearest, _LOWEST), out=self._marks)
        ids = self._marks.nonzero()[0]
        return ids, np.exp((logits[ids].astype(np.float64) - largest) / temperature)


def _draw_ranked(
    logits: Float32,
    ids: Int64,
    weights: Float32 | Float64,
    uniform: float,
    top_k: int,
    top_p: float,
    mass: float | None = None,
) -> int:
    """Token by top-k and then top-p of some ids, ascending; ties go to the lower id.

    Args:
        mass: that top-p is a share of; None: that of what top-k leaves.
    """
    if top_k or top_p < 1:
        order: npt.NDArray[Any] = np.sort(weights)[::-1][: top_k or None]
        last = len(order) - 1
        if top_p < 1:
            last = _place(order, top_p, mass, "left")
        keep = weights >= order[last]
        surplus = np.count_nonzero(keep) - last - 1
        if surplus:
            ties = np.flatnonzero(weights == order[last])
            keep[ties[np.lexsort((ties, -logits[ids[ties]]))[-surplus:]]] = False
        weights = weights * keep
    # in the order of ids, so that rounding in the logits moves no token's place in the sum
    return int(ids[_place(weights, uniform)])


def _place(
    weights: Float32 | Float64,
    share: float,
    mass: float | None = None,
    side: Literal["left", "right"] = "right",
) -> int:
    """First place up to which weights have more than a share of a mass.

    Args:
        weights: [n], not all 0.
        share: in [0, 1]; where rounding brings it above all weights, it is just below them.
        mass: None: that of the weights.
        side: "left": exactly the share is enough.
    """
    sums = weights if len(weights) <= _BLOCK else _sums(weights)
    ends = sums.cumsum(dtype=np.float64)
    target = share * (mass or ends.item(-1))
    place = int(ends.searchsorted(min(target, math.nextafter(ends.item(-1), 0.0)), side))
    if sums is weights:
        return place
    inside, before = weights[place * _BLOCK :][:_BLOCK], ends.item(place - 1) if place else 0.0
    return place * _BLOCK + _place(inside, target - before, 1.0, side)


def _sums(weights: Float32 | Float64) -> Float32 | Float64:
    """Those of blocks, the last one of what is left."""
    whole = len(weights) // _BLOCK * _BLOCK
    sums = np.einsum("bi->b", weights[:whole].reshape(-1, _BLOCK))
    return np.append(sums, weights[whole:].sum()) if whole < len(weights) else sums
