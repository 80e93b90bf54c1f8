"""The text of an answer, for parsers that are written as if they had the whole text.

A parser is a generator that yields whenever it needs more text. Its result depends only on the
whole text, not on the boundaries of the pieces.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Generator
from functools import cache
from typing import TypeVar

_T = TypeVar("_T")
Steps = Generator[None, None, _T]
"""A part of a parser. It yields when it needs more text, and returns a `_T`."""

LOOK_AHEAD = 256
"""Maximum number of characters that a decision at the read position needs."""
MAX_SPACE = 64
"""Maximum number of characters of white space before a marker.

It is bounded, because the white space is read again with each piece of text.
"""
_SPACE = re.compile(r"\s*")


class Damaged(Exception):
    """The text is not a call, or is a call that cannot be repaired."""


class CutOff(Damaged):
    """The text ended inside a call because the answer was cut off."""


class TextFeed:
    """The unread text, and the text of a call that may turn out to be invalid.

    Attributes:
        is_ended: True if the text is complete.
        is_cut: True if the answer was cut off at its end, for example by `max_tokens`.
    """

    def __init__(self) -> None:
        self.is_ended = self.is_cut = False
        # the last decision would have waited for more text
        self._is_open = False
        self._text = ""
        self._pos = 0
        self._mark: int | None = None
        self._limit = 0
        self._settle: Callable[[], None] | None = None

    def push(self, text: str) -> None:
        kept = self._pos if self._mark is None else self._mark
        self._text = self._text[kept:] + text
        self._pos -= kept
        if self._mark is not None:
            self._mark = 0

    def end(self, *, is_cut: bool) -> None:
        self.is_ended, self.is_cut = True, is_cut

    def mark(self, limit: int, settle: Callable[[], None]) -> None:
        """Keep the text from the read position on for `rewind`.

        Args:
            settle: called once, when `limit` more characters are read.
        """
        self._mark, self._limit, self._settle = self._pos, limit, settle

    def marked(self, *, whole: bool = False) -> str:
        """Return the text from the mark to the read position, or to the end of the text."""
        assert self._mark is not None
        return self._text[self._mark : None if whole else self._pos]

    def release(self) -> str:
        """Remove the mark and return the text from there to the read position."""
        text, self._mark = self.marked(), None
        return text

    def rewind(self) -> None:
        """Return to the mark."""
        assert self._mark is not None
        self._pos, self._mark = self._mark, None

    @property
    def place(self) -> int | None:
        """Read position relative to the mark, in characters. None without a mark."""
        return None if self._mark is None else self._pos - self._mark

    def go_to(self, place: int) -> bool:
        """Return to a position after the mark. Returns False without a mark."""
        if self._mark is not None:
            self._pos = self._mark + place
        return self._mark is not None

    def stream_to(
        self, markers: tuple[str, ...], emit: Callable[[str], None], *, keeps_half: bool = False
    ) -> Steps[str | None]:
        """Pass on the text before the first marker as soon as it is certain.

        Args:
            keeps_half: True if the beginning of a marker at the end of a cut-off text is text.
                Otherwise it is dropped.

        Returns:
            The marker, unread, or None if the text ended before one.
        """
        whole, half, longest = _any_of(markers)
        while True:
            match = whole.search(self._text, self._pos)
            self._is_open = match is None
            if match is not None:
                self._emit(match.start(), emit)
                return match[0]
            is_text = self.is_ended and (keeps_half or not self.is_cut)
            begin = max(self._pos, len(self._text) - longest + 1)
            match = None if is_text else half.search(self._text, begin)
            self._emit(len(self._text) if match is None else match.start(), emit)
            if self.is_ended:
                self._advance(len(self._text))
                return None
            yield

    def peek(
        self, sure: re.Pattern[str], partial: re.Pattern[str] | None = None
    ) -> Steps[re.Match[str] | None]:
        """Match a pattern at the read position as soon as there is enough text.

        Args:
            partial: matches texts that may still become a match. Without it `LOOK_AHEAD` characters
                decide.
        """
        while True:
            match = sure.match(self._text, self._pos)
            if partial is None:
                may_match = len(self._text) - self._pos < LOOK_AHEAD
            else:
                may_match = partial.fullmatch(self._text, self._pos) is not None
            self._is_open = match is None and may_match
            if self.is_ended or not self._is_open:
                return match
            yield

    def match(self, pattern: re.Pattern[str]) -> re.Match[str] | None:
        """Match a pattern in the available part of the next `LOOK_AHEAD` characters."""
        return pattern.match(self._text, self._pos, self._pos + LOOK_AHEAD)

    def take(self, pattern: re.Pattern[str]) -> Steps[str]:
        """Read a match, or the available part of a run. Returns "" if there is no match."""
        while True:
            match = pattern.match(self._text, self._pos)
            self._is_open = match is None and len(self._text) - self._pos <= 1
            if match is not None:
                return self.read_match(match)
            if self.is_ended or not self._is_open:
                return ""
            yield

    def read(self, size: int) -> str:
        text = self._text[self._pos : self._pos + size]
        self._advance(self._pos + len(text))
        return text

    def read_match(self, match: re.Match[str]) -> str:
        """Read the text of a match at the read position."""
        return self.read(match.end() - self._pos)

    def skip_space(self) -> Steps[None]:
        """Read white space."""
        while True:
            match = _SPACE.match(self._text, self._pos)
            assert match is not None, "an empty text matches too"
            self._advance(match.end())
            if self._pos < len(self._text) or self.is_ended:
                return
            yield

    def skip_all(self) -> None:
        """Read all available text."""
        self._advance(len(self._text))

    def opens_with(self, markers: tuple[str, ...], *, reads: bool = True) -> Steps[str]:
        """Read a marker if the text begins with one, after optional white space.

        Returns:
            The marker, "" for other text.
        """
        match = yield from self.peek(*_opening(markers))
        if match is not None and reads:
            self.read_match(match)
        return "" if match is None else match[1]

    def skip_half(self, markers: tuple[str, ...]) -> None:
        """Read half of a marker in which the answer was cut off."""
        if self.is_cut and _opening(markers)[1].fullmatch(self._text, self._pos):
            self.skip_all()

    def goes_on(self, text: str, size: int) -> Steps[bool]:
        """Return True if a text is within `size` characters, or if as many characters follow."""
        while True:
            has_text = self._text.find(text, self._pos, self._pos + size) >= 0
            if has_text or len(self._text) - self._pos >= size:
                return True
            if self.is_ended:
                return False
            yield

    @property
    def is_last(self) -> bool:
        """True if only a little white space follows."""
        return self.ends_near and not self._text[self._pos :].strip()

    @property
    def ends_near(self) -> bool:
        """True if the text ends within the next `LOOK_AHEAD` characters."""
        return self.is_ended and len(self._text) - self._pos < LOOK_AHEAD

    def broken(self) -> Damaged:
        """Return the exception for text that does not continue like a call.

        `CutOff` needs a text that could have continued. So whole texts and streams, which do not
        know their end, agree.
        """
        return CutOff() if self.is_cut and self._is_open else Damaged()

    def _emit(self, end: int, emit: Callable[[str], None]) -> None:
        if end > self._pos:
            emit(self._text[self._pos : end])
            self._advance(end)

    def _advance(self, pos: int) -> None:
        self._pos = pos
        if self._mark is not None and self._settle and pos - self._mark >= self._limit:
            settle, self._settle = self._settle, None
            settle()


@cache
def _any_of(markers: tuple[str, ...]) -> tuple[re.Pattern[str], re.Pattern[str], int]:
    """Return patterns of a marker and of half a marker at the end, and the max length."""
    whole = "|".join(map(re.escape, markers)) or r"(?!)"
    longest = max(map(len, markers), default=0)
    return re.compile(whole), re.compile(rf"(?:{halves(markers)})\Z"), longest


@cache
def _opening(markers: tuple[str, ...]) -> tuple[re.Pattern[str], re.Pattern[str]]:
    """Return patterns of white space with a marker, and of texts that may become one."""
    space = rf"\s{{0,{MAX_SPACE}}}"
    return (
        re.compile(f"{space}({'|'.join(map(re.escape, markers))})"),
        re.compile(f"{space}(?:{halves(markers)})?"),
    )


def halves(markers: tuple[str, ...]) -> str:
    """Return a pattern of the texts that may become one of the markers."""
    texts = {marker[:size] for marker in markers for size in range(1, len(marker))}
    return "|".join(map(re.escape, sorted(texts, reverse=True))) or r"(?!)"
