"""Calls of DSML and GLM, which write each value as a text between two marks.

A value may contain any mark, so position decides. The end mark of a value counts only directly
before the next argument or the end of the call. The end mark is missing if another argument of the
tool begins inside of a value, or if the call ends there and the answer or another call follows.
Such a slip is repaired if there is no other reading: the value has no other end mark, and no "<"
or ">" in its last characters. Otherwise the call is damaged.
"""

from __future__ import annotations

import re
from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from fd_dsa.chat.events import ArgumentsWriter, Emit, EventSink
from fd_dsa.chat.text_feed import CutOff, Damaged, Steps, TextFeed
from fd_dsa.chat.tool_formats import ToolFormat

# longer than a mark at the end of a value
_TAIL = 24
# of markup, in the last characters of a value
_REMAINS = re.compile(r"[<>]|(?:name|string)=|[\"']\Z")


@dataclass
class Call:
    """A call while it is read.

    Attributes:
        feed, sink: source of the text, and target of the events.
        writer: target of the arguments.
        in_lines: the model writes a line break between two marks.
    """

    feed: TextFeed
    sink: EventSink
    writer: ArgumentsWriter
    in_lines: bool

    def is_declared(self, name: str) -> bool:
        """Whether a call of a tool may follow; any tool, if none is declared."""
        return not self.sink.schemas or name in self.sink.schemas


class TaggedTools(ToolFormat):
    """Reads values between marks.

    Attributes:
        value_end: mark at the end of a value.
        bounds: marks in a value that need a decision, each also after a line break if that may
            be a part of the markup.
        right_end: end mark of a value in the right place.
    """

    value_end: ClassVar[str]
    bounds: ClassVar[tuple[str, ...]]
    right_end: ClassVar[re.Pattern[str]]

    @abstractmethod
    def is_end(self, call: Call) -> bool:
        """Whether an end mark, not in the right place, ends the value with a slip after it.

        Raises:
            Damaged: half of a mark follows.
        """

    @abstractmethod
    def is_bound(self, call: Call, found: str) -> bool:
        """Whether another mark ends the value, which has lost its end mark."""

    def read_value(self, call: Call, emit: Emit) -> Steps[bool]:
        """Read a value and its end mark; False if that is missing."""
        feed, value = call.feed, _Value(emit)
        while True:
            found = yield from feed.stream_to(self.bounds, value.add)
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
    """Whether the text ends after a mark.

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
        lost: pattern of the end mark and the mark or the name of an argument.
        maybe_lost: pattern of a text that may become that.
    """
    if call.writer.is_full:
        return
    argument = yield from call.feed.peek(lost, maybe_lost)
    if argument is not None and (not argument[1] or call.writer.may_take(argument[1])):
        raise Damaged


class _Value:
    """A value while it is read; `check` raises `Damaged` if its end is not clean."""

    def __init__(self, emit: Emit) -> None:
        self.has_end = False
        self._emit = emit
        self._tail = ""

    def add(self, text: str) -> None:
        self._tail = (self._tail + text)[-_TAIL:]
        self._emit(text)

    def check(self) -> None:
        if self.has_end or _REMAINS.search(self._tail):
            raise Damaged
