"""From the text of an answer to reasoning, content and tool calls, whole or as it comes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from fd_dsa.chat.events import Event, Message, join_events
from fd_dsa.chat.feed import Steps, TextFeed
from fd_dsa.chat.sink import EventSink

THINK_BEGIN = "<think>"
THINK_END = "</think>"
_PIECE_CHARS = 4096


class ToolFormat(Protocol):
    """How a family of models writes tool calls."""

    @property
    def name(self) -> str:
        """As vLLM's `--tool-call-parser` has it."""

    @property
    def starts(self) -> tuple[str, ...]:
        """What begins a section of calls in an answer."""

    @property
    def markers(self) -> tuple[str, ...]:
        """Texts that are a token each in the models' vocabularies and that the parser must see."""

    def section(self, feed: TextFeed, sink: EventSink, start: str) -> Steps[None]:
        """Read from behind `start`, one of `starts`, to the end of the calls."""


class OutputParser:
    """Splits one answer into its parts, piece by piece.

    The joined result depends on the whole text alone, not on the pieces. Malformed markup is no
    error: up to the name of a call it comes back as content, behind it the arguments are what the
    model wrote. White space around calls is markup.

    Args:
        has_reasoning: whether text in <think>...</think> at the beginning is reasoning.
        tool_format: how calls are written; None: a call is text like any other.
        schemas: tool name -> JSON schema of its arguments.
        in_reasoning: the prompt has opened the reasoning already.

    Attributes:
        is_reasoning: what was read last is reasoning that has not ended.
    """

    def __init__(
        self,
        has_reasoning: bool = False,
        tool_format: ToolFormat | None = None,
        schemas: Mapping[str, Any] | None = None,
        in_reasoning: bool = False,
    ) -> None:
        """Nothing is read yet."""
        self._feed = TextFeed()
        self._sink = EventSink(schemas or {})
        self._tools = tool_format
        self.is_reasoning = has_reasoning and in_reasoning
        self._steps: Steps[None] | None = self._parse(has_reasoning, in_reasoning)

    @property
    def num_tool_calls(self) -> int:
        """Calls that have begun."""
        return self._sink.num_calls

    def feed(self, text: str) -> list[Event]:
        """Events that more text brings; what may still become markup is held back."""
        self._feed.push(text)
        return self._advance()

    def finish(self) -> list[Event]:
        """Events of what was held back; call it once, at the end."""
        self._feed.end()
        return self._advance()

    def read(self, text: str) -> list[Event]:
        """Events of a whole answer; for a parser that has read nothing."""
        # in pieces, so that the cost stays linear: reading a marker copies what is behind it
        pieces = (text[i : i + _PIECE_CHARS] for i in range(0, len(text), _PIECE_CHARS))
        return [*(event for piece in pieces for event in self.feed(piece)), *self.finish()]

    def parse(self, text: str) -> Message:
        """The parts of a whole answer; for a parser that has read nothing."""
        return join_events(self.read(text))

    def _advance(self) -> list[Event]:
        """Read as far as the text goes."""
        if self._steps is not None:
            try:
                next(self._steps)
            except StopIteration:
                self._steps = None
        return self._sink.take()

    def _parse(self, has_reasoning: bool, in_reasoning: bool) -> Steps[None]:
        """Read the whole answer."""
        starts = self._tools.starts if self._tools is not None else ()
        marker: str | None = None
        if has_reasoning and (in_reasoning or (yield from self._feed.opens_with(THINK_BEGIN))):
            self.is_reasoning = True
            # a call inside of the reasoning ends it: models forget the end marker
            ends = (THINK_END, *starts)
            marker = yield from self._feed.stream_until(ends, self._sink.reasoning)
            if marker is None:
                return
            self.is_reasoning = False
        while True:
            if self._tools is not None and marker is not None and marker in starts:
                before = self._sink.num_calls
                yield from self._tools.section(self._feed, self._sink, marker)
                if self._sink.num_calls > before:
                    yield from self._feed.skip_space()
            marker = yield from self._feed.stream_until(starts, self._sink.content)
            if marker is None:
                return
