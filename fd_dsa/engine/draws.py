"""Sampling of a token from a row of logits, with or without min-p, top-k and top-p.

A row is read a few times while it is in the processor's cache. Only candidates are sorted: the
tokens above a bound, which are those that the cuts may keep and a few more.

Random numbers are counter-based: each is a function of a seed and a position.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from fd_dsa.ops.sampling.parameters import mix
from fd_dsa.ops.sampling.token_buffer import NOT_FINITE
from fd_dsa.tensor import Float32, Float64, Int64

# weights of a block: a search looks at one block, so only sums of blocks are accumulated
_BLOCK = 512
# below 1 by more than the rounding error of a sum
_NEARLY = 0.999
_MAX_GROUP_SIZE = 64
_LOWEST = np.finfo(np.float32).min
_MASK = 2**64 - 1
_GOLDEN = 0x9E3779B97F4A7C15


def uniforms(seeds: npt.NDArray[np.uint64], positions: Int64) -> Float64:
    """Return a uniform number in [0, 1) for each pair of a seed and a position.

    u = mix(mix(seed) + (position + 1) * golden) / 2**64, cut to 53 bits.

    Args:
        seeds: uint64 [n].
        positions: int64 [n]; position of the token in its output, from 0.

    Returns:
        float64 [n].

    Source: SplitMix64 (Steele, Lea, Flood 2014). A seed names one of its streams, and a position
    names the element of the stream.
    """
    steps = (positions.astype(np.uint64) + np.uint64(1)) * np.uint64(_GOLDEN)
    bits = mix(mix(seeds) + steps) >> np.uint64(11)
    return bits.astype(np.float64) * 2.0**-53


def derive_seed(seed: int, number: int) -> int:
    """Return a seed in [0, 2**64) that differs for each number.

    Args:
        seed: seed of the engine, or of a request.
        number: `seq_id` of a request without a seed, or index of an output.
    """
    base: int = mix((seed ^ 0xBF58476D1CE4E5B9) & _MASK)
    derived: int = mix(base + (number + 1) * _GOLDEN & _MASK)
    return derived


def lower_bound(logits: Float32, width: int) -> Float32:
    """Return for each row a value that at least `width` logits reach, and only a few more.

    The maxima of disjoint groups of columns are distinct logits, so the width-th largest maximum is
    a bound. If there are few columns for the width, the bound is the width-th largest logit.
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
    """Samples tokens from one row after another, by weights exp((logit - largest) / temperature).

    Cuts are exact: a bound decides how many tokens are sorted, never which are kept. Among equal
    weights the larger logits come first, then the lower ids.
    """

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self._weights = np.empty(vocab_size, np.float32)
        self._marks = np.empty(vocab_size, np.bool_)
        # step of the weights in a sorted sample; with few weights a sample takes more than it saves
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
        """Sample the token of a row: min-p, then top-k, then top-p over the tokens they keep.

        Args:
            logits: float32 [vocab_size].
            uniform: random number in [0, 1).
            temperature: > 0.
            min_p: in [0, 1]; 0 = off.
            top_k: number of tokens; 0 or at least vocab_size = off.
            top_p: in [0, 1]; 1 = off.

        Returns:
            The token, or NOT_FINITE.
        """
        largest = np.maximum.reduce(logits)
        if not math.isfinite(largest):
            return NOT_FINITE
        if min_p or 0 < top_k < self.vocab_size:
            kept = self._above_bounds(logits, float(largest), temperature, min_p, top_k)
            return _sample_ranked(logits, *kept, uniform, top_k, top_p)
        weights = np.subtract(logits, largest, out=self._weights)
        if temperature != 1:
            np.divide(weights, np.float32(temperature), out=weights)
        np.exp(weights, out=weights)
        if top_p == 1:
            return _place(weights, uniform)
        mass = float(_sums(weights).sum(dtype=np.float64))
        left_out = _NEARLY * (1 - top_p) * mass
        # all tokens below this bound together have less mass than top-p leaves out
        bounds = [left_out / self.vocab_size]
        if self._stride:
            # tokens below this bound have about two thirds of that mass, so fewer are sorted
            sample = np.sort(weights[:: self._stride])
            place = sample[:-1].cumsum(dtype=np.float64).searchsorted(0.7 * left_out / self._stride)
            bounds.insert(0, sample[place])
        for bound in bounds:
            ids = np.greater_equal(weights, bound, out=self._marks).nonzero()[0]
            heavy = weights[ids]
            if heavy.sum(dtype=np.float64) >= mass - left_out:
                break
        return _sample_ranked(logits, ids, heavy, uniform, 0, top_p, mass)

    def _above_bounds(
        self, logits: Float32, largest: float, temperature: float, min_p: float, top_k: int
    ) -> tuple[Int64, Float64]:
        """Return ids and weights of the tokens that min-p and top-k may keep, and a few more.

        Returns:
            Ids, ascending, and their weights.
        """
        bound = largest + temperature * np.log(min_p) if min_p else -np.inf
        if 0 < top_k < self.vocab_size:
            bound = max(bound, lower_bound(logits[None], top_k).item())
        nearest = np.float32(bound)
        if nearest < bound:
            nearest = np.nextafter(nearest, np.float32(np.inf))
        np.greater_equal(logits, max(nearest, _LOWEST), out=self._marks)
        ids = self._marks.nonzero()[0]
        return ids, np.exp((logits[ids].astype(np.float64) - largest) / temperature)


def _sample_ranked(
    logits: Float32,
    ids: Int64,
    weights: Float32 | Float64,
    uniform: float,
    top_k: int,
    top_p: float,
    mass: float | None = None,
) -> int:
    """Sample one of some tokens by top-k, then top-p. Ties go to the lower id.

    Args:
        logits: float32 [vocab_size].
        ids: int64 [n], ascending.
        weights: [n].
        mass: total mass for top-p; None = the mass of the tokens that top-k keeps.
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
    # sum in the order of ids, so that rounding of the logits never reorders tokens
    return int(ids[_place(weights, uniform)])


def _place(
    weights: Float32 | Float64,
    share: float,
    mass: float | None = None,
    side: Literal["left", "right"] = "right",
) -> int:
    """Return the first place up to which the weights sum to more than a share of a mass.

    Args:
        weights: [n], not all 0.
        share: in [0, 1]; a share that rounding brings above all weights counts as just below.
        mass: total; None = the sum of the weights.
        side: "left" = a sum equal to the share is enough.
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
    """Return the sum of each block of weights. The last block may be shorter."""
    whole = len(weights) // _BLOCK * _BLOCK
    sums = np.einsum("bi->b", weights[:whole].reshape(-1, _BLOCK))
    return np.append(sums, weights[whole:].sum()) if whole < len(weights) else sums
