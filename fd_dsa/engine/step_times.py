"""How long a step takes, learned from the steps that have run.

One table serves every decision that depends on the time of a step: how many prompt tokens fit
beside running streams, and whatever else has to weigh tokens against seconds.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter

SMALLEST_CHUNK = 16
"""Prompt tokens that a step with decoding requests always has room for, so that prompts go on.

Half as many would take nearly as long: most of such a step is its fixed cost.
"""

# share of a new measurement in a mean
_WEIGHT = 0.25
# a measurement above this multiple of what was expected counts as that: a pause is no trend
_LARGEST_JUMP = 2.0
# measurements with fewer tokens after which those with more are forgotten, since the host may have
# been slow; trying them again may miss the limit, as one step in 100 may
_LIFETIME = 256
# the next size is at most this multiple of one
_NEXT = 1.5
# a chunk is at most this multiple of the longest one that has run: the additions of small ones are
# little more than noise, which an extrapolation multiplies
_FURTHEST = 2.0
# where the smallest chunk misses the limit, longer ones may take this multiple of its time
_PATIENCE = 1.5
# steps of the margin, in balance where one measurement in 100 is above it
_MARGIN_UP, _MARGIN_DOWN = 0.099, 0.001
_FIRST_MARGIN, _LARGEST_MARGIN = 1.3, 2.0
# seconds that are believed, so that no ratio of two of them overflows
_SHORTEST, _LONGEST = 1e-9, 1e6
# end of the first range of contexts; each further one ends at twice the number
_FIRST_CONTEXT = 1024

_tokens = attrgetter("tokens")


class StepTimes:
    """Seconds of a step by its shape: decode tokens, prompt tokens, and the context of these.

    A step with prompt tokens takes as long as its decode tokens alone, and an addition for the
    prompt. The addition has a curve for each range of contexts, since the indexer scores every
    earlier key. Decode tokens have one curve: their contexts grow slowly, and means follow. The
    time of a call does not depend on how much was measured.

    Args:
        max_num_seqs: most decode tokens of a step.
        max_num_batched_tokens: most tokens of a step.

    Attributes:
        chunk_sizes: numbers of prompt tokens that `longest_chunk` chooses from, ascending.
    """

    def __init__(self, max_num_seqs: int, max_num_batched_tokens: int) -> None:
        """Start without measurements."""
        self.chunk_sizes = _sizes(SMALLEST_CHUNK, max_num_batched_tokens)
        self._decode = _Curve(_sizes(1, max_num_seqs))
        # by range of contexts
        self._additions: dict[int, _Curve] = {}
        # 99th percentile of measured over expected seconds
        self._margin = _FIRST_MARGIN
        # prompt tokens of the longest chunk so far
        self._longest = 0

    def observe(
        self, seconds: float, num_decode_tokens: int, num_prefill_tokens: int = 0, context: int = 0
    ) -> None:
        """Take in a step that has run.

        Args:
            seconds: its time, host work included.
            num_decode_tokens: its tokens of requests that decode.
            num_prefill_tokens: its tokens of prompts.
            context: tokens before each of these in its prompt, on average.
        """
        expected = self.expected(num_decode_tokens, num_prefill_tokens, context)
        if num_decode_tokens and num_prefill_tokens:
            step = _MARGIN_UP if seconds > self._margin * expected else -_MARGIN_DOWN
            self._margin = min(max(1.0, self._margin + step), _LARGEST_MARGIN)
        seconds = _believed(min(seconds, _LARGEST_JUMP * expected))
        if num_prefill_tokens == 0:
            self._decode.observe(num_decode_tokens, seconds)
            return
        self._longest = max(self._longest, num_prefill_tokens)
        addition = _believed(seconds - self._fixed(num_decode_tokens))
        place = _range_of(context)
        if place not in self._additions:
            self._additions[place] = self._first_curve(place, num_prefill_tokens, addition)
        self._additions[place].observe(num_prefill_tokens, addition)

    def expected(
        self, num_decode_tokens: int, num_prefill_tokens: int = 0, context: int = 0
    ) -> float:
        """Seconds that a step will take on average; infinite while nothing like it has run.

        Parameters as of `observe`; a step of r rows with k tokens each has r * k decode tokens.
        """
        if num_prefill_tokens == 0:
            return self._decode.at_most(num_decode_tokens)
        place = _range_of(context)
        nearest = self._nearest(place)
        if nearest is None:
            return math.inf
        addition = self._additions[nearest].at_most(num_prefill_tokens)
        # twice the keys take at most twice the time
        return self._fixed(num_decode_tokens) + addition * 2 ** max(0, place - nearest)

    def longest_chunk(self, num_decode_tokens: int, context: int, limit_s: float) -> int:
        """Most prompt tokens with which 99 of 100 steps take at most `limit_s` seconds.

        One of `chunk_sizes`. Where even the first takes longer, the limit is missed anyway: then
        prompts may make the step half as long again, since little of it may be due to them.
        """
        curve, longest = self._additions.get(_range_of(context)), _FURTHEST * self._longest
        sizes = [size for size in self.chunk_sizes if size <= longest] or [self.chunk_sizes[0]]
        seconds = [self.expected(num_decode_tokens, size, context) for size in sizes]
        if seconds[0] > limit_s and curve is not None and curve.is_measured(sizes[0]):
            limit_s = _PATIENCE * seconds[0]
        else:
            limit_s /= self._margin
        fitting = (
            size for size, expected in zip(sizes, seconds, strict=True) if expected <= limit_s
        )
        return max(fitting, default=sizes[0])

    def _fixed(self, num_decode_tokens: int) -> float:
        """Seconds of a step before prompt tokens add to it, at least."""
        # a step without decode tokens has the fixed cost of a step too
        return self._decode.at_least(max(1, num_decode_tokens))

    def _nearest(self, place: int) -> int | None:
        """The measured range of contexts nearest to a range, shorter ones first."""
        return min(
            self._additions, key=lambda other: (other > place, abs(other - place)), default=None
        )

    def _first_curve(self, place: int, num_tokens: int, addition: float) -> _Curve:
        """What a range of contexts begins with, given its first measurement."""
        nearest = self._nearest(place)
        if nearest is None or nearest > place:
            return _Curve(self.chunk_sizes)
        shorter = self._additions[nearest]
        known = shorter.at_most(num_tokens)
        return shorter.scaled(max(addition / known, 1.0))


@dataclass(slots=True)
class _Point:
    """Decayed means of the measurements of one range of token numbers.

    Attributes:
        measured_at: number of the curve's measurement that was the last of this range.
    """

    tokens: float
    seconds: float
    measured_at: int


class _Curve:
    """Mean seconds by number of tokens.

    There is at most one point for each range of numbers, and a straight line between two points.
    Outside, more tokens take longer, but not more than in proportion.

    Args:
        sizes: last number of tokens of each range, ascending.
    """

    def __init__(self, sizes: Sequence[int]) -> None:
        """Start without points."""
        self._sizes = sizes
        self._ranges: list[_Point | None] = [None] * len(sizes)
        # those that there are, in order
        self._points: list[_Point] = []
        self._count = 0

    def is_measured(self, num_tokens: int) -> bool:
        """Whether there was a measurement in the range of a number."""
        point = self._ranges[bisect_left(self._sizes, num_tokens)]
        return point is not None and point.measured_at > 0

    def observe(self, num_tokens: int, seconds: float) -> None:
        """Take in a measurement."""
        self._count += 1
        index = bisect_left(self._sizes, num_tokens)
        point = self._ranges[index]
        if point is None:
            self._ranges[index] = _Point(num_tokens, seconds, self._count)
            self._collect()
        else:
            # what another range of contexts made expect is worth nothing beside a measurement
            was_measured, before = point.measured_at > 0, point.seconds
            weight = _WEIGHT if was_measured else 1.0
            point.tokens += weight * (num_tokens - point.tokens)
            point.seconds += weight * (seconds - point.seconds)
            point.measured_at = self._count
            if was_measured or seconds > before:
                self._follow(point, point.seconds / before)
        for longer in range(index + 1, len(self._ranges)):
            point = self._ranges[longer]
            if point is not None and self._count - point.measured_at > _LIFETIME:
                self._ranges[longer] = None
                self._collect()

    def _follow(self, moved: _Point, factor: float) -> None:
        """Move the other points as one has moved: a slower host is slower for all of them."""
        for point in self._points:
            if point is not moved:
                point.seconds = _believed(factor * point.seconds)

    def scaled(self, factor: float) -> _Curve:
        """A curve of the same form, with `factor` times the seconds."""
        curve = _Curve(self._sizes)
        curve._ranges = [
            None if point is None else _Point(point.tokens, _believed(factor * point.seconds), 0)
            for point in self._ranges
        ]
        curve._collect()
        return curve

    def at_most(self, num_tokens: int) -> float:
        """Expected seconds, rather too many than too few; infinite without a point."""
        points = self._points
        if not points:
            return math.inf
        end, last = bisect_left(points, num_tokens, key=_tokens), points[-1]
        if end < len(points):
            # fewer tokens are not slower, whatever a point says that was measured on a bad day
            bound = min(point.seconds for point in points[end:])
            if end > 0:
                bound = min(bound, _line(points[end - 1], points[end], num_tokens))
            return bound
        in_proportion = last.seconds * num_tokens / last.tokens
        if num_tokens > _NEXT * last.tokens:
            return in_proportion
        # halfway to no growth, so that the next size is tried and the fixed part of a step found
        return (last.seconds + in_proportion) / 2

    def at_least(self, num_tokens: int) -> float:
        """Expected seconds, rather too few than too many; 0 without a point."""
        points = self._points
        if not points:
            return 0.0
        first, last = points[0], points[-1]
        if num_tokens < first.tokens:
            return first.seconds * num_tokens / first.tokens
        return last.seconds if num_tokens >= last.tokens else self.at_most(num_tokens)

    def _collect(self) -> None:
        """List the points again."""
        self._points = [point for point in self._ranges if point is not None]


def _believed(seconds: float) -> float:
    """Seconds within what a step can take."""
    return min(max(seconds, _SHORTEST), _LONGEST)


def _line(begin: _Point, end: _Point, num_tokens: float) -> float:
    """Seconds on the straight line through two points."""
    share = (num_tokens - begin.tokens) / (end.tokens - begin.tokens)
    return begin.seconds + share * (end.seconds - begin.seconds)


def _range_of(context: int) -> int:
    """Number of the range that a context is in."""
    return (context // _FIRST_CONTEXT).bit_length()


def _sizes(first: int, last: int) -> tuple[int, ...]:
    """Two sizes for each doubling, from `first` to below `last`, then `last`."""
    sizes = []
    while first < last:
        sizes += [size for size in (first, first + first // 2) if size < last]
        first *= 2
    return (*sorted({*sizes}), last)
