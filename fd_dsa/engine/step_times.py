"""Model of the time of a step, from measured steps. It limits prefill chunks."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

SMALLEST_CHUNK = 16
"""Minimum number of prefill tokens in a step with decoding requests.

Half of them would take nearly as long, because most of such a step is its fixed cost.
"""

# weight of a new measurement in a mean
_WEIGHT = 0.25
# a measurement counts at most as this multiple of the expected time, because it may be a pause
_MAX_JUMP = 2.0
# a chunk is at most this multiple of the longest one measured, because extrapolation multiplies the
# noise of small chunks
_MAX_GROWTH = 2.0
# if the smallest chunk exceeds the limit, longer ones may take this multiple of its time
_PATIENCE = 1.5
# steps that take at most this multiple of the smallest chunk's time take the same time
_EQUAL = 1.05
# steps of the margin, in balance if one measurement in 100 is above it
_MARGIN_UP, _MARGIN_DOWN = 0.099, 0.001
_FIRST_MARGIN, _MAX_MARGIN = 1.3, 2.0
# bounds of a time in seconds, so that the ratio of two times cannot overflow
_MIN_S, _MAX_S = 1e-9, 1e6
# end of the first range of contexts; each further range ends at twice the number
_FIRST_CONTEXT = 1024


class StepShape(NamedTuple):
    """Sizes of a step that determine its time.

    Attributes:
        num_decode_tokens, num_prefill_tokens: numbers of tokens.
        context: mean number of tokens before each prefill token in its request.
        max_row_len: length of the longest row after the step, tokens.
    """

    num_decode_tokens: int
    num_prefill_tokens: int = 0
    context: int = 0
    max_row_len: int = 0

    @property
    def num_tokens(self) -> int:
        """Number of tokens of the step."""
        return self.num_decode_tokens + self.num_prefill_tokens

    def with_chunk(self, num_tokens: int, context: int) -> StepShape:
        """Return the sizes with one more chunk, which follows `context` tokens of its request."""
        prefill = self.num_prefill_tokens + num_tokens
        before = self.num_prefill_tokens * self.context + num_tokens * context
        longest = max(self.max_row_len, context + num_tokens)
        return StepShape(self.num_decode_tokens, prefill, before // max(prefill, 1), longest)


@dataclass(frozen=True)
class StepTable:
    """Measured times of steps with prefill tokens, by number of tokens and by kind.

    A step is short if no row has more than `index_topk` tokens, otherwise it is long. The time of
    a long step grows with its context along a line.

    Attributes:
        sizes: numbers of tokens, ascending.
        index_topk: maximum length of a row in a short step, tokens.
        short: time of a short step of each size, seconds.
        near, far: context of long steps, and the time of each size.
    """

    sizes: Sequence[int]
    index_topk: int
    short: Sequence[float]
    near: tuple[int, Sequence[float]]
    far: tuple[int, Sequence[float]]

    def seconds(self, shape: StepShape) -> float:
        """Return the time of the smallest size that a step fits into, at most the largest size."""
        place = min(bisect_left(self.sizes, shape.num_tokens), len(self.sizes) - 1)
        if shape.max_row_len <= self.index_topk:
            return self.short[place]
        (near, few), (far, many) = self.near, self.far
        share = max(shape.context - near, 0) / max(far - near, 1)
        return few[place] + share * max(many[place] - few[place], 0.0)


class StepTimeModel:
    """Time of a step by its numbers of decode and prefill tokens, and by the context.

    The model has a mean time of steps with decode tokens only, for each doubling of their number.
    A table that was measured before the first request has the times of steps with prefill tokens.
    Later measurements correct it by one factor for short steps and one for long steps. Without a
    table, and beyond its sizes, prefill tokens add time along a line. Each range of contexts has
    its own line, because the indexer scores every earlier key.

    Args:
        max_num_batched_tokens: maximum number of tokens of a step.
        table: measured times, for sizes up to `max_num_batched_tokens`; None = only the lines.
    """

    def __init__(self, max_num_batched_tokens: int, table: StepTable | None = None) -> None:
        self._max_tokens, self._table = max_num_batched_tokens, table
        # by bit length of the number of decode tokens
        self._decode: dict[int, float] = {}
        # by range of contexts
        self._additions: dict[int, _Line] = {}
        # 99th percentile of measured over expected seconds
        self._margin = _FIRST_MARGIN
        # number of prefill tokens of the longest chunk so far
        self._longest = 0
        # limit of the expected time of the step that is being scheduled
        self._limit_s = 0.0
        # measured time over the time of the table, by True for long steps
        self._factors = {False: 1.0, True: 1.0}
        if table is not None:
            for context, times in ((0, table.short), table.near, table.far):
                for size, seconds in zip(table.sizes, times, strict=True):
                    self._record_addition(seconds, size, context)

    def record(self, seconds: float, shape: StepShape) -> None:
        """Record the time of a step with its host work."""
        num_decode_tokens, num_prefill_tokens, table = shape[0], shape[1], self._table
        expected = self.expected(shape)
        if num_decode_tokens and num_prefill_tokens:
            step = _MARGIN_UP if seconds > self._margin * expected else -_MARGIN_DOWN
            self._margin = min(max(1.0, self._margin + step), _MAX_MARGIN)
        seconds = _believed(min(seconds, _MAX_JUMP * expected))
        if num_prefill_tokens == 0:
            place = num_decode_tokens.bit_length()
            before = self._decode.get(place, seconds)
            self._decode[place] = before + _WEIGHT * (seconds - before)
            return
        if table is not None and shape.num_tokens <= table.sizes[-1]:
            is_long = shape.max_row_len > table.index_topk
            correction = 1 + _WEIGHT * (seconds / expected - 1)
            self._factors[is_long] = _believed(self._factors[is_long] * correction)
        addition = seconds - self._fixed(num_decode_tokens)
        self._record_addition(addition, num_prefill_tokens, shape.context)

    def _record_addition(self, seconds: float, num_tokens: int, context: int) -> None:
        """Record the time that prefill tokens have added to a step."""
        self._longest, seconds = max(self._longest, num_tokens), _believed(seconds)
        line = self._additions.get(_range_of(context))
        if line is None:
            self._additions[_range_of(context)] = _Line(num_tokens, seconds)
        else:
            line.record(num_tokens, seconds)

    def expected(self, shape: StepShape) -> float:
        """Return the expected time of a step in seconds, infinite without similar measurements."""
        num_decode_tokens, num_prefill_tokens, context, _ = shape
        if num_prefill_tokens == 0:
            return self._decode.get(num_decode_tokens.bit_length(), math.inf)
        table, measured = self._table, 0.0
        if table is not None:
            measured = table.seconds(shape) * self._factors[shape.max_row_len > table.index_topk]
            if shape.num_tokens <= table.sizes[-1]:
                return measured
        place = _range_of(context)
        # use the nearest measured range, and prefer shorter contexts
        nearest = min(
            self._additions, key=lambda other: (other > place, abs(other - place)), default=None
        )
        if nearest is None:
            return math.inf
        addition = self._additions[nearest].at(num_prefill_tokens)
        # twice the keys take at most twice the time
        addition *= 2 ** max(0, place - nearest)
        return max(measured, self._fixed(num_decode_tokens) + addition)

    def longest_chunk(self, shape: StepShape, context: int, target_s: float) -> int:
        """Return the maximum number of tokens of a chunk, so that 99 of 100 steps keep a target.

        The prefill tokens of a step are at least the smallest chunk. If it exceeds the target by
        itself, chunks may take half as long again, because little of the time may be due to them.

        Args:
            shape: sizes of the step without the chunk. The first chunk of a step decides on the
                time that all of them may take.
            context: number of tokens before the chunk in its request.
            target_s: target of the time, seconds.
        """
        smallest = min(SMALLEST_CHUNK, self._max_tokens)
        if not shape.num_prefill_tokens:
            shortest_s = self.expected(shape.with_chunk(smallest, context))
            self._limit_s = target_s / self._margin
            if self._table is not None:
                self._limit_s = max(self._limit_s, min(target_s, _EQUAL * shortest_s))
            if shortest_s > target_s and (self._table or _range_of(context) in self._additions):
                self._limit_s = _PATIENCE * shortest_s
        elif self._table is None:
            # the line of a shorter mean context would be too low
            shape = shape._replace(context=max(shape.context, context))
        chunk = max(smallest - shape.num_prefill_tokens, 0)
        for longer in self._longer_chunks(shape, chunk):
            if self.expected(shape.with_chunk(longer, context)) > self._limit_s:
                break
            chunk = longer
        return chunk

    def _longer_chunks(self, shape: StepShape, chunk: int) -> Iterator[int]:
        """Yield longer chunks, first those that fill a size of the table."""
        tokens, sizes = shape.num_prefill_tokens + chunk, self._table.sizes if self._table else ()
        for size in sizes:
            if size > shape.num_decode_tokens + tokens:
                tokens = size - shape.num_decode_tokens
                yield tokens - shape.num_prefill_tokens
        end = min(self._max_tokens - shape.num_decode_tokens, int(_MAX_GROWTH * self._longest))
        while tokens < end:
            chunk = tokens - shape.num_prefill_tokens
            tokens = min(tokens + max(chunk // 4, 4), end)
            yield tokens - shape.num_prefill_tokens

    def _fixed(self, num_decode_tokens: int) -> float:
        """Return a lower bound for the time of a step without prefill tokens, seconds."""
        # a step without decode tokens also has the fixed cost of a step
        place = max(1, num_decode_tokens.bit_length())
        more = [seconds for other, seconds in self._decode.items() if other >= place]
        return min(more) if more else max(self._decode.values(), default=0.0)


@dataclass(slots=True)
class _Line:
    """Line through the times that prefill tokens add to a step, from decayed means.

    Attributes:
        tokens, seconds: mean number of tokens, and mean time.
        spread: decayed variance of the number of tokens.
        slant: decayed covariance of number and time.
    """

    tokens: float
    seconds: float
    spread: float = 0.0
    slant: float = 0.0

    def record(self, num_tokens: int, seconds: float) -> None:
        """Record a measurement."""
        token_delta, time_delta = num_tokens - self.tokens, seconds - self.seconds
        self.tokens += _WEIGHT * token_delta
        self.seconds += _WEIGHT * time_delta
        self.spread = (1 - _WEIGHT) * (self.spread + _WEIGHT * token_delta * token_delta)
        self.slant = (1 - _WEIGHT) * (self.slant + _WEIGHT * token_delta * time_delta)

    def at(self, num_tokens: int) -> float:
        """Return an estimate for a number of tokens, seconds, which tends to be too high."""
        proportion = self.seconds / self.tokens
        slope = self.slant / self.spread if self.spread else proportion
        if num_tokens > self.tokens:
            # for longer chunks, use at least half of the proportional growth until one is measured
            slope = max(slope, proportion / 2)
        slope = min(max(slope, 0.0), proportion)
        return self.seconds + slope * (num_tokens - self.tokens)


def _believed(seconds: float) -> float:
    """Return a time within the bounds of a step, seconds."""
    return min(max(seconds, _MIN_S), _MAX_S)


def _range_of(context: int) -> int:
    """Return the number of the range of a context."""
    return (context // _FIRST_CONTEXT).bit_length()
