"""Parts of chat answers: the message of a whole one, the deltas of a streamed one."""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from fd_dsa.chat.events import (
    ArgumentsDelta,
    ContentDelta,
    Event,
    ReasoningDelta,
    ToolCallEnd,
    ToolCallStart,
    join_events,
)
from fd_dsa.chat.parser import AnswerFormat, OutputParser

if TYPE_CHECKING:
    from fd_dsa.engine.logprobs import TokenLogprobs
    from fd_dsa.engine.output import RequestOutput


class Choice:
    """One choice of an answer, while it comes.

    Args:
        answer: how it is read.
        one_call: whether it ends behind its first call.
        shows_reasoning: whether the reasoning is a part of the answer; its tokens and scores go
            with it.
        at_once: whether it may be read when it has ended, by `read_whole`, which costs less than
            step by step.

    Attributes:
        is_complete: nothing that the engine adds is shown any more.
        output: the last one that is shown.
        new_token_ids, new_scores: what the last step has shown.
    """

    def __init__(
        self, answer: AnswerFormat, *, one_call: bool, shows_reasoning: bool, at_once: bool
    ) -> None:
        self.is_complete = False
        self.output: RequestOutput | None = None
        self.new_token_ids: Sequence[int] = ()
        self.new_scores: Sequence[TokenLogprobs] = ()
        self._parser = OutputParser(answer)
        self._one_call = one_call
        self._shows_reasoning = shows_reasoning
        self._at_once = at_once and shows_reasoning and not one_call
        self._has_calls = False

    def add(self, output: RequestOutput) -> list[Event]:
        """What a step adds to the answer."""
        if self._at_once:
            if output.finished:
                self.output = output
                self.new_token_ids, self.new_scores = output.token_ids, output.logprobs or ()
            return []
        self.new_token_ids, self.new_scores = (), ()
        if self.is_complete:
            return []
        self.output = output
        was_reasoning = self._parser.is_reasoning
        events = self._parser.feed(output.new_text)
        if output.finished:
            events += self._parser.finish()
        if self._shows_reasoning or not (was_reasoning or self._parser.is_reasoning):
            self.new_token_ids, self.new_scores = output.new_token_ids, output.new_logprobs
        return list(self._shown(events))

    def read_whole(self) -> list[Event]:
        """What has ended and was not read step by step; a long answer takes a while."""
        if not self._at_once or self.output is None:
            return []
        return list(self._shown(self._parser.read(self.output.text)))

    def finish_reason(self, reason: str | None) -> str | None:
        """The engine's reason, "tool_calls" where a model that stopped had called."""
        is_called = self._has_calls and reason == "stop"
        return "tool_calls" if is_called or self.is_complete else reason

    def _shown(self, events: Iterable[Event]) -> Iterator[Event]:
        """The events that belong to the answer."""
        for event in events:
            self._has_calls = self._has_calls or isinstance(event, ToolCallStart)
            if self._shows_reasoning or not isinstance(event, ReasoningDelta):
                yield event
            if self._one_call and isinstance(event, ToolCallEnd):
                self.is_complete = True
                return


def message_of(events: Iterable[Event]) -> dict[str, Any]:
    """The message of a whole answer."""
    joined = join_events(events)
    message: dict[str, Any] = {"role": "assistant", "content": joined.content or None}
    if joined.reasoning:
        message["reasoning_content"] = joined.reasoning
    if joined.tool_calls:
        message["tool_calls"] = [
            {
                "id": _new_call_id(),
                "type": "function",
                "function": {"name": call.name, "arguments": call.arguments},
            }
            for call in joined.tool_calls
        ]
    elif not joined.content:
        message["content"] = ""
    return message


def deltas_of(events: Iterable[Event]) -> Iterator[dict[str, Any]]:
    """The deltas of a streamed answer."""
    for event in events:
        if isinstance(event, ContentDelta):
            yield {"content": event.text}
        elif isinstance(event, ReasoningDelta):
            yield {"reasoning_content": event.text}
        elif not isinstance(event, ToolCallEnd):
            yield {"tool_calls": [_call_delta(event)]}


def _call_delta(event: ToolCallStart | ArgumentsDelta) -> dict[str, Any]:
    """The beginning of a call, or more of its arguments."""
    if isinstance(event, ArgumentsDelta):
        return {"index": event.index, "function": {"arguments": event.text}}
    return {
        "index": event.index,
        "id": _new_call_id(),
        "type": "function",
        "function": {"name": event.name, "arguments": ""},
    }


def _new_call_id() -> str:
    """An id as `call_3f2a...`, new in every call."""
    return f"call_{uuid.uuid4().hex[:24]}"
