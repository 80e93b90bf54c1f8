"""Parts of chat answers: the message of a whole one, the deltas of a streamed one."""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Iterator
from typing import Any

from fd_dsa.chat.events import (
    ArgumentsDelta,
    ContentDelta,
    Event,
    ReasoningDelta,
    ToolCallEnd,
    ToolCallStart,
)
from fd_dsa.serve.chat_prompt import AnswerFormat


class ChoiceParts:
    """The parts of one choice, as they come.

    Args:
        answer: how the answer is read.
    """

    def __init__(self, answer: AnswerFormat) -> None:
        self._parser = answer.new_parser()
        self._one_call = answer.one_call
        self._has_calls = False

    def deltas(self, text: str, *, is_last: bool) -> Iterator[dict[str, Any]]:
        """Deltas that more text brings; at the end those of what was held back."""
        events = self._parser.feed(text)
        if is_last:
            events += self._parser.finish()
        return self._deltas(events)

    def message(self, text: str) -> dict[str, Any]:
        """The message of a whole answer."""
        message: dict[str, Any] = {"role": "assistant", "content": None}
        for delta in self.deltas(text, is_last=True):
            for name in ("content", "reasoning_content"):
                if name in delta:
                    message[name] = (message.get(name) or "") + delta[name]
            for call in delta.get("tool_calls", ()):
                _add_call(message.setdefault("tool_calls", []), call)
        if message["content"] is None and not self._has_calls:
            message["content"] = ""
        return message

    def finish_reason(self, reason: str | None) -> str | None:
        """The engine's reason, "tool_calls" where a model that stopped had called."""
        return "tool_calls" if reason == "stop" and self._has_calls else reason

    def _deltas(self, events: Iterable[Event]) -> Iterator[dict[str, Any]]:
        """Events in the form of the API."""
        for event in events:
            if isinstance(event, ContentDelta):
                yield {"content": event.text}
            elif isinstance(event, ReasoningDelta):
                yield {"reasoning_content": event.text}
            elif isinstance(event, ToolCallEnd) or (event.index and self._one_call):
                continue
            else:
                self._has_calls = True
                yield {"tool_calls": [_call_delta(event)]}


def _call_delta(event: ToolCallStart | ArgumentsDelta) -> dict[str, Any]:
    """The beginning of a call, or more of its arguments."""
    if isinstance(event, ArgumentsDelta):
        return {"index": event.index, "function": {"arguments": event.text}}
    return {
        "index": event.index,
        "id": f"call_{uuid.uuid4().hex[:24]}",
        "type": "function",
        "function": {"name": event.name, "arguments": ""},
    }


def _add_call(calls: list[dict[str, Any]], delta: dict[str, Any]) -> None:
    """Add a delta to the calls of a whole message."""
    if "id" in delta:
        calls.append({key: value for key, value in delta.items() if key != "index"})
    else:
        calls[delta["index"]]["function"]["arguments"] += delta["function"]["arguments"]
