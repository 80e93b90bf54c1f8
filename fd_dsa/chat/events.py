"""Events of an answer's parser, and the objects that collect them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from fd_dsa.chat.loose_json import loose_json
from fd_dsa.chat.schema import ToolSchema, type_of
from fd_dsa.chat.text_feed import Damaged, Steps

Kind = Literal["content", "reasoning", "call", "arguments", "call_end"]


@dataclass(frozen=True, slots=True)
class Event:
    """An event of an answer's parser.

    Attributes:
        kind: "content" and "reasoning" add text. "call" begins a call, "arguments" adds to its JSON
            object, and "call_end" completes it. A call without a "call_end" was cut off, or turned
            out to be malformed after a part of it was sent. Its arguments are incomplete JSON.
        text: the added text, or the name of the called tool.
        index: index of the call in the answer, from 0.
    """

    kind: Kind
    text: str = ""
    index: int = 0


@dataclass(frozen=True)
class ToolCall:
    """A call: the name of the tool and its arguments as JSON text."""

    name: str
    arguments: str


@dataclass(frozen=True)
class Message:
    """The parts of an answer, each empty if absent."""

    content: str = ""
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()


def join_events(events: Iterable[Event]) -> Message:
    """Return the message that a parser's events add up to."""
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


Emit = Callable[[str], None]
# first character of the JSON types that may contain marks
_BEGINS = {"object": "{", "array": "["}


class EventSink:
    """Collects events, merges adjacent events of one kind, and holds calls back.

    Attributes:
        schemas: tool name -> JSON schema of its arguments.
        num_calls: number of calls so far, including held ones.
        is_wary: True after a damaged call, whose remaining text may quote calls. Then only declared
            tools are called.
    """

    def __init__(self, schemas: Mapping[str, object]) -> None:
        self.schemas = schemas
        self.num_calls = 0
        self._resolved: dict[str, ToolSchema] = {}
        self.is_wary = False
        self._events: list[_Part] = []
        self._held: list[_Part] | None = None
        self._num_calls_before = 0

    def schema_of(self, tool: str) -> ToolSchema:
        """Return the schema of a tool's arguments. Its results are shared by all calls of an
        answer.
        """
        if tool not in self._resolved:
            self._resolved[tool] = ToolSchema(self.schemas.get(tool))
        return self._resolved[tool]

    def take(self) -> list[Event]:
        """Return the events since the last call, without held ones."""
        parts, self._events = self._events, []
        return [Event(part.kind, "".join(part.texts), part.index) for part in parts]

    def hold(self) -> None:
        """Hold the next events back until `commit`."""
        self._held, self._num_calls_before = [], self.num_calls

    def commit(self) -> None:
        """Report the events that were held back."""
        for part in self._held or ():
            self._add(part, self._events)
        self._held = None

    def drop(self) -> None:
        """Discard the events that were held back."""
        self._held, self.num_calls = None, self._num_calls_before

    @property
    def is_held(self) -> bool:
        """True while events are held back."""
        return self._held is not None

    def content(self, text: str) -> None:
        self._report("content", text)

    def reasoning(self, text: str) -> None:
        self._report("reasoning", text)

    def start_call(self, name: str) -> None:
        """Begin a call.

        Raises:
            Damaged: the tool is not declared, and `is_wary` is True.
        """
        if self.is_wary and self.schemas and name not in self.schemas:
            raise Damaged
        self.num_calls += 1
        self._report("call", name)

    def arguments(self, text: str) -> None:
        """Add arguments to the latest call."""
        self._report("arguments", text)

    def end_call(self) -> None:
        """Complete the latest call."""
        self._report("call_end")

    def _report(self, kind: Kind, text: str = "") -> None:
        is_of_call = kind not in ("content", "reasoning")
        if text or kind == "call_end":
            part = _Part(kind, [text], self.num_calls - 1 if is_of_call else 0)
            self._add(part, self._events if self._held is None else self._held)

    def _add(self, part: _Part, events: list[_Part]) -> None:
        """Report more text, merged with the event before it if that has the same kind."""
        if events and part.kind not in ("call", "call_end") and events[-1].kind == part.kind:
            events[-1].texts.extend(part.texts)
        else:
            events.append(part)


@dataclass(slots=True)
class _Part:
    """An event that still grows."""

    kind: Kind
    texts: list[str]
    index: int


class ArgumentsWriter:
    """Writes the JSON object of a call's arguments value by value, while they arrive.

    A declared tool whose schema names no argument may get a name twice, even in a forced call,
    because grammars cannot compare names. As in JSON parsers the last value counts, so the object
    of such a tool is written at the end of the call.
    """

    def __init__(self, sink: EventSink, tool: str) -> None:
        self._sink = sink
        self._schema = sink.schema_of(tool)
        self._given: set[str] = set()
        # the previous value has no end mark, so this value may be a part of it
        self._is_doubtful = False
        # name -> JSON of arguments that are written at the end of the call
        self._later: dict[str, list[str]] | None = None
        if tool in sink.schemas and not self._names:
            self._later = {}

    def may_take(self, name: str) -> bool:
        """Return True if the schema allows this argument now, or has no properties."""
        return name not in self._given and (not self._names or name in self._names)

    @property
    def is_described(self) -> bool:
        """True if the schema names the arguments."""
        return bool(self._names)

    def ends_with_name(self, text: str) -> bool:
        """Return True if a text ends with the name of an argument that may follow."""
        return text.endswith(tuple(self._names - self._given))

    @property
    def is_full(self) -> bool:
        """True if the call has all required arguments (or all named ones)."""
        needed = self._schema.required_names() or self._names
        return bool(needed) and needed <= self._given

    @property
    def _names(self) -> frozenset[str]:
        return self._schema.argument_names()

    def read(
        self, value: Callable[[Emit, str], Steps[bool]], name: str, says_text: bool | None = None
    ) -> Steps[None]:
        """Read the value of an argument.

        The schema decides if the value is text or JSON. If it allows both, or does not say, the
        model's declaration counts. Without one, JSON of an allowed type is preferred. A value that
        should be JSON and is invalid becomes a string.

        Args:
            value: reads the value and passes its text on piece by piece. Returns True if it had an
                end mark. Its second argument has the first characters of the JSON that the value
                may be.
            says_text: True if the model declares the value as text, False for JSON, None without a
                declaration.

        Raises:
            Damaged: the call has this argument already, or the value has no end. Also an invalid
                value that should be JSON, with a damaged mark in or around it.
        """
        if self._later is None:
            if name in self._given:
                raise Damaged
            self._begin(name)
            yield from self._read(self._sink.arguments, value, name, says_text)
            return
        texts: list[str] = []
        first = self._later.setdefault(name, texts)
        self._given.add(name)
        yield from self._read(texts.append, value, name, says_text)
        first[:] = texts

    def _begin(self, name: str) -> None:
        """Write the name of an argument, before its value."""
        self._sink.arguments(", " if self._given else "{")
        self._sink.arguments(json.dumps(name, ensure_ascii=False) + ": ")
        self._given.add(name)

    def _read(
        self,
        write: Emit,
        value: Callable[[Emit, str], Steps[bool]],
        name: str,
        says_text: bool | None,
    ) -> Steps[None]:
        """Read a value and write its JSON. See `read`."""
        types = self._schema.argument_types(name)
        was_doubtful, self._is_doubtful = self._is_doubtful, False
        is_text = says_text is not False and types == {"string"}
        if is_text or (says_text and (not types or "string" in types)):
            write('"')
            self._is_doubtful = not (yield from value(lambda text: write(_quoted(text)), ""))
            write('"')
            return
        pieces: list[str] = []
        should_be_json = says_text is False or (bool(types) and "string" not in types)
        begins = '{["' if should_be_json or not types else ""
        begins += "".join(sign for kind, sign in _BEGINS.items() if kind in types)
        self._is_doubtful = not (yield from value(pieces.append, begins))
        text = "".join(pieces)
        kind = type_of(text.strip())
        if types and "string" not in types and kind not in types:
            loose = loose_json(text.strip(), types)
            if loose is not None:
                write(loose)
                return
        is_json = kind is not None and (
            "string" not in types
            or kind in types - {"string"}
            or (kind == "string" and says_text is False)
        )
        is_doubtful = was_doubtful or self._is_doubtful or re.search("[<>]", text)
        if kind is None and should_be_json and is_doubtful:
            raise Damaged
        write(text.strip() if is_json else json.dumps(text, ensure_ascii=False))

    def flush(self) -> None:
        """Write the arguments that are written at the end, even if incomplete."""
        if self._later is None:
            return
        later, self._later = self._later, None
        self._given.clear()
        for name, texts in later.items():
            self._begin(name)
            self._sink.arguments("".join(texts))

    def close(self) -> None:
        """Complete the call."""
        self.flush()
        self._sink.arguments("}" if self._given else "{}")
        self._sink.end_call()


def _quoted(text: str) -> str:
    """Return a text as the inside of a JSON string."""
    return json.dumps(text, ensure_ascii=False)[1:-1]
