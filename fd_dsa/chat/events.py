"""What a parser of answers reads and reports, and where its parts put what they find.

Text comes in pieces, for parsers that are written as if they had all of it. A parser is a
generator: it yields whenever it needs more text. What it finds depends on the whole text alone,
never on where the pieces were cut.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from fd_dsa.chat.schema import ToolSchema, type_of

_T = TypeVar("_T")
Steps = Generator[None, None, _T]
"""A part of a parser that yields when it needs more text, and returns a `_T`."""


# white space is held back only so long: else every piece of it would be read again and again
_MAX_SPACE = 64


class TextFeed:
    """The text that is not read yet."""

    def __init__(self) -> None:
        self._text = ""
        self._ended = False

    def push(self, text: str) -> None:
        self._text += text

    def end(self) -> None:
        self._ended = True

    def stream_until(
        self, markers: Sequence[str], emit: Callable[[str], None], *, keeps_half: bool = True
    ) -> Steps[str | None]:
        """Hand out the text before the first marker as soon as it is certain, and read the marker.

        No marker begins with another one.

        Args:
            keeps_half: whether what begins like a marker where the text ends is text; else the
                text was cut off inside of a marker.

        Returns:
            The marker, None where the text ended before one.
        """
        while True:
            places = ((self._text.find(marker), marker) for marker in markers)
            first = min((place for place in places if place[0] >= 0), default=None)
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
        if end:
            emit(self._text[:end])
            self._text = self._text[end:]


def _begin_of_unsure(text: str, markers: Sequence[str]) -> int:
    """Where a marker may begin that more text would complete; the length where none may."""
    longest = max((len(marker) for marker in markers), default=0)
    for start in range(max(0, len(text) - longest + 1), len(text)):
        tail = text[start:]
        if any(marker.startswith(tail) and len(marker) > len(tail) for marker in markers):
            return start
    return len(text)


Kind = Literal["content", "reasoning", "call", "arguments", "call_end"]


@dataclass(frozen=True, slots=True)
class Event:
    """What a parser reports of an answer.

    Attributes:
        kind: "content" and "reasoning" bring more text, and "arguments" more of a call's: together
            a JSON object, where the model made one. A "call" begins, and with "call_end", which is
            missing where the answer ends inside of it, it is complete.
        text: what is added; of a call the name of the tool.
        index: of a call and its arguments, from 0 in an answer.
    """

    kind: Kind
    text: str = ""
    index: int = 0


@dataclass(frozen=True)
class ToolCall:
    """One call: name of the tool and its arguments as JSON text."""

    name: str
    arguments: str


@dataclass(frozen=True)
class Message:
    """An answer in its parts, each empty where the answer has none."""

    content: str = ""
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()


def join_events(events: Iterable[Event]) -> Message:
    """The message that a parser's events add up to."""
    texts: dict[str, list[str]] = {"content": [], "reasoning": []}
    calls: list[list[str]] = []
    for event in events:
        if event.kind == "call":
            calls.append([event.text])
        elif event.kind == "arguments":
            calls[event.index].append(event.text)
        elif event.kind != "call_end":
            texts[event.kind].append(event.text)
    made = tuple(ToolCall(name, "".join(arguments)) for name, *arguments in calls)
    return Message("".join(texts["content"]), "".join(texts["reasoning"]), made)


class EventSink:
    """Collects events, neighbours of one kind as one."""

    def __init__(self, schemas: Mapping[str, Any]) -> None:
        self.schemas = schemas
        self.num_calls = 0
        self._events: list[Event] = []
        self._held = ""
        self._num_calls_before = 0
        self._has_arguments = False
        self._resolved: dict[int, ToolSchema] = {}

    def resolved(self, schema: Any) -> ToolSchema:
        """One of `schemas` with what is known of it, which all calls of an answer share."""
        if id(schema) not in self._resolved:
            self._resolved[id(schema)] = ToolSchema(schema)
        return self._resolved[id(schema)]

    def take(self) -> list[Event]:
        """The events since the last call."""
        events, self._events = self._events, []
        return events

    def content(self, text: str) -> None:
        """More text of the answer, after the markup that was held for it."""
        text, self._held = self._held + text, ""
        self._add("content", text)

    @property
    def has_calls(self) -> bool:
        """Whether the section has made a call: what is cut off after it is markup, not content."""
        return self.num_calls > self._num_calls_before

    def begin_section(self, markup: str) -> None:
        """Hold the markup that begins some calls: it is content if no call follows."""
        self._held = markup
        self._num_calls_before = self.num_calls

    def end_section(self, markup: str) -> None:
        """Take the markup that ends the calls, empty where the text ended before it."""
        if not self.has_calls:
            self.content(markup)

    def reasoning(self, text: str) -> None:
        self._add("reasoning", text)

    def start_call(self, name: str) -> None:
        self._held, self._has_arguments = "", False
        self._events.append(Event("call", name, self.num_calls))
        self.num_calls += 1

    def arguments(self, text: str) -> None:
        """More arguments of the latest call."""
        self._has_arguments = True
        self._add("arguments", text, self.num_calls - 1)

    def end_call(self) -> None:
        """The latest call is complete; without arguments it has an empty object of them."""
        if not self._has_arguments:
            self.arguments("{}")
        self._events.append(Event("call_end", index=self.num_calls - 1))

    def _add(self, kind: Kind, text: str, index: int = 0) -> None:
        """Report more text, as one event with the text of the same kind before it."""
        last = self._events[-1] if self._events else None
        if last is not None and last.kind == kind:
            self._events[-1] = Event(kind, last.text + text, index)
        elif text:
            self._events.append(Event(kind, text, index))


class ArgumentsWriter:
    """A JSON object of arguments, written value by value while they come."""

    def __init__(self, sink: EventSink, schema: Any) -> None:
        self._sink = sink
        self._schema = schema
        self._is_empty = True

    def types_of(self, name: str) -> frozenset[str]:
        """Types that the schema allows for an argument; empty if it does not say."""
        return self._sink.resolved(self._schema).argument_types(name)

    def read(
        self,
        feed: TextFeed,
        name: str,
        end: str,
        is_text: bool,
        types: frozenset[str] = frozenset(),
    ) -> Steps[None]:
        """Read a value up to its end marker; of one that is cut off, what has come of a string.

        Args:
            is_text: the value is a string as it is, else the JSON text as the model wrote it.
            types: those that the value may have, empty for any. With "string" among them JSON of
                another type than these is a string; in any case a text that is no JSON is one.
        """
        self._sink.arguments("{" if self._is_empty else ", ")
        self._sink.arguments(json.dumps(name, ensure_ascii=False) + ": ")
        self._is_empty = False
        if is_text:
            self._sink.arguments('"')
            marker = yield from feed.stream_until((end,), self._characters, keeps_half=False)
            if marker is not None:
                self._sink.arguments('"')
            return
        text, marker = yield from feed.until((end,))
        if marker is None:
            return
        raw = text.strip()
        kind = type_of(raw)
        if kind is not None and ("string" not in types or kind in types - {"string"}):
            self._sink.arguments(raw)
        else:
            self._sink.arguments(json.dumps(text, ensure_ascii=False))

    def _characters(self, text: str) -> None:
        self._sink.arguments(json.dumps(text, ensure_ascii=False)[1:-1])

    def close(self) -> None:
        if not self._is_empty:
            self._sink.arguments("}")
        self._sink.end_call()
