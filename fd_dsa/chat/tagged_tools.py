"""Base of the parsers for DSML and GLM, which write each value between two marks.

A value may contain any mark, so the position decides. The end mark of a value counts only directly
before the next argument or the end of the call. The end mark is missing if another argument of the
tool begins inside a value. It is also missing if the call ends there and the answer or another call
follows. Such an error is repaired if there is no other reading: the value has no other end mark,
and no "<" or ">" in its last characters. Otherwise the call is damaged.

A mark in a string of a JSON value is a part of the string. If the string has no end, its marks are
read as in other text.
"""

from __future__ import annotations

import re
from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from fd_dsa.chat.events import ArgumentsWriter, Emit, EventSink
from fd_dsa.chat.json_arguments import OpenString
from fd_dsa.chat.text_feed import CutOff, Damaged, Steps, TextFeed
from fd_dsa.chat.tool_formats import ToolFormat

# longer than a mark at the end of a value
_TAIL = 24
# remains of markup in the last characters of a value
_REMAINS = re.compile(r"[<>]|(?:name|string)=|[\"']\Z")


@dataclass
class Call:
    """A call that is being read.

    Attributes:
        feed, sink: source of the text, and target of the events.
        writer: target of the arguments.
        in_lines: True if the model writes a line break between two marks.
    """

    feed: TextFeed
    sink: EventSink
    writer: ArgumentsWriter
    in_lines: bool

    def is_declared(self, name: str) -> bool:
        """Return True if a call of this tool may follow.

        Without declared tools every call may.
        """
        return not self.sink.schemas or name in self.sink.schemas


class TaggedTools(ToolFormat):
    """Parser of values between marks.

    Attributes:
        value_end: mark at the end of a value.
        bounds: marks in a value that need a decision, also with a preceding line break if that may
            belong to the markup.
        right_end: pattern of an end mark in the right position.
    """

    value_end: ClassVar[str]
    bounds: ClassVar[tuple[str, ...]]
    right_end: ClassVar[re.Pattern[str]]

    def read_rest(self, call: Call, arguments: Steps[None]) -> Steps[None]:
        """Read the arguments of a call, and complete it."""
        try:
            yield from arguments
        except Damaged:
            call.writer.flush()
            raise
        call.writer.close()

    @abstractmethod
    def is_end(self, call: Call) -> bool:
        """Return True if an end mark in a wrong position ends the value.

        Raises:
            Damaged: half of a mark follows.
        """

    @abstractmethod
    def is_bound(self, call: Call, found: str) -> bool:
        """Return True if another mark ends the value, whose end mark is missing."""

    def read_value(self, call: Call, emit: Emit, json_begins: str) -> Steps[bool]:
        """Read a value and its end mark. Returns False if the end mark is missing.

        Args:
            json_begins: first characters of the JSON that the value may be.
        """
        value = _Value(emit, json_begins)
        has_end = yield from self._read_to_end(call, value)
        value.flush()
        return has_end

    def _read_to_end(self, call: Call, value: _Value) -> Steps[bool]:
        """Read up to the end of a value. See `read_value`.

        The last part of the value stays in `value`.
        """
        feed = call.feed
        while True:
            found = yield from feed.stream_to(self.bounds, value.add)
            if found is not None and value.strings.is_open:
                value.skip(feed)
                value.add(feed.read(len(found)))
                continue
            # the end of a string that was cut off is unknown
            is_cut = found is None and feed.is_cut and value.strings.is_open
            if not is_cut and value.go_back(feed):
                continue
            if found is None:
                raise feed.broken()
            right = yield from feed.peek(self.right_end)
            if right is not None:
                feed.read(len(found))
                return True
            if found == self.value_end:
                if self.is_end(call) or is_last_mark(feed, found):
                    value.check()
                    feed.read(len(found))
                    return True
                value.has_end = True
            elif self.is_bound(call, found):
                value.check()
                if found[0] == "\n" and not call.in_lines:
                    value.add(feed.read(1))
                return False
            value.add(feed.read(len(found)))


def is_last_mark(feed: TextFeed, mark: str) -> bool:
    """Return True if the text ends after a mark.

    Raises:
        CutOff: the answer was cut off there, so the rest of the call is unknown.
    """
    match = feed.match(re.compile(re.escape(mark) + r"\s*(<[^<>]*)?\Z"))
    if not feed.ends_near or match is None:
        return False
    if feed.is_cut:
        raise CutOff
    return match[1] is None


def check_end(call: Call, lost: re.Pattern[str], maybe_lost: re.Pattern[str]) -> Steps[None]:
    """Check that no argument follows the end mark of a call.

    Args:
        lost: pattern of the end mark, followed by the mark or the name of an argument.
        maybe_lost: pattern of a text that may become a match of `lost`.
    """
    if call.writer.is_full:
        return
    argument = yield from call.feed.peek(lost, maybe_lost)
    if argument is not None and (not argument[1] or call.writer.may_take(argument[1])):
        raise Damaged


class _Value:
    """A value that is being read.

    Args:
        json_begins: first characters of the JSON that the value may be. Its text is then passed on
            only at the end.

    Attributes:
        strings: determines if the text so far ends inside a JSON string.
        has_end: True if the value contains an end mark.
    """

    def __init__(self, emit: Emit, json_begins: str) -> None:
        self.strings = OpenString(json_begins)
        self.has_end = False
        self._emit = emit
        self._tail = ""
        self._kept: list[str] | None = [] if json_begins else None
        # position of the first mark in a string, and number of texts before it
        self._skipped: tuple[int, int] | None = None

    def add(self, text: str) -> None:
        self._tail = (self._tail + text)[-_TAIL:]
        self.strings.add(text)
        if self._kept is None:
            self._emit(text)
        else:
            self._kept.append(text)

    def skip(self, feed: TextFeed) -> None:
        """Remember the position of a mark in a string, in case the string has no end."""
        place = feed.place
        if self._skipped is None and self._kept is not None and place is not None:
            self._skipped = place, len(self._kept)

    def go_back(self, feed: TextFeed) -> bool:
        """Return to the first mark in a string if the value is not JSON.

        Returns:
            True if the feed is at that mark. False also if its text is no longer available.
        """
        if self._skipped is None or self.strings.is_complete or self._kept is None:
            return False
        (place, num_kept), self._skipped = self._skipped, None
        self.strings = OpenString("")
        if not feed.go_to(place):
            self.has_end = True
            return False
        del self._kept[num_kept:]
        self._tail = "".join(self._kept)[-_TAIL:]
        return True

    def flush(self) -> None:
        """Pass on the text that was kept."""
        if self._kept is not None:
            self._emit("".join(self._kept))

    def check(self) -> None:
        """Raise `Damaged` if the end of the value has remains of markup."""
        if self.has_end or _REMAINS.search(self._tail):
            raise Damaged
