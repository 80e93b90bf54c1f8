"""The largest logits of each row, found without sorting the row."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from fd_dsa.ops._host import Scratch
from fd_dsa.ops.topk import ordered_bits

Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]
UInt64 = npt.NDArray[np.uint64]
Int64 = npt.NDArray[np.int64]

PADDING = np.uint64(2**64 - 1)
_ID_BITS = np.uint64(32)
_ID_MASK = np.uint64(2**32 - 1)
_SIGN = np.uint32(0x80000000)
_MAX_GROUP_SIZE = 64
_LOWEST = np.finfo(np.float32).min


@dataclass(frozen=True, slots=True)
class Candidates:
    """The logits of each row that reach its bound, side by side in the order of their ids.

    Attributes:
        logits: float32 [rows, n], -inf after a row's last candidate.
        places: int64, where the candidates of all rows are in the flattened logits.
        begins: int64 [rows], each row's first entry of `places`.
        vocab_size: columns of the logits.
    """

    logits: Float32
    places: Int64
    begins: Int64
    vocab_size: int

    def ids(self, columns: Int64) -> Int64:
        """Token id of one candidate of each row; int64 [rows]."""
        return self.places[self.begins + columns] % self.vocab_size


def candidates(logits: Float32, bounds: Float64, scratch: Scratch) -> Candidates:
    """The logits of each row that are at least its bound, never -inf.

    Args:
        logits: float32 [rows, vocab_size] without NaN.
        bounds: float64 [rows], each at most the largest logit of its row.
        scratch: where the comparison is kept.

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
    return Candidates(kept, places, begins[:-1], vocab_size)


def candidate_keys(logits: Float32, width: int) -> tuple[UInt64, Int64]:
    """Sort keys of at least the `width` largest logits of each row, in order of their ids.

    A key orders by higher logit, then lower id: ascending keys are descending candidates.

    Args:
        logits: float32 [rows, vocab_size] without NaN.
        width: how many are wanted, >= 1; all when it is vocab_size or more.

    Returns:
        keys uint64 [rows, n], padded with PADDING at the end of a row, and counts int64 [rows],
        n >= counts >= min(width, vocab_size). All logits above the smallest candidate are
        candidates, so the first `width` sorted keys are exact.

    Cost: a few passes over the logits; no sort.
    """
    num_rows, vocab_size = logits.shape
    if width >= vocab_size:
        ids = np.arange(vocab_size, dtype=np.uint64)
        return _keys(logits, ids), np.full(num_rows, vocab_size, np.int64)
    chosen = np.flatnonzero(logits >= lower_bound(logits, width)[:, None])
    rows, ids = np.divmod(chosen, vocab_size)
    counts = np.bincount(rows, minlength=num_rows)
    columns = np.arange(len(chosen)) - (np.cumsum(counts) - counts)[rows]
    keys = np.full((num_rows, int(counts.max())), PADDING, np.uint64)
    keys[rows, columns] = _keys(logits.reshape(-1)[chosen], ids.astype(np.uint64))
    return keys, counts


def key_ids(keys: UInt64) -> Int64:
    """Token ids of keys."""
    return (keys & _ID_MASK).astype(np.int64)


def key_logits(keys: UInt64) -> Float32:
    """Logits of keys, bit for bit; -inf for PADDING."""
    order = ~(keys >> _ID_BITS).astype(np.uint32)
    bits = np.where(order & _SIGN, order ^ _SIGN, ~order)
    return np.where(keys == PADDING, np.float32(-np.inf), bits.view(np.float32))


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


def _keys(logits: Float32, ids: UInt64) -> UInt64:
    """Sort keys: inverted order-preserving bits of the logit, then the id."""
    return ((~ordered_bits(logits)).astype(np.uint64) << _ID_BITS) | ids
