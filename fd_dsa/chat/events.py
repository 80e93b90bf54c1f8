"""What a parser of answers reports, and the message that the reports add up to."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ContentDelta:
    """More of the answer's text."""

    text: str


@dataclass(frozen=True, slots=True)
class ReasoningDelta:
    """More of the reasoning before the answer."""

    text: str


@dataclass(frozen=True, slots=True)
class ToolCallStart:
    """A call begins; `index` counts the calls of an answer from 0."""

    index: int
    name: str


@dataclass(frozen=True, slots=True)
class ArgumentsDelta:
    """More of a call's arguments: together a JSON object, where the model made one."""

    index: int
    text: str


@dataclass(frozen=True, slots=True)
class ToolCallEnd:
    """A call is complete; missing where the answer ends inside of it."""

    index: int


Event = ContentDelta | ReasoningDelta | ToolCallStart | ArgumentsDelta | ToolCallEnd


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
    content, reasoning = [], []
    names: list[str] = []
    arguments: list[list[str]] = []
    for event in events:
        if isinstance(event, ContentDelta):
            content.append(event.text)
        elif isinstance(event, ReasoningDelta):
            reasoning.append(event.text)
        elif isinstance(event, ToolCallStart):
            names.append(event.name)
            arguments.append([])
        elif isinstance(event, ArgumentsDelta):
            arguments[event.index].append(event.text)
    calls = (ToolCall(name, "".join(a)) for name, a in zip(names, arguments, strict=True))
    return Message("".join(content), "".join(reasoning), tuple(calls))
