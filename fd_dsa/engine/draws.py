"""Draws from whole, top-k and top-p distributions, for many rows at once."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fd_dsa.engine.top_candidates import PADDING, candidate_keys, key_ids, key_logits, marked_keys
from fd_dsa.ops._host import Scratch

Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]
Int64 = npt.NDArray[np.int64]
UInt64 = npt.NDArray[np.uint64]

UNDECIDED = -1
"""Instead of a token where the nucleus of a row is wider than what was looked at."""

_BLOCK = 512
_NUM_BUCKETS = 1024
# e**-40 of the largest weight: what lies below shares the last bucket
_LAST_BUCKET_AT = 40.0


@dataclass(frozen=True, slots=True)
class Rows:
    """Logits and parameters of n rows.

    The weight of a token is exp((logit - largest) / temperature).

    Attributes:
        logits: float32 [n, vocab_size], no NaN, no +inf.
        largest: float32 [n], finite.
        temperature: float64 [n], > 0.
        top_k: int64 [n], below vocab_size; 0 = off.
        top_p: float64 [n], in [0, 1].
        uniform: float64 [n], in [0, 1).
    """

    logits: Float32
    largest: Float32
    temperature: Float64
    top_k: Int64
    top_p: Float64
    uniform: Float64

    def take(self, index: Int64) -> Rows:
        """Some of the rows; without a copy of the logits when it is all of them."""
        return Rows(
            self.logits if len(index) == len(self.logits) else self.logits[index],
            self.largest[index],
            self.temperature[index],
            self.top_k[index],
            self.top_p[index],
            self.uniform[index],
        )

    def key_weights(self, keys: UInt64) -> Float64:
        """Weights of candidates [n, m], 0 for padding."""
        scaled = key_logits(keys).astype(np.float64) - self.largest.astype(np.float64)[:, None]
        weights: Float64 = np.exp(scaled / self.temperature[:, None])
        return weights


class Weights:
    """Weights of all tokens of n rows, in blocks so that a draw needs no running sum over all.

    Args:
        rows: whose weights.
        scratch: where they are kept; one object at a time may use it.

    Cost: three passes over the logits.
    """

    def __init__(self, rows: Rows, scratch: Scratch) -> None:
        """Compute the weights."""
        num_rows, vocab_size = rows.logits.shape
        num_blocks = -(-vocab_size // _BLOCK)
        padded = scratch.take("weights", (num_rows, num_blocks * _BLOCK), np.float32)
        padded[:, vocab_size:] = 0
        self._scratch = scratch
        self._values = padded[:, :vocab_size]
        self._blocks = padded.reshape(num_rows, num_blocks, _BLOCK)
        with np.errstate(over="ignore"):
            np.subtract(rows.logits, rows.largest[:, None], out=self._values)
            np.divide(self._values, rows.temperature.astype(np.float32)[:, None], out=self._values)
        np.exp(self._values, out=self._values)

    def mass(self) -> Float64:
        """Sum of each row; float64 [n]."""
        total: Float64 = self._block_ends()[:, -1]
        return total

    def draw(self, uniform: Float64) -> Int64:
        """Token of each row by inverse distribution function, first its block, then inside."""
        ends = self._block_ends()
        index = np.arange(len(ends))
        target = uniform * ends[:, -1]
        block = _first_above(ends, target)
        begin = np.where(block > 0, ends[index, block - 1], 0.0)
        inside = self._blocks[index, block].astype(np.float64).cumsum(axis=1)
        return block * _BLOCK + _first_above(inside, target - begin)

    def keep_nucleus(self, rows: Rows) -> None:
        """Set the weights outside each row's top-p nucleus to 0, whatever its width.

        Tokens are counted into buckets by their logit, so that only the bucket in which the mass
        reaches its share has to be sorted.
        """
        index = np.arange(len(self._values))
        shape = self._values.shape
        buckets = self._buckets(rows)
        values = self._scratch.take("wide", shape, np.float64)
        values[...] = self._values
        masses = np.bincount(buckets.ravel(), values.ravel(), len(index) * _NUM_BUCKETS)
        ends = masses.reshape(len(index), _NUM_BUCKETS).cumsum(axis=1)
        wanted = rows.top_p * ends[:, -1]
        # the first bucket with which the mass is reached
        last = (ends < wanted[:, None]).sum(axis=1)
        above = np.where(last > 0, ends[index, last - 1], 0.0)
        last_bucket = (last + index * _NUM_BUCKETS)[:, None]
        marks = self._scratch.take("marks", shape, np.bool_)
        np.equal(buckets, last_bucket, out=marks)
        keys, counts = marked_keys(rows.logits, marks)
        ranked = np.sort(keys, axis=1)
        mass_to_rank = above[:, None] + rows.key_weights(ranked).cumsum(axis=1)
        rank = np.minimum((mass_to_rank < wanted[:, None]).sum(axis=1), counts - 1)
        # a product takes a fortieth of the time of putmask, whose branches no one can predict
        np.less_equal(buckets, last_bucket, out=marks)
        np.multiply(self._values, marks, out=self._values)
        row, column = np.nonzero((keys > ranked[index, rank][:, None]) & (keys != PADDING))
        self._values[row, key_ids(keys[row, column])] = 0

    def _buckets(self, rows: Rows) -> Int64:
        """Bucket of every token, never lower for a lower logit of the same row.

        Returns:
            int64 [n, vocab_size]; row * _NUM_BUCKETS + 0 .. _NUM_BUCKETS - 1.
        """
        shape = self._values.shape
        depth = self._scratch.take("depth", shape, np.float32)
        with np.errstate(over="ignore"):
            np.subtract(rows.largest[:, None], rows.logits, out=depth)
            np.divide(depth, rows.temperature.astype(np.float32)[:, None], out=depth)
            span = np.clip(depth.max(axis=1), np.float32(1e-6), np.float32(_LAST_BUCKET_AT))
            np.multiply(depth, (np.float32(_NUM_BUCKETS - 1) / span)[:, None], out=depth)
        np.minimum(depth, _NUM_BUCKETS - 1, out=depth)
        buckets = self._scratch.take("buckets", shape, np.int64)
        np.copyto(buckets, depth, casting="unsafe")
        buckets += np.arange(shape[0])[:, None] * _NUM_BUCKETS
        return buckets

    def _block_ends(self) -> Float64:
        """Running sums over the blocks; float64 [n, num_blocks]."""
        ends: Float64 = self._blocks.sum(axis=2).astype(np.float64).cumsum(axis=1)
        return ends


def draw_from_candidates(rows: Rows, mass: Float64, width: int) -> Int64:
    """Tokens of rows with top-k, top-p or both, from their largest logits alone.

    Args:
        rows: each with top_k > 0 or top_p < 1.
        mass: float64 [n], sum of all weights of a row; not read where top_k > 0.
        width: candidates looked at where top_k is 0.

    Returns:
        int64 [n], UNDECIDED where top_k is 0 and the nucleus has more than the candidates.
    """
    index = np.arange(len(rows.top_k))
    has_top_k = rows.top_k > 0
    keys, counts = candidate_keys(rows.logits, int(np.where(has_top_k, rows.top_k, width).max()))
    ranked = np.sort(keys, axis=1)
    mass_to_rank = rows.key_weights(ranked).cumsum(axis=1)
    num_kept = np.where(has_top_k, rows.top_k, counts)
    mass = np.where(has_top_k, mass_to_rank[index, num_kept - 1], mass)
    wanted = rows.top_p * mass
    nucleus = (mass_to_rank < wanted[:, None]).sum(axis=1) + 1
    nucleus = np.where(rows.top_p < 1, np.minimum(nucleus, num_kept), num_kept)
    last_key = ranked[index, nucleus - 1]
    # in the order of ids, so that rounding in the logits moves no token's place in the sum
    ends = np.where(keys <= last_key[:, None], rows.key_weights(keys), 0.0).cumsum(axis=1)
    tokens = key_ids(keys[index, _first_above(ends, rows.uniform * ends[:, -1])])
    is_too_few = ~has_top_k & (mass_to_rank[:, -1] < wanted)
    return np.where(is_too_few, UNDECIDED, tokens)


def _first_above(ends: Float64, target: Float64) -> Int64:
    """First column of each row whose running sum is above the target, so of positive weight.

    Args:
        ends: float64 [n, m], running sums of weights, the last one positive.
        target: float64 [n], kept below the last sum where rounding brought it there.
    """
    target = np.minimum(target, np.nextafter(ends[:, -1], 0.0))
    columns: Int64 = (ends <= target[:, None]).sum(axis=1)
    return columns
