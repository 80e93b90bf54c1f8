"""Reasoning at the beginning of an output, read by tokens instead of text."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Literal, NamedTuple

from fd_dsa.chat.text_feed import MAX_SPACE
from fd_dsa.engine.reasoning import Reasoning


class Reading(NamedTuple):
    """Position in an output that may begin with reasoning.

    Attributes:
        state: "start": the reasoning may still begin. "answer": it has ended, or cannot begin.
        tail: bytes of the output, in "start" all of them, in "reasoning" the last ones.
        rest: bytes of the answer that follow the reasoning; None = the whole output is the answer.
    """

    state: Literal["start", "reasoning", "answer"]
    tail: bytes = b""
    rest: bytes | None = None


class ReasoningTokens:
    """Finds the beginning of the answer token by token, at the same place as `AnswerStart`.

    A grammar must also exclude tokens in advance, because a token may complete a marker and have
    further bytes.

    Args:
        reasoning: texts around the reasoning.
        texts: bytes that each token id adds to the output's text.
    """

    def __init__(self, reasoning: Reasoning, texts: Sequence[bytes]) -> None:
        self._begin, self._end = reasoning.begin.encode(), reasoning.end.encode()
        self._texts = texts
        # tokens that may complete the end of the reasoning and have further bytes, by the offset
        # in the marker at which they begin
        self._longer: dict[int, list[int]] = {}
        # tokens that continue the beginning of the reasoning, by the offset at which they begin
        self._opening: dict[int, list[int]] = {}
        # tokens that begin with white space and the beginning of the reasoning
        self._spaced: list[int] = []
        ends = tuple(self._end[place:] for place in range(1, len(self._end)))
        for token_id, text in enumerate(texts):
            if text.startswith(ends):
                for place, end in enumerate(ends, 1):
                    if text.startswith(end) and text != end:
                        self._longer.setdefault(place, []).append(token_id)
            elif self._end in text:
                self._longer.setdefault(0, []).append(token_id)
            if text and self._begin:
                self._add_opening(token_id, text)

    def _add_opening(self, token_id: int, text: bytes) -> None:
        for place in range(len(self._begin)):
            rest = self._begin[place:]
            if text.startswith(rest) or rest.startswith(text):
                self._opening.setdefault(place, []).append(token_id)
        if self._begin in text and text.decode(errors="replace").lstrip().startswith(
            self._begin.decode()
        ):
            self._spaced.append(token_id)

    def read(self, reading: Reading, token_id: int) -> Reading:
        """Return the position after one more token."""
        text = self._texts[token_id] if token_id < len(self._texts) else b""
        if reading.state == "start":
            return self._read_start(reading.tail + text)
        return self._read_reasoning(reading.tail + text)

    def _read_start(self, text: bytes) -> Reading:
        """Return the position after an output in which the reasoning has not begun."""
        num_space, stripped, begun = _without_space(text)
        if num_space <= MAX_SPACE:
            if stripped.startswith(self._begin):
                return self._read_reasoning((stripped + begun)[len(self._begin) :])
            if not stripped or self._begin.startswith(stripped + begun):
                return Reading("start", text)
        return Reading("answer")

    def _read_reasoning(self, text: bytes) -> Reading:
        """Return the position after bytes of the reasoning, which start with the tail."""
        _, found, rest = text.partition(self._end)
        if found:
            return Reading("answer", rest=rest)
        return Reading("reasoning", text[-len(self._end) + 1 :] if len(self._end) > 1 else b"")

    def to_check(self, reading: Reading) -> dict[int, Reading]:
        """Return the tokens that need a check at a position in the reasoning or before it.

        Returns:
            Position after each token that continues the beginning of the reasoning, or that ends
            the reasoning and has bytes of the answer.
        """
        if reading.state == "start":
            _, stripped, begun = _without_space(reading.tail)
            marker = stripped + begun
            token_ids = list(self._spaced) if not marker else []
            if self._begin.startswith(marker):
                token_ids += self._opening.get(len(marker), [])
            return {token_id: self.read(reading, token_id) for token_id in token_ids}
        found = {}
        for place, token_ids in self._longer.items():
            if reading.tail.endswith(self._end[:place]):
                for token_id in token_ids:
                    after = self.read(reading, token_id)
                    if after.rest:
                        found[token_id] = after
        return found


def _without_space(text: bytes) -> tuple[int, bytes, bytes]:
    """Split off white space at the beginning of a text, and half of a character at its end.

    Returns:
        Number of characters of white space, bytes between, and bytes of the half.
    """
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    whole = decoder.decode(text)
    stripped = whole.lstrip()
    return len(whole) - len(stripped), stripped.encode(), decoder.getstate()[0]
