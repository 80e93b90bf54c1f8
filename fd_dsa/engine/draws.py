"""Draws of tokens from rows of logits, with or without min-p, top-k and top-p.

A row is read a few times while it is in the processor's cache, and nothing of its size is sorted.
For top-p a sorted sample shows about where the nucleus ends, a sum over the row by how much that
is wrong, and the tokens between there and the end are sorted. With min-p or top-k a bound leaves
few tokens to look at.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]
Int64 = npt.NDArray[np.int64]

NOT_FINITE = -1
"""Instead of a token where the logits of a row hold NaN or +inf, or only -inf."""

# tokens of a block: a draw finds its block first, so it needs no running sum over all tokens
_BLOCK = 512
# a share of the mass: this near to another token the order of float32 sums may decide. NumPy's
# pairwise sums are more exact than einsum's and take more than twice as long
_NEAR = 3e-7
# a nucleus with fewer tokens of the sample is sorted whole
_NARROW = 16
_POSITIVE = np.nextafter(np.float32(0), np.float32(1))
_MAX_GROUP_SIZE = 64
_LOWEST = np.finfo(np.float32).min


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


class RowDraw:
    """Draws from one row after another; weights are exp((logit - largest) / temperature).

    Top-p is exact: the sample decides how many tokens are sorted, never which are kept. Of equal
    weights the larger logits are kept, which float32 may not distinguish, then the lower ids.
    """

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        # the weights of all tokens, and of those of a nucleus; what a row does not fill stays 0
        both = np.zeros((2, -(-vocab_size // _BLOCK), _BLOCK), np.float32)
        self._blocks, self._kept_blocks = both
        self._weights, self._kept = both.reshape(2, -1)[:, :vocab_size]
        self._marks, self._others = np.empty((2, vocab_size), np.bool_)
        # a longer sample takes more time than it saves
        self._stride = int(1.6 * vocab_size ** (1 / 3))

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
            return _draw_ranked(logits, *kept, top_k, top_p, uniform)
        weights = np.subtract(logits, largest, out=self._weights)
        if temperature != 1:
            np.divide(weights, np.float32(temperature), out=weights)
        np.exp(weights, out=weights)
        sums = np.einsum("bi->b", self._blocks)
        if top_p == 1:
            return _find(self._blocks, sums, uniform)
        mass = _total(sums)
        nucleus_mass = top_p * mass
        sample = weights[:: self._stride].copy()
        sample.sort()
        below = sample.cumsum(dtype=np.float64)
        place = int(below.searchsorted((mass - nucleus_mass) / self._stride, "right"))
        inside = len(sample) - place
        token = None
        if inside > _NARROW:
            token = self._draw_around(logits, sample, below, place, nucleus_mass, uniform)
        # the place and some standard deviations of a count; in the end all tokens
        bounds = [_POSITIVE]
        bounds += [sample[max(place - int(n * (inside**0.5 + 1)), 0)] for n in (6, 2)]
        while token is None:
            token = self._draw_above(logits, max(bounds.pop(), _POSITIVE), nucleus_mass, uniform)
        return token

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

    def _draw_above(
        self, logits: Float32, bound: np.float32, nucleus_mass: float, uniform: float
    ) -> int | None:
        """Token of a nucleus of this mass; None where some of it is lighter than a bound."""
        np.greater_equal(self._weights, bound, out=self._marks)
        ids = self._marks.nonzero()[0]
        # rounding may leave less than that of all
        kept = _kept(logits, ids, self._weights[ids], nucleus_mass, is_all=bound == _POSITIVE)
        if kept is None:
            return None
        ends = kept.cumsum(dtype=np.float64)
        return int(ids[_first_above(ends, uniform * ends.item(-1))])

    def _draw_around(
        self,
        logits: Float32,
        sample: Float32,
        below: Float64,
        place: int,
        nucleus_mass: float,
        uniform: float,
    ) -> int | None:
        """Token of a nucleus that ends near sample[place]; None where it ends too far from it."""
        split = sample[place]
        np.greater_equal(self._weights, split, out=self._marks)
        np.multiply(self._weights, self._marks, out=self._kept)
        sums = np.einsum("bi->b", self._kept_blocks).astype(np.float64)
        above = float(sums.sum())
        # the end by the sample, without the error that it makes at the split
        known = below[place - 1] if place else 0.0
        end = int(below.searchsorted(known + (above - nucleus_mass) / self._stride, "right"))
        # so many deviations of the count of a sample between two places
        margin = int(1.8 * abs(end - place) ** 0.5) + 2
        is_wider = above < nucleus_mass
        bound = end - margin if is_wider else end + margin
        if not 0 < bound < len(sample):
            return None
        np.greater_equal(self._weights, sample[bound], out=self._others)
        np.not_equal(self._marks, self._others, out=self._marks)
        ids = self._marks.nonzero()[0]
        weights = self._weights[ids]
        rest = nucleus_mass - above
        if not is_wider:
            rest += _total(weights)
        kept = _kept(logits, ids, weights, rest) if rest > 0 else None
        if kept is None:
            return None
        self._kept[ids] = kept
        change = kept if is_wider else kept - weights
        sums += np.bincount(ids // _BLOCK, change, len(sums))
        return _find(self._kept_blocks, sums, uniform)


def _draw_ranked(
    logits: Float32, ids: Int64, weights: Float64, top_k: int, top_p: float, uniform: float
) -> int:
    """Token by top-k and then top-p of some ids, ascending; ties go to the lower id."""
    if top_k or top_p < 1:
        order = np.argsort(-logits[ids], kind="stable")
        mass = weights[order].cumsum()
        count = min(top_k or len(ids), len(ids))
        if top_p < 1:
            count = min(int((mass < top_p * mass[count - 1]).sum()) + 1, count)
        weights[order[count:]] = 0
    # in the order of ids, so that rounding in the logits moves no token's place in the sum
    ends = weights.cumsum()
    return int(ids[_first_above(ends, uniform * ends.item(-1))])


def _find(blocks: Float32, sums: Float32 | Float64, uniform: float) -> int:
    """Id of a token: first the block that a draw falls into, then the token inside it.

    Args:
        blocks: float32 [num_blocks, _BLOCK], weights.
        sums: [num_blocks], about those of the blocks.
        uniform: in [0, 1).
    """
    token, distance = _find_by(blocks, sums, uniform)
    return token if distance > _NEAR else _find_by(blocks, blocks.sum(axis=1), uniform)[0]


def _find_by(blocks: Float32, sums: Float32 | Float64, uniform: float) -> tuple[int, float]:
    """A token by these sums, and how far the draw is from another one's, as a share of the mass."""
    ends = sums.cumsum(dtype=np.float64)
    mass = ends.item(-1)
    block = _first_above(ends, uniform * mass)
    rest = uniform * mass - (ends.item(block - 1) if block else 0.0)
    inside = blocks[block].cumsum(dtype=np.float64)
    if inside[-1] == 0:
        # what rounding left of a block
        return 0, 0.0
    column = _first_above(inside, rest)
    before = inside.item(column - 1) if column else 0.0
    return block * _BLOCK + column, min(rest - before, inside.item(column) - rest) / mass


def _first_above(ends: Float64, target: float) -> int:
    """First index whose running sum is above the target, so of positive weight.

    Args:
        ends: float64 [n], running sums of weights, the last one positive.
        target: kept below the last sum where rounding brought it there.
    """
    return int(ends.searchsorted(min(target, math.nextafter(ends.item(-1), 0.0)), "right"))


def _kept(
    logits: Float32, ids: Int64, weights: Float32, mass: float, is_all: bool = False
) -> Float32 | None:
    """Weights of some tokens, 0 for all but the fewest heaviest of this mass.

    Args:
        logits: float32 [vocab_size].
        ids: int64 [n], ascending.
        weights: float32 [n].
        mass: >= 0; some token is kept at 0 as well.
        is_all: keep all where they have less mass.

    Returns:
        float32 [n]; None where they have less mass.
    """
    order = np.sort(weights)[::-1]
    rank = int(order.cumsum(dtype=np.float64).searchsorted(mass))
    if is_all:
        rank = min(rank, len(order) - 1)
    if rank == len(order):
        return None
    keep = weights >= order[rank]
    surplus = np.count_nonzero(keep) - rank - 1
    if surplus:
        ties = np.flatnonzero(weights == order[rank])
        keep[ties[np.lexsort((ties, -logits[ids[ties]]))[-surplus:]]] = False
    kept: Float32 = weights * keep
    return kept


def _total(values: Float32) -> float:
    """Sum in float64."""
    return float(np.add.reduce(values, dtype=np.float64))
