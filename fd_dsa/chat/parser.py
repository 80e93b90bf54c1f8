"""From the text of an answer to reasoning, content and tool calls, whole or as it comes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fd_dsa.chat.events import Event, EventSink, Message, Steps, TextFeed, join_events
from fd_dsa.chat.tool_formats import (
    DSML,
    GLM_KEY,
    V31_CALLS,
    DeepseekV31Tools,
    DeepseekV32Tools,
    GlmTools,
    ToolFormat,
)

THINK_BEGIN = "<think>"
THINK_END = "</think>"
_PIECE_CHARS = 4096

TOOL_FORMATS: dict[str, ToolFormat] = {
    "deepseek_v31": DeepseekV31Tools(),
    "deepseek_v32": DeepseekV32Tools(),
    "glm45": GlmTools(),
    "glm47": GlmTools(),
}
"""Names as of vLLM's `--tool-call-parser`; both forms of GLM are read by one parser."""
REASONING_FORMATS = ("deepseek_v3", "glm45")
"""Names as of vLLM's `--reasoning-parser`; all of them put <think> and </think> around it."""
AUTO, NONE = "auto", "none"
# in this order: what only this format's prompts show
_SIGNS = ((DSML, "deepseek_v32"), (V31_CALLS, "deepseek_v31"), (GLM_KEY, "glm47"))


@dataclass(frozen=True)
class AnswerFormat:
    """How the answers to one prompt are read: what the model writes, what the prompt has begun.

    Attributes:
        has_reasoning: whether text in <think>...</think> at the beginning is reasoning.
        in_reasoning: the prompt has opened the reasoning already.
        tool_format: how calls are written; None: a call is text like any other.
        schemas: tool name -> JSON schema of its arguments.
    """

    has_reasoning: bool = False
    in_reasoning: bool = False
    tool_format: ToolFormat | None = None
    schemas: Mapping[str, Any] = field(default_factory=dict)

    @property
    def begins_in_reasoning(self) -> bool:
        """Whether an answer begins with reasoning that is split off."""
        return self.has_reasoning and self.in_reasoning

    @property
    def markers(self) -> tuple[str, ...]:
        """Texts that the parser must see."""
        thinking = (THINK_BEGIN, THINK_END) if self.has_reasoning else ()
        return (*thinking, *(self.tool_format.markers if self.tool_format else ()))


class OutputParser:
    """Splits one answer into its parts, piece by piece.

    The joined result depends on the whole text alone, not on the pieces. Malformed markup is no
    error: up to the name of a call it comes back as content, after it the arguments are what the
    model wrote. White space around calls is markup.
    """

    def __init__(self, answer: AnswerFormat) -> None:
        self._feed = TextFeed()
        self._sink = EventSink(answer.schemas)
        self._tools = answer.tool_format
        self.is_reasoning = answer.begins_in_reasoning
        self._steps: Steps[None] | None = self._parse(answer)

    def feed(self, text: str) -> list[Event]:
        """Events that more text brings; what may still become markup is held back."""
        events = []
        # in pieces, so that the cost stays linear: reading a marker copies what follows it
        for begin in range(0, len(text), _PIECE_CHARS):
            self._feed.push(text[begin : begin + _PIECE_CHARS])
            events += self._advance()
        return events

    def finish(self) -> list[Event]:
        """Events of what was held back; call it once, at the end."""
        self._feed.end()
        return self._advance()

    def parse(self, text: str) -> Message:
        """The parts of a whole answer; for a parser that has read nothing."""
        return join_events([*self.feed(text), *self.finish()])

    def _advance(self) -> list[Event]:
        if self._steps is not None:
            try:
                next(self._steps)
            except StopIteration:
                self._steps = None
        return self._sink.take()

    def _parse(self, answer: AnswerFormat) -> Steps[None]:
        starts = self._tools.starts if self._tools is not None else ()
        marker: str | None = None
        if answer.begins_in_reasoning or (
            answer.has_reasoning and (yield from self._feed.opens_with(THINK_BEGIN))
        ):
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


def tool_format_name(name: str, source: str) -> str:
    """Name of the format of tool calls; "none" where none are looked for.

    Args:
        name: one of `TOOL_FORMATS`, "none", or "auto", which goes by the source.
        source: text of the template, which contains the marks of its formats.
    """
    if name != AUTO:
        return name
    return next((tool_format for sign, tool_format in _SIGNS if sign in source), NONE)


def find_tool_format(name: str, source: str) -> ToolFormat | None:
    """The format that `tool_format_name` names; None where no calls are looked for."""
    return TOOL_FORMATS.get(tool_format_name(name, source))


def reasoning_format_name(name: str, source: str) -> str:
    """Name of the form that reasoning has; "none" where none is looked for."""
    if name != AUTO:
        return name
    if THINK_END not in source:
        return NONE
    return "glm45" if GLM_KEY in source else "deepseek_v3"


def has_reasoning(name: str, source: str) -> bool:
    """Whether <think>...</think> at the beginning of an answer is reasoning."""
    return reasoning_format_name(name, source) != NONE


def opens_reasoning(prompt: str, continued: Mapping[str, Any] | None) -> bool:
    """Whether an answer begins inside of the reasoning.

    Args:
        continued: the last message where the answer goes on with it.
    """
    if continued is not None and is_reasoning_only(continued):
        return prompt.rfind(THINK_BEGIN) > prompt.rfind(THINK_END)
    return prompt.rstrip().endswith(THINK_BEGIN)


def is_reasoning_only(message: Mapping[str, Any]) -> bool:
    """Whether a message of the assistant ends inside of its reasoning."""
    return bool(message.get("reasoning_content")) and not (
        message.get("content") or message.get("tool_calls")
    )


class Arguments(dict[str, Any]):
    """A JSON object that templates may use as a mapping and as its text.

    Some templates go through the items, others put the arguments between two texts; those get
    the JSON as it was given, so that it stays what the model wrote.
    """

    def __init__(self, value: Mapping[str, Any], text: str) -> None:
        super().__init__(value)
        self.text = text

    @classmethod
    def read(cls, value: str | Mapping[str, Any]) -> Arguments:
        """Arguments from JSON text or from a mapping; an empty text has none.

        Raises:
            ValueError: the text is no JSON object.
        """
        if not isinstance(value, str):
            return cls(value, json.dumps(value, ensure_ascii=False))
        try:
            parsed = json.loads(value) if value.strip() else {}
        except (ValueError, RecursionError) as error:
            raise ValueError(f"the arguments of a tool call are no JSON: {error}") from error
        if not isinstance(parsed, dict):
            raise ValueError("the arguments of a tool call are no JSON object")
        return cls(parsed, value if value.strip() else "{}")

    def __str__(self) -> str:
        return self.text

    def __add__(self, other: str) -> str:
        return self.text + other

    def __radd__(self, other: str) -> str:
        return other + self.text
