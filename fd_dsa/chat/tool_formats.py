"""How models write tool calls, and the parsers that read them.

DeepSeek-V3.1 and DeepSeek-V3.2-Exp:

    <｜tool▁calls▁begin｜><｜tool▁call▁begin｜>NAME<｜tool▁sep｜>JSON<｜tool▁call▁end｜>...<｜tool▁calls▁end｜>

DeepSeek-V3.2, in its markup DSML:

    <｜DSML｜function_calls>
    <｜DSML｜invoke name="NAME">
    <｜DSML｜parameter name="KEY" string="true">TEXT</｜DSML｜parameter>
    <｜DSML｜parameter name="KEY" string="false">JSON</｜DSML｜parameter>
    </｜DSML｜invoke>
    </｜DSML｜function_calls>

DeepSeek-V4 writes the same in a section named `tool_calls`.

GLM-4.5 to GLM-5, where a string is written as it is and anything else as JSON, so that the tool's
schema says which a value is:

    <tool_call>NAME<arg_key>KEY</arg_key><arg_value>VALUE</arg_value>...</tool_call>

Source of the formats: the chat templates of the models, and the files `encoding_dsv32.py` and
`encoding_dsv4.py` of DeepSeek's folders. That V3.2 may write the arguments of a call as one JSON
object: sgl-project/sglang, its detector of this format.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from typing import ClassVar

from fd_dsa.chat.events import ArgumentsWriter, EventSink, Steps, TextFeed

V31_CALLS, V31_CALLS_END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
V31_CALL, V31_CALL_END = "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>"
V31_SEPARATOR = "<｜tool▁sep｜>"

DSML = "｜DSML｜"
V32_CALLS, V32_CALLS_END = f"<{DSML}function_calls>", f"</{DSML}function_calls>"
V4_CALLS, V4_CALLS_END = f"<{DSML}tool_calls>", f"</{DSML}tool_calls>"
V32_CALL, V32_CALL_END = f"<{DSML}invoke", f"</{DSML}invoke>"
V32_ARGUMENT, V32_ARGUMENT_END = f"<{DSML}parameter", f"</{DSML}parameter>"
_V32_NAME = re.compile(r'\s+name="([^"]+)"\s*')
_V32_KEY = re.compile(r'\s+name="([^"]*)"\s+string="(true|false)"\s*')

GLM_CALL, GLM_CALL_END = "<tool_call>", "</tool_call>"
GLM_KEY, GLM_KEY_END = "<arg_key>", "</arg_key>"
GLM_VALUE, GLM_VALUE_END = "<arg_value>", "</arg_value>"
_GLM_NAME = re.compile(r'[^\s<>"{}]+')


class ToolFormat(ABC):
    """How a family of models writes tool calls.

    Attributes:
        name: as vLLM's `--tool-call-parser` has it.
        starts: what begins a section of calls in an answer.
        markers: texts that are a token each in the models' vocabularies and that the parser must
            see.
        call, calls_end: what begins a call, and what ends a section.
        argument: what begins an argument.
    """

    name: ClassVar[str]
    starts: tuple[str, ...]
    markers: ClassVar[tuple[str, ...]]
    call: ClassVar[str]
    calls_end: str = ""
    argument: ClassVar[str] = ""

    def section(self, feed: TextFeed, sink: EventSink, start: str) -> Steps[None]:
        """Read from after `start`, one of `starts`, to the end of the calls."""
        sink.begin_section("" if start == self.call else start)
        marker: str | None = start
        while marker not in (None, self.calls_end):
            if marker == self.call:
                marker = yield from self._read_call(feed, sink, start)
            if marker not in (None, self.calls_end):
                yield from feed.skip_space()
                marker = yield from feed.stream_until(
                    (self.call, self.calls_end), sink.content, keeps_half=not sink.has_calls
                )
        sink.end_section(marker or "")

    @abstractmethod
    def _read_call(self, feed: TextFeed, sink: EventSink, start: str) -> Steps[str | None]:
        """Read one call; returns the marker that ended it."""

    def _read_argument(
        self, feed: TextFeed, sink: EventSink, writer: ArgumentsWriter
    ) -> Steps[None]:
        """Read one argument from after `argument`."""
        raise NotImplementedError

    def _read_arguments(
        self, feed: TextFeed, sink: EventSink, name: str, marker: str | None, ends: tuple[str, ...]
    ) -> Steps[str | None]:
        """Read the arguments of a call from after `marker`; returns the marker that ended it."""
        writer = ArgumentsWriter(sink, sink.schemas.get(name))
        while marker == self.argument:
            yield from self._read_argument(feed, sink, writer)
            yield from feed.skip_space()
            marker = yield from feed.stream_until(
                (self.argument, *ends), sink.content, keeps_half=False
            )
        if marker is not None:
            writer.close()
        return marker

    def _read_json(
        self, feed: TextFeed, sink: EventSink, ends: tuple[str, ...]
    ) -> Steps[str | None]:
        """Read arguments that are one JSON object; returns the marker that ended the call."""
        yield from feed.skip_space()
        marker = yield from feed.stream_until(ends, sink.arguments, keeps_half=False)
        if marker is not None:
            sink.end_call()
        return marker


class DeepseekV31Tools(ToolFormat):
    """Reads the calls of DeepSeek-V3.1; one may come without the markers around all calls."""

    name = "deepseek_v31"
    starts = (V31_CALLS, V31_CALL)
    markers = (V31_CALLS, V31_CALLS_END, V31_CALL, V31_CALL_END, V31_SEPARATOR)
    call, calls_end = V31_CALL, V31_CALLS_END

    def _read_call(self, feed: TextFeed, sink: EventSink, start: str) -> Steps[str | None]:
        name, marker = yield from feed.until((V31_SEPARATOR, V31_CALL_END, V31_CALLS_END))
        if marker is None and sink.has_calls:
            return None
        if marker != V31_SEPARATOR or not name.strip():
            end = marker if marker and marker != V31_CALLS_END else ""
            sink.content(V31_CALL + name + end)
            return marker
        sink.start_call(name.strip())
        return (yield from self._read_json(feed, sink, (V31_CALL_END, V31_CALLS_END)))


class DeepseekV32Tools(ToolFormat):
    """Reads the calls of DeepSeek-V3.2; the empty line before the section is a part of it.

    Attributes:
        section_name: name of the element around all calls; a subclass may have another one.
    """

    name = "deepseek_v32"
    section_name: ClassVar[str] = "function_calls"
    # the markup is made of ordinary characters, but for this token
    markers = (DSML,)
    call, argument = V32_CALL, V32_ARGUMENT

    def __init__(self) -> None:
        begin = f"<{DSML}{self.section_name}>"
        self.starts = (f"\n\n{begin}", f"\n{begin}", begin)
        self.calls_end = f"</{DSML}{self.section_name}>"

    def _read_call(self, feed: TextFeed, sink: EventSink, start: str) -> Steps[str | None]:
        attributes, close = yield from feed.until((">",))
        match = _V32_NAME.fullmatch(attributes)
        if close is None and sink.has_calls:
            return None
        if match is None or close is None:
            sink.content(V32_CALL + attributes + (close or ""))
            return V32_CALL_END
        sink.start_call(match[1])
        ends = (V32_CALL_END, self.calls_end)
        if (yield from feed.skip_space()) == "{":
            return (yield from self._read_json(feed, sink, ends))
        marker = yield from feed.stream_until((V32_ARGUMENT, *ends), sink.content, keeps_half=False)
        return (yield from self._read_arguments(feed, sink, match[1], marker, ends))

    def _read_argument(
        self, feed: TextFeed, sink: EventSink, writer: ArgumentsWriter
    ) -> Steps[None]:
        attributes, close = yield from feed.until((">",))
        match = _V32_KEY.fullmatch(attributes)
        if close is not None and match is None:
            sink.content(V32_ARGUMENT + attributes + close)
        elif close is not None and match is not None:
            is_text = match[2] == "true"
            yield from writer.read(feed, match[1], V32_ARGUMENT_END, is_text)


class DeepseekV4Tools(DeepseekV32Tools):
    """Reads the calls of DeepSeek-V4."""

    name = "deepseek_v4"
    section_name = "tool_calls"


class GlmTools(ToolFormat):
    """Reads the calls of GLM, each a section; a line break before a call is a part of it."""

    name = "glm47"
    starts = (f"\n{GLM_CALL}", GLM_CALL)
    markers = (GLM_CALL, GLM_CALL_END, GLM_KEY, GLM_KEY_END, GLM_VALUE, GLM_VALUE_END)
    call, argument = GLM_CALL, GLM_KEY

    def section(self, feed: TextFeed, sink: EventSink, start: str) -> Steps[None]:
        yield from self._read_call(feed, sink, start)

    def _read_call(self, feed: TextFeed, sink: EventSink, start: str) -> Steps[str | None]:
        text, marker = yield from feed.until((GLM_KEY, GLM_CALL_END))
        name = text.strip()
        if marker is None and sink.num_calls:
            # cut off after another call
            return None
        if marker is None or not _GLM_NAME.fullmatch(name):
            sink.content(start + text + (marker or ""))
            return None
        sink.start_call(name)
        return (yield from self._read_arguments(feed, sink, name, marker, (GLM_CALL_END,)))

    def _read_argument(
        self, feed: TextFeed, sink: EventSink, writer: ArgumentsWriter
    ) -> Steps[None]:
        key, marker = yield from feed.until((GLM_KEY_END,))
        if marker is None:
            # cut off inside of a call, which has what came before
            return
        if not (yield from feed.opens_with(GLM_VALUE)):
            if not feed.is_cut_off_in(GLM_VALUE):
                sink.content(GLM_KEY + key + marker)
            return
        types = writer.types_of(key.strip())
        yield from writer.read(feed, key.strip(), GLM_VALUE_END, types == {"string"}, types)
