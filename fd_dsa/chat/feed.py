"""Text that comes in pieces, for parsers that are written as if they had all of it.

A parser is a generator: it yields whenever it needs more text. What it finds depends on the whole
text alone, never on where the pieces were cut.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import TypeVar

_T = TypeVar("_T")
Steps = Generator[None, None, _T]
"""A part of a parser that yields when it needs more text, and returns a `_T`."""


# white space is held back only so long: else every piece of it would be read again and again
_MAX_SPACE = 64


class TextFeed:
    """The text that is not read yet."""

    def __init__(self) -> None:
        """Nothing has come."""
        self._text = ""
        self._ended = False

    def push(self, text: str) -> None:
        """Append a piece."""
        self._text += text

    def end(self) -> None:
        """No more text will come."""
        self._ended = True

    def stream_until(
        self, markers: Sequence[str], emit: Callable[[str], None], *, keeps_half: bool = True
    ) -> Steps[str | None]:
        """Hand out the text before the first marker as soon as it is certain, and read the marker.

        No marker begins with another one.

        Args:
            markers: that end the text.
            emit: takes the text.
            keeps_half: whether what begins like a marker where the text ends is text; else the
                text was cut off inside of a marker.

        Returns:
            The marker, None where the text ended before one.
        """
        while True:
            first = _first_of(self._text, markers)
            is_sure = self._ended and keeps_half
            sure = len(self._text) if is_sure else _begin_of_unsure(self._text, markers)
            if first is not None and first[0] < sure:
                start, marker = first
                self._emit(start, emit)
                self._text = self._text[len(marker) :]
                return marker
            self._emit(sure, emit)
            if self._ended:
                self._text = ""
                return None
            yield

    def until(self, markers: Sequence[str]) -> Steps[tuple[str, str | None]]:
        """All the text before the first marker, and the marker, None where there is none."""
        pieces: list[str] = []
        marker = yield from self.stream_until(markers, pieces.append)
        return "".join(pieces), marker

    def skip_space(self) -> Steps[str]:
        """Read white space; returns the next character, unread, empty at the end."""
        while True:
            self._text = self._text.lstrip()
            if self._text or self._ended:
                return self._text[:1]
            yield

    def opens_with(self, marker: str) -> Steps[bool]:
        """Whether the text begins with a marker, a little white space aside; then both are read."""
        while True:
            text = self._text.lstrip()
            if len(self._text) - len(text) > _MAX_SPACE:
                return False
            if text.startswith(marker):
                self._text = text[len(marker) :]
                return True
            if self._ended or not marker.startswith(text):
                return False
            yield

    def is_cut_off_in(self, marker: str) -> bool:
        """Whether the text has ended before a marker or inside of it; then its rest is read."""
        is_cut = self._ended and marker.startswith(self._text.lstrip())
        if is_cut:
            self._text = ""
        return is_cut

    def _emit(self, end: int, emit: Callable[[str], None]) -> None:
        """Hand out the text up to `end`."""
        if end:
            emit(self._text[:end])
            self._text = self._text[end:]


def _first_of(text: str, markers: Sequence[str]) -> tuple[int, str] | None:
    """Place and text of the first marker."""
    places = ((text.find(marker), marker) for marker in markers)
    return min((place for place in places if place[0] >= 0), default=None)


def _begin_of_unsure(text: str, markers: Sequence[str]) -> int:
    """Where a marker may begin that more text would complete; the length where none may."""
    longest = max((len(marker) for marker in markers), default=0)
    for start in range(max(0, len(text) - longest + 1), len(text)):
        tail = text[start:]
        if any(marker.startswith(tail) and len(marker) > len(tail) for marker in markers):
            return start
    return len(text)
