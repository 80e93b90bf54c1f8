"""Model of the time of a step, from measured steps. It limits prefill chunks."""

from __future__ import annotations

import math
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
    """

    num_decode_tokens: int
    num_prefill_tokens: int = 0
    context: int = 0

    def with_chunk(self, num_tokens: int, context: int) -> StepShape:
        """Return the sizes with one more chunk, which follows `context` tokens of its request."""
        prefill = self.num_prefill_tokens + num_tokens
        before = self.num_prefill_tokens * self.context + num_tokens * context
        return StepShape(self.num_decode_tokens, prefill, before // max(prefill, 1))


class StepTimeModel:
    """Time of a step by its numbers of decode and prefill tokens, and by the context.

    The model has a mean time of steps with decode tokens only, for each doubling of their number.
    Prefill tokens add time along a line. Each range of contexts has its own line, because the
    indexer scores every earlier key.

    Args:
        max_num_batched_tokens: maximum number of tokens of a step.
    """

    def __init__(self, max_num_batched_tokens: int) -> None:
        self._max_tokens = max_num_batched_tokens
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

    def record(self, seconds: float, shape: StepShape) -> None:
        """Record the time of a step with its host work."""
        num_decode_tokens, num_prefill_tokens, context = shape
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
        self._longest = max(self._longest, num_prefill_tokens)
        addition = _believed(seconds - self._fixed(num_decode_tokens))
        place = _range_of(context)
        line = self._additions.get(place)
        if line is None:
            self._additions[place] = _Line(num_prefill_tokens, addition)
        else:
            line.record(num_prefill_tokens, addition)

    def expected(self, shape: StepShape) -> float:
        """Return the expected time of a step in seconds, infinite without similar measurements."""
        num_decode_tokens, num_prefill_tokens, context = shape
        if num_prefill_tokens == 0:
            return self._decode.get(num_decode_tokens.bit_length(), math.inf)
        place = _range_of(context)
        # use the nearest measured range, and prefer shorter contexts
        nearest = min(
            self._additions, key=lambda other: (other > place, abs(other - place)), default=None
        )
        if nearest is None:
            return math.inf
        addition = self._additions[nearest].at(num_prefill_tokens)
        # twice the keys take at most twice the time
        return self._fixed(num_decode_tokens) + addition * 2 ** max(0, place - nearest)

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
            if shortest_s > target_s and _range_of(context) in self._additions:
                self._limit_s = _PATIENCE * shortest_s
        else:
            # the line of a shorter mean context would be too low
            shape = shape._replace(context=max(shape.context, context))
        chunk = max(smallest - shape.num_prefill_tokens, 0)
        end = min(self._max_tokens - shape.num_decode_tokens, int(_MAX_GROWTH * self._longest))
        while shape.num_prefill_tokens + chunk < end:
            longer = min(chunk + max(chunk // 4, 4), end - shape.num_prefill_tokens)
            if self.expected(shape.with_chunk(longer, context)) > self._limit_s:
                break
            chunk = longer
        return chunk

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
