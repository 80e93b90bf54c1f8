"""Top-p: draws from the fewest most likely tokens that have a share of the mass.

A row is read a few times while it is in the processor's cache, and nothing of its size is sorted:
a sorted sample shows about where the nucleus ends, a sum over the row by how much that is wrong,
and the tokens between there and the end are sorted.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from fd_dsa.engine.weights import BLOCK, NEAR, first_above, weigh
from fd_dsa.ops._host import Scratch

Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]
Int64 = npt.NDArray[np.int64]

# a nucleus with fewer tokens of the sample is sorted whole
_NARROW = 16
_POSITIVE = np.nextafter(np.float32(0), np.float32(1))


class NucleusDraw:
    """Draws from the nucleus of a row.

    Exact: the sample decides how many tokens are sorted, never which are kept. Of equal weights
    the larger logits are kept, which float32 may not tell apart, then the lower ids.

    Args:
        vocab_size: logits of a row.
        scratch: where weights and marks are kept; one object at a time may use it.
    """

    def __init__(self, vocab_size: int, scratch: Scratch) -> None:
        """Take the buffers."""
        # the weights of all tokens, and of those of a nucleus
        both = scratch.take("nucleus", (2, -(-vocab_size // BLOCK), BLOCK))
        # what a row does not fill
        both[:, -1] = 0
        self._blocks, self._kept_blocks = both
        self._weights, self._kept = both.reshape(2, -1)[:, :vocab_size]
        self._marks, self._others = scratch.take("marks", (2, vocab_size), np.bool_)
        # a longer sample takes more time than it saves
        self._stride = int(1.6 * vocab_size ** (1 / 3))

    def draw(
        self,
        logits: Float32,
        largest: np.float32,
        divisor: np.float32 | None,
        top_p: float,
        uniform: float,
    ) -> int:
        """Token of a row.

        Args:
            logits: float32 [vocab_size], no NaN, no +inf.
            largest: of the logits, finite.
            divisor: the temperature, > 0; None is 1.
            top_p: in [0, 1].
            uniform: in [0, 1).
        """
        weigh(logits, largest, divisor, self._weights)
        mass = _total(np.einsum("bi->b", self._blocks))
        wanted = top_p * mass
        sample = self._weights[:: self._stride].copy()
        sample.sort()
        below = sample.cumsum(dtype=np.float64)
        place = int(below.searchsorted((mass - wanted) / self._stride, "right"))
        inside = len(sample) - place
        token = None
        if inside > _NARROW:
            token = self._draw_around(logits, sample, below, place, wanted, uniform)
        # the place and some standard deviations of a count; in the end all tokens
        bounds = [_POSITIVE]
        bounds += [sample[max(place - int(n * (inside**0.5 + 1)), 0)] for n in (6, 2)]
        while token is None:
            token = self._draw_above(logits, max(bounds.pop(), _POSITIVE), wanted, uniform)
        return token

    def _draw_above(
        self, logits: Float32, bound: np.float32, wanted: float, uniform: float
    ) -> int | None:
        """Token of a nucleus of mass `wanted`; None where some of it is lighter than a bound."""
        np.greater_equal(self._weights, bound, out=self._marks)
        ids = self._marks.nonzero()[0]
        # rounding may leave less than is wanted of all
        kept = _kept(logits, ids, self._weights[ids], wanted, is_all=bound == _POSITIVE)
        if kept is None:
            return None
        ends = kept.cumsum(dtype=np.float64)
        return int(ids[first_above(ends, uniform * ends[-1])])

    def _draw_around(
        self,
        logits: Float32,
        sample: Float32,
        below: Float64,
        place: int,
        wanted: float,
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
        end = int(below.searchsorted(known + (above - wanted) / self._stride, "right"))
        # so many deviations of the count of a sample between two places
        margin = int(1.8 * abs(end - place) ** 0.5) + 2
        is_wider = above < wanted
        bound = end - margin if is_wider else end + margin
        if not 0 < bound < len(sample):
            return None
        np.greater_equal(self._weights, sample[bound], out=self._others)
        np.not_equal(self._marks, self._others, out=self._marks)
        ids = self._marks.nonzero()[0]
        weights = self._weights[ids]
        rest = wanted - above if is_wider else wanted - above + _total(weights)
        kept = _kept(logits, ids, weights, rest) if rest > 0 else None
        if kept is None:
            return None
        self._kept[ids] = kept
        change = kept if is_wider else kept - weights
        sums += np.bincount(ids // BLOCK, change, len(sums))
        token, distance = self._find(sums, uniform)
        return token if distance > NEAR else self._find(self._kept_blocks.sum(axis=1), uniform)[0]

    def _find(self, sums: Float32 | Float64, uniform: float) -> tuple[int, float]:
        """Id of a kept token, and how far the draw is from another one's, as a share of the mass.

        Args:
            sums: [num_blocks], of the kept weights of each block.
            uniform: in [0, 1).
        """
        ends = sums.cumsum(dtype=np.float64)
        target = uniform * ends[-1]
        block = first_above(ends, target)
        rest = target - (ends[block - 1] if block else 0.0)
        inside = self._kept_blocks[block].cumsum(dtype=np.float64)
        if inside[-1] == 0:
            # what rounding left of a block
            return 0, 0.0
        column = first_above(inside, rest)
        before = inside[column - 1] if column else 0.0
        return block * BLOCK + column, min(rest - before, inside[column] - rest) / ends[-1]


def _kept(
    logits: Float32, ids: Int64, weights: Float32, wanted: float, is_all: bool = False
) -> Float32 | None:
    """Weights of some tokens, 0 for all but the fewest heaviest of mass `wanted`.

    Args:
        logits: float32 [vocab_size].
        ids: int64 [n], ascending.
        weights: float32 [n].
        wanted: mass, >= 0; some token is kept at 0 as well.
        is_all: keep all where they have less mass.

    Returns:
        float32 [n]; None where they have less mass.
    """
    order = np.sort(weights)[::-1]
    rank = int(order.cumsum(dtype=np.float64).searchsorted(wanted))
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
