"""Parser of answers: from whole or streamed text to reasoning, content and calls."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fd_dsa.chat.dsml_tools import DeepseekV4Tools, DeepseekV32Tools
from fd_dsa.chat.events import Event, EventSink, Message, join_events
from fd_dsa.chat.glm_tools import GlmTools
from fd_dsa.chat.text_feed import CutOff, Damaged, Steps, TextFeed
from fd_dsa.chat.tool_formats import DeepseekV31Tools, ToolFormat

THINK_BEGIN = "<think>"
THINK_END = "</think>"
# a shorter call is reported whole or not at all
_MAX_HELD = 2048

TOOL_FORMATS: dict[str, ToolFormat] = {
    "deepseek_v31": DeepseekV31Tools(),
    "deepseek_v32": DeepseekV32Tools(),
    "deepseek_v4": DeepseekV4Tools(),
    "glm45": GlmTools(),
    "glm47": GlmTools(),
}
"""Tool-call parsers by vLLM's names for `--tool-call-parser`.

GLM's two names share one.
"""
REASONING_FORMATS = ("deepseek_v3", "deepseek_v4", "glm45", "glm47")
"""vLLM's names for `--reasoning-parser`. All of them use <think> and </think>."""
AUTO, NONE = "auto", "none"


@dataclass(frozen=True)
class AnswerFormat:
    """Format of the answers to one prompt: the model's markup and the prompt's end.

    Attributes:
        has_reasoning: True if text in <think>...</think> at the beginning is reasoning.
        in_reasoning: True if the prompt ends inside the reasoning.
        tool_format: format of the calls. None = a call is text.
        schemas: tool name -> JSON schema of its arguments.
        has_only_calls: True if a grammar forces calls after the reasoning. Text at the end of an
            answer that was cut off is then half of a call, not content.
    """

    has_reasoning: bool = False
    in_reasoning: bool = False
    tool_format: ToolFormat | None = None
    schemas: Mapping[str, Any] = field(default_factory=dict)
    has_only_calls: bool = False

    @property
    def begins_in_reasoning(self) -> bool:
        """True if an answer begins with reasoning that is split off."""
        return self.has_reasoning and self.in_reasoning

    @property
    def markers(self) -> tuple[str, ...]:
        """Texts that the parser must see."""
        thinking = (THINK_BEGIN, THINK_END) if self.has_reasoning else ()
        return (*thinking, *(self.tool_format.markers if self.tool_format else ()))


class OutputParser:
    """Splits one answer into its parts, piece by piece.

    The joined result depends only on the whole text, not on the pieces. Text that may be a call is
    held back until the call is complete, or until `_MAX_HELD` characters of it are valid. From then
    on its arguments are streamed. Text of a call that cannot be repaired becomes content (or
    reasoning, inside the reasoning). A call that becomes invalid after more than `_MAX_HELD`
    characters has no end event, so its arguments are incomplete JSON. The rest of its text is
    content.

    Attributes:
        is_reasoning: True if the text at the read position is reasoning.
    """

    def __init__(self, answer: AnswerFormat) -> None:
        self._feed = TextFeed()
        self._sink = EventSink(answer.schemas)
        self._tools = answer.tool_format
        self._has_only_calls = answer.has_only_calls
        self.is_reasoning = answer.begins_in_reasoning
        self._steps: Steps[None] | None = self._parse(answer)

    def feed(self, text: str) -> list[Event]:
        """Return the events of more text. Text that may become markup is held back."""
        self._feed.push(text)
        return self._advance()

    def finish(self, text: str = "", *, is_cut: bool = False) -> list[Event]:
        """Return the events of the last text and of all held text. Call it once.

        Args:
            is_cut: True if the answer was cut off, for example by `max_tokens`. An incomplete call
                at its end is then reported. False if the model ended the answer. Then such a call
                is repaired, or becomes content.
        """
        self._feed.push(text)
        self._feed.end(is_cut=is_cut)
        return self._advance()

    def parse(self, text: str, *, is_cut: bool = False) -> Message:
        """Return the parts of a whole answer. The parser must not have read other text."""
        return join_events(self.finish(text, is_cut=is_cut))

    def _advance(self) -> list[Event]:
        if self._steps is not None:
            try:
                next(self._steps)
            except StopIteration:
                self._steps = None
        return self._sink.take()

    def _parse(self, answer: AnswerFormat) -> Steps[None]:
        if not self.is_reasoning and answer.has_reasoning:
            self.is_reasoning = bool((yield from self._feed.opens_with((THINK_BEGIN,))))
        starts = self._tools.starts if self._tools is not None else ()
        while True:
            found = yield from self._feed.stream_to(
                (THINK_END, *starts) if self.is_reasoning else starts,
                self._emit,
                keeps_half=not self._sink.num_calls,
            )
            if found is None:
                return
            if found == THINK_END:
                self._feed.read(len(found))
                self.is_reasoning = False
            elif self._tools is not None:
                yield from self._try_call(self._tools, found)

    def _emit(self, text: str) -> None:
        """Report text that is not a call."""
        if self.is_reasoning:
            self._sink.reasoning(text)
        elif not (self._has_only_calls and self._feed.is_cut):
            self._sink.content(text)

    def _try_call(self, tools: ToolFormat, start: str) -> Steps[None]:
        """Read a call and hold its events back.

        If it is not a call, only `start` is read, as text.
        """
        feed, sink = self._feed, self._sink
        feed.mark(_MAX_HELD, self._commit)
        sink.hold()
        try:
            if (yield from self._read_calls(tools)):
                self._commit()
            else:
                # the reasoning quotes these calls
                sink.drop()
                self._emit(feed.release())
        except Damaged as damage:
            is_cut = isinstance(damage, CutOff) and not self.is_reasoning
            if is_cut and sink.num_calls:
                # the answer ends inside a call, or in the head of a further one
                self._commit()
                feed.skip_all()
            elif sink.is_held:
                sink.drop()
                self._emit_damaged(start)

    def _emit_damaged(self, start: str) -> None:
        """Report the text of a damaged call up to the damage, or only `start` of other text.

        The rest of a damaged call may quote calls.
        """
        text = self._feed.marked()
        if not text or (self.is_reasoning and THINK_END in text):
            self._feed.rewind()
            text = self._feed.read(len(start))
        else:
            self._feed.release()
            self._sink.is_wary = True
        self._emit(text)

    def _read_calls(self, tools: ToolFormat) -> Steps[bool]:
        """Read a call and the marks after it, and in the reasoning all adjacent calls.

        Returns:
            True if they are calls. If the reasoning continues after them, it only quotes them.
        """
        feed = self._feed
        while True:
            # like `yield from`, with a check of the text before each wait
            for _ in tools.read_call(feed, self._sink):
                self._check_reasoning(whole=True)
                yield
            self._check_reasoning()
            if not self.is_reasoning:
                self._commit()
            yield from feed.skip_space()
            while (yield from feed.opens_with(tools.ends)):
                yield from feed.skip_space()
            feed.skip_half(tools.ends)
            if not self.is_reasoning:
                return True
            if not (yield from feed.opens_with(tools.starts, reads=False)):
                break
        # an answer that was cut off might have continued
        return not (yield from feed.goes_on(THINK_END, _MAX_HELD)) and not feed.is_cut

    def _commit(self) -> None:
        """Report the events that were held back, and stream the next ones.

        Raises:
            Damaged: as for `_check_reasoning`.
        """
        self._check_reasoning()
        if self._sink.is_held:
            self.is_reasoning = False
            self._feed.release()
            self._sink.commit()

    def _check_reasoning(self, *, whole: bool = False) -> None:
        """Make sure that a call in the reasoning does not contain the end of the reasoning.

        Args:
            whole: True = the text after the read position counts, too.

        Raises:
            Damaged: it does, so the reasoning only quotes a call.
        """
        if self.is_reasoning and THINK_END in self._feed.marked(whole=whole)[:_MAX_HELD]:
            raise Damaged


def split_reasoning(content: object) -> tuple[str, ...]:
    """Split the content of a message that begins with reasoning into markers and texts.

    Returns:
        The first marker with white space before it, and the reasoning. Then, if the reasoning has
        an end, the end marker and the text after it. Empty for any other content.
    """
    if not isinstance(content, str):
        return ()
    space, begin, rest = content.partition(THINK_BEGIN)
    if not begin or space.strip():
        return ()
    reasoning, end, text = rest.partition(THINK_END)
    return (space + begin, reasoning, end, text) if end else (space + begin, reasoning)


class Arguments(dict[str, Any]):
    """The arguments of a call, usable by templates as a mapping and as text.

    Some templates iterate the items, others insert the arguments as text. The latter get the exact
    text that the model wrote.
    """

    def __init__(self, value: Mapping[str, object], text: str) -> None:
        super().__init__(value)
        # a public attribute would hide an argument of the same name from templates
        self._text = text

    def __str__(self) -> str:
        return self._text

    def __add__(self, other: str) -> str:
        return self._text + other

    def __radd__(self, other: str) -> str:
        return other + self._text


def read_arguments(value: str | Mapping[str, object] | None) -> Arguments:
    """Read the arguments of a call in the history.

    An answer may end inside a call, and a model may write arguments that are not a JSON object.
    Such a text becomes the only value of a mapping, under the name `arguments`.

    Args:
        value: JSON text or a mapping. An empty text and None mean no arguments.

    Source of the name: DeepSeek-V4's `encoding_dsv4.py`.
    """
    if isinstance(value, Arguments):
        return value
    if isinstance(value, Mapping):
        return Arguments(value, json.dumps(value, ensure_ascii=False))
    text = value if value and value.strip() else "{}"
    try:
        parsed = json.loads(text)
        # an escaped half of a surrogate pair is valid JSON, but the prompt needs valid Unicode
        if "\\u" in text:
            json.dumps(parsed, ensure_ascii=False).encode()
    except (ValueError, RecursionError):
        parsed = None
    return Arguments(parsed if isinstance(parsed, dict) else {"arguments": text}, text)
