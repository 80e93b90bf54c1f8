"""Draws of tokens from rows of logits, with or without min-p, top-k and top-p."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt

from fd_dsa.engine.nucleus import NucleusDraw
from fd_dsa.engine.top_candidates import candidates, lower_bound
from fd_dsa.engine.weights import BLOCK, NEAR, weigh
from fd_dsa.ops._host import Scratch

Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]
Int64 = npt.NDArray[np.int64]

UNUSABLE = -1
"""Instead of a token where the largest logit of a row is NaN or infinite."""

# bounds the temporaries where calls for each row would take longer than memory
_GROUP_LOGITS = 2**20


@dataclass(frozen=True, slots=True)
class Draws:
    """Parameters of n draws.

    The weight of a token is exp((logit - largest) / temperature).

    Attributes:
        rows: int64 [n], ascending; row of logits of each draw.
        temperature: float64 [n], > 0.
        min_p: float64 [n], in [0, 1]; 0 = off.
        top_k: int64 [n], below vocab_size; 0 = off.
        top_p: float64 [n], in [0, 1]; 1 = off.
        uniform: float64 [n], in [0, 1).
    """

    rows: Int64
    temperature: Float64
    min_p: Float64
    top_k: Int64
    top_p: Float64
    uniform: Float64

    def take(self, index: Int64) -> Draws:
        """Some of the draws."""
        return Draws(
            self.rows[index],
            self.temperature[index],
            self.min_p[index],
            self.top_k[index],
            self.top_p[index],
            self.uniform[index],
        )

    def divisors(self) -> Float32 | None:
        """Temperatures, float32 [n, 1]; None where all are 1."""
        is_one = (self.temperature == 1).all()
        return None if is_one else self.temperature.astype(np.float32)[:, None]


def draw_tokens(logits: Float32, draws: Draws, scratch: Scratch) -> Int64:
    """Token of each draw: min-p, then top-k, then top-p of what they left.

    Args:
        logits: float32 [rows, vocab_size].
        draws: n draws.
        scratch: for temporaries as large as some rows.

    Returns:
        int64 [n]; token ids or UNUSABLE.
    """
    vocab_size = logits.shape[1]
    is_cut = (draws.min_p > 0) | (draws.top_k > 0)
    is_nucleus = ~is_cut & (draws.top_p < 1)
    tokens = np.full(len(draws.rows), UNUSABLE, np.int64)
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        for group in _groups(np.flatnonzero(is_cut), _GROUP_LOGITS // vocab_size):
            tokens[group] = _draw_cut(logits, draws.take(group), scratch)
        for index, draw in (
            (np.flatnonzero(is_nucleus), _draw_nuclei),
            (np.flatnonzero(~is_cut & ~is_nucleus), _draw_whole),
        ):
            if len(index):
                tokens[index] = draw(logits, draws.take(index), scratch)
    return tokens


def rows_of(logits: Float32, rows: Int64) -> Float32:
    """Some rows, in ascending order; a view where they are neighbours."""
    if len(rows) and rows[-1] - rows[0] + 1 == len(rows):
        return logits[rows[0] : rows[-1] + 1]
    return logits[rows]


def _groups(index: Int64, size: int) -> Iterator[Int64]:
    """An index in parts of so many entries, at least one."""
    size = max(size, 1)
    return (index[begin : begin + size] for begin in range(0, len(index), size))


def _draw_whole(logits: Float32, draws: Draws, scratch: Scratch) -> Int64:
    """Draws from all tokens.

    A row's weights are made and added up while they are in the processor's cache, and forgotten;
    those of the block that a draw falls into are made again.
    """
    vocab_size, num_rows = logits.shape[1], len(draws.rows)
    num_blocks = -(-vocab_size // BLOCK)
    blocks = scratch.take("weights", (num_blocks, BLOCK))
    weights = blocks.reshape(-1)
    weights[vocab_size:] = 0
    sums = np.empty((num_rows, num_blocks), np.float32)
    largest = np.empty((num_rows, 1), np.float32)
    divisors = draws.divisors()

    def weigh_row(index: int) -> None:
        divisor = None if divisors is None else divisors[index]
        weigh(logits[draws.rows[index]], largest[index], divisor, weights[:vocab_size])

    def weights_in(block: Int64, index: slice = slice(None)) -> Float32:
        columns = block[:, None] * BLOCK + np.arange(BLOCK)
        rows = draws.rows[index, None]
        values = logits[rows, np.minimum(columns, vocab_size - 1)]
        weigh(values, largest[index], None if divisors is None else divisors[index], values)
        return values * (columns < vocab_size)

    for index, row in enumerate(draws.rows):
        largest[index] = np.maximum.reduce(logits[row])
        weigh_row(index)
        np.einsum("bi->b", blocks, out=sums[index])
    found, distance = _find(sums, draws.uniform, weights_in)
    for near in np.flatnonzero(distance < NEAR).tolist():
        one = slice(near, near + 1)
        weigh_row(near)
        sums[near] = blocks.sum(axis=1)
        found[one], _ = _find(sums[one], draws.uniform[one], partial(weights_in, index=one))
    return np.where(np.isfinite(largest[:, 0]), found, UNUSABLE)


def _find(
    sums: Float32, uniform: Float64, weights_in: Callable[[Int64], Float32]
) -> tuple[Int64, Float64]:
    """Where draws fall: first their block by the sums of all, then inside it.

    Args:
        sums: float32 [n, num_blocks], of the blocks.
        uniform: float64 [n].
        weights_in: float32 [n, BLOCK], of one block of each row.

    Returns:
        int64 [n], ids; float64 [n], distance to the next id as a share of the mass.
    """
    ends = sums.cumsum(axis=1, dtype=np.float64)
    index, mass = np.arange(len(ends)), ends[:, -1]
    block = _first_above(ends, uniform * mass)
    rest = uniform * mass - np.where(block > 0, ends[index, block - 1], 0.0)
    inside = weights_in(block).cumsum(axis=1, dtype=np.float64)
    column = _first_above(inside, rest)
    before = np.where(column > 0, inside[index, column - 1], 0.0)
    distance = np.minimum(rest - before, inside[index, column] - rest) / mass
    return block * BLOCK + column, distance


def _draw_nuclei(logits: Float32, draws: Draws, scratch: Scratch) -> Int64:
    """Draws with top-p alone."""
    nucleus = NucleusDraw(logits.shape[1], scratch)
    divisors = [None if t == 1 else np.float32(t) for t in draws.temperature]
    tokens = []
    for row, *parameters in zip(draws.rows, divisors, draws.top_p, draws.uniform, strict=True):
        largest = np.maximum.reduce(logits[row])
        usable = np.isfinite(largest)
        tokens.append(nucleus.draw(logits[row], largest, *parameters) if usable else UNUSABLE)
    return np.array(tokens)


def _draw_cut(logits: Float32, draws: Draws, scratch: Scratch) -> Int64:
    """Draws with min-p, top-k or both, and top-p of what they left."""
    tokens = np.full(len(draws.rows), UNUSABLE, np.int64)
    largest = rows_of(logits, draws.rows).max(axis=1)
    usable = np.flatnonzero(np.isfinite(largest))
    if not len(usable):
        return tokens
    draws, largest = draws.take(usable), largest[usable].astype(np.float64)
    rows = rows_of(logits, draws.rows)
    bounds = largest + draws.temperature * np.log(draws.min_p)
    if draws.top_k.any():
        few = lower_bound(rows, int(draws.top_k.max()))
        bounds = np.maximum(bounds, np.where(draws.top_k > 0, few, -np.inf))
    kept = candidates(rows, bounds, scratch)
    weights = kept.logits - largest[:, None]
    weights /= draws.temperature[:, None]
    np.exp(weights, out=weights)
    ranked = np.flatnonzero((draws.top_k > 0) | (draws.top_p < 1))
    if len(ranked):
        weights[ranked] *= _is_ranked(kept.logits[ranked], weights[ranked], draws.take(ranked))
    # in the order of ids, so that rounding in the logits moves no token's place in the sum
    ends = weights.cumsum(axis=1)
    tokens[usable] = kept.ids(_first_above(ends, draws.uniform * ends[:, -1]))
    return tokens


def _is_ranked(logits: Float32, weights: Float64, draws: Draws) -> npt.NDArray[np.bool_]:
    """Which candidates, [n, m], top-k and then top-p keep."""
    index = np.arange(len(weights))
    # stable, so that ties go to the lower id
    order = np.argsort(-logits, axis=1, kind="stable")
    mass = np.take_along_axis(weights, order, axis=1).cumsum(axis=1)
    count = np.where(draws.top_k > 0, np.minimum(draws.top_k, mass.shape[1]), mass.shape[1])
    wanted = draws.top_p * mass[index, count - 1]
    nucleus = (mass < wanted[:, None]).sum(axis=1) + 1
    count = np.where(draws.top_p < 1, np.minimum(nucleus, count), count)
    keep = np.empty(weights.shape, np.bool_)
    np.put_along_axis(keep, order, np.arange(mass.shape[1]) < count[:, None], axis=1)
    return keep


def _first_above(ends: Float64, target: Float64) -> Int64:
    """First column of each row whose running sum is above the target, so of positive weight.

    Args:
        ends: float64 [n, m], running sums of weights, the last one positive.
        target: float64 [n], kept below the last sum where rounding brought it there.
    """
    target = np.minimum(target, np.nextafter(ends[:, -1], 0.0))
    columns: Int64 = (ends <= target[:, None]).sum(axis=1)
    return columns
