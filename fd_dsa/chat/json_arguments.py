"""JSON in calls, read in pieces: whole objects of arguments, and strings in values."""

from __future__ import annotations

import json
import re
from collections.abc import Callable

from fd_dsa.chat.text_feed import Damaged, Steps, TextFeed

# complete strings are read together with the text around them
_OUTSIDE = re.compile(r'(?:[\s:,0-9A-Za-z+\-.]|"(?:[^"\\\x00-\x1f]|\\[^\x00-\x1f])*")+|[{}\[\]"]')
_INSIDE = re.compile(r'(?:[^"\\]|\\[^\x00-\x1f])+|"')
_CONTROL = re.compile(r"[\x00-\x1f]")
_STRING_SIGN = re.compile(r'["\\]')
# text between two strings
_BETWEEN = re.compile(r"[\s:,0-9A-Za-z+\-.{}\[\]]*")


def read_object(feed: TextFeed, emit: Callable[[str], None]) -> Steps[None]:
    """Read a JSON object and pass on its text up to the last brace.

    Control characters in strings are escaped, because models write literal line breaks. The caller
    writes the last brace, because only the caller knows if the object may end there.

    Raises:
        Damaged: the text is not a JSON object.
    """
    written: list[str] = []

    def write(text: str) -> None:
        written.append(text)
        emit(text)

    depth, is_inside = 0, False
    while True:
        text = yield from feed.take(_INSIDE if is_inside else _OUTSIDE)
        if not text:
            raise feed.broken()
        if text == '"':
            is_inside = not is_inside
        elif is_inside:
            text = _CONTROL.sub(_escaped, text)
        else:
            depth += (text in "{[") - (text in "}]")
        if not depth:
            break
        write(text)
    try:
        value = json.loads("".join(written) + text, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise Damaged from error
    if not isinstance(value, dict):
        raise Damaged


def _escaped(match: re.Match[str]) -> str:
    return json.dumps(match[0])[1:-1]


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is not valid JSON")


class OpenString:
    """Determines if a JSON text that comes in pieces ends inside a string.

    Args:
        begins: first characters of the expected JSON. Other texts have no strings.
    """

    def __init__(self, begins: str) -> None:
        self._begins = begins
        self._is_json = bool(begins)
        self._is_escaped = False
        # last character outside strings, without white space; a quote after a string
        self._last = ""
        self.is_open = False

    @property
    def is_complete(self) -> bool:
        """True if all strings are closed and only JSON is around them."""
        return self._is_json and not self.is_open

    def add(self, text: str) -> None:
        """Read more text. Each character is read once."""
        place = 0
        while self._is_json and place < len(text):
            if self.is_open:
                place = self._inside(text, place)
            else:
                end = text.find('"', place)
                self._outside(text[place:] if end < 0 else text[place:end])
                if end < 0:
                    return
                self.is_open = self._is_json and self._may_follow('"')
                self._is_json, self._last, place = self.is_open, '"', end + 1

    def _inside(self, text: str, place: int) -> int:
        """Read the rest of a string and return the position after it."""
        if self._is_escaped:
            self._is_escaped = False
            return place + 1
        sign = _STRING_SIGN.search(text, place)
        if sign is None:
            return len(text)
        if sign[0] == '"':
            self.is_open = False
        else:
            self._is_escaped = True
        return sign.end()

    def _outside(self, text: str) -> None:
        """Read text between two strings."""
        stripped = text.strip()
        if stripped:
            is_sound = _BETWEEN.fullmatch(stripped) is not None
            self._is_json = is_sound and self._may_follow(stripped[0])
            self._last = stripped[-1]

    def _may_follow(self, sign: str) -> bool:
        """Return True if a character may follow the last one outside strings."""
        if not self._last:
            return sign in self._begins
        if self._last == '"':
            return sign in ",:]}"
        return sign != '"' or self._last in "[{,:"
