"""How long a step takes, learned from the steps that have run: how much of a prompt fits in one."""

from __future__ import annotations

import math
from dataclasses import dataclass

SMALLEST_CHUNK = 16
"""Prompt tokens that a step with decoding requests always has room for, so that prompts go on.

Half as many would take nearly as long: most of such a step is its fixed cost.
"""

# share of a new measurement in a mean
_WEIGHT = 0.25
# a measurement above this multiple of what was expected counts as that: a pause is no trend
_LARGEST_JUMP = 2.0
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


class StepTimes:
    """Seconds of a step by its shape: decode tokens, prompt tokens, and the context of these.

    A step with prompt tokens takes as long as its decode tokens alone, and an addition for the
    prompt. Decode tokens have a mean for each doubling of their number. The addition has a line
    for each range of contexts, since the indexer scores every earlier key.

    Args:
        max_num_batched_tokens: most tokens of a step.
    """

    def __init__(self, max_num_batched_tokens: int) -> None:
        """Start without measurements."""
        self._most = max_num_batched_tokens
        # by bit length of the number of decode tokens
        self._decode: dict[int, float] = {}
        # by range of contexts
        self._additions: dict[int, _Line] = {}
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
            line.observe(num_prefill_tokens, addition)

    def expected(
        self, num_decode_tokens: int, num_prefill_tokens: int = 0, context: int = 0
    ) -> float:
        """Seconds that a step will take on average; infinite while nothing like it has run.

        Parameters as of `observe`.
        """
        if num_prefill_tokens == 0:
            return self._decode.get(num_decode_tokens.bit_length(), math.inf)
        place = _range_of(context)
        # the nearest range that was measured, shorter contexts first
        nearest = min(
            self._additions, key=lambda other: (other > place, abs(other - place)), default=None
        )
        if nearest is None:
            return math.inf
        addition = self._additions[nearest].at(num_prefill_tokens)
        # twice the keys take at most twice the time
        return self._fixed(num_decode_tokens) + addition * 2 ** max(0, place - nearest)

    def longest_chunk(self, num_decode_tokens: int, context: int, limit_s: float) -> int:
        """Most prompt tokens with which 99 of 100 steps take at most `limit_s` seconds.

        Where even the smallest chunk takes longer, the limit is missed anyway: then prompts may
        make the step half as long again, since little of it may be due to them.
        """
        smallest = min(SMALLEST_CHUNK, self._most)
        shortest_s = self.expected(num_decode_tokens, smallest, context)
        if shortest_s > limit_s and _range_of(context) in self._additions:
            limit_s = _PATIENCE * shortest_s
        else:
            limit_s /= self._margin
        chunk, most = smallest, min(self._most, int(_FURTHEST * self._longest))
        while chunk < most:
            longer = min(chunk + max(chunk // 4, 1), most)
            if self.expected(num_decode_tokens, longer, context) > limit_s:
                break
            chunk = longer
        return chunk

    def _fixed(self, num_decode_tokens: int) -> float:
        """Seconds of a step before prompt tokens add to it, rather too few than too many."""
        # a step without decode tokens has the fixed cost of a step too
        place = max(1, num_decode_tokens.bit_length())
        more = [seconds for other, seconds in self._decode.items() if other >= place]
        return min(more) if more else max(self._decode.values(), default=0.0)


@dataclass(slots=True)
class _Line:
    """What prompt tokens add to a step: decayed means, and a line through them.

    Attributes:
        tokens, seconds: means.
        spread, slant: decayed squares of the tokens' deviations, and products with the seconds'.
    """

    tokens: float
    seconds: float
    spread: float = 0.0
    slant: float = 0.0

    def observe(self, num_tokens: int, seconds: float) -> None:
        """Take in a measurement."""
        more, longer = num_tokens - self.tokens, seconds - self.seconds
        self.tokens += _WEIGHT * more
        self.seconds += _WEIGHT * longer
        self.spread = (1 - _WEIGHT) * (self.spread + _WEIGHT * more * more)
        self.slant = (1 - _WEIGHT) * (self.slant + _WEIGHT * more * longer)

    def at(self, num_tokens: int) -> float:
        """Expected seconds, rather too many than too few: never below half of the proportion."""
        proportion = self.seconds / self.tokens
        slope = self.slant / self.spread if self.spread else proportion
        if num_tokens > self.tokens:
            # halfway to no growth at least, so that longer chunks are tried and show the fixed part
            slope = max(slope, proportion / 2)
        slope = min(max(slope, 0.0), proportion)
        return self.seconds + slope * (num_tokens - self.tokens)


def _believed(seconds: float) -> float:
    """Seconds within what a step can take."""
    return min(max(seconds, _SHORTEST), _LONGEST)


def _range_of(context: int) -> int:
    """Number of the range that a context is in."""
    return (context // _FIRST_CONTEXT).bit_length()
