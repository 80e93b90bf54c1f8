"""Tool calls of DeepSeek-V3.2, in its markup DSML.

    <｜DSML｜function_calls>
    <｜DSML｜invoke name="NAME">
    <｜DSML｜parameter name="KEY" string="true">TEXT</｜DSML｜parameter>
    <｜DSML｜parameter name="KEY" string="false">JSON</｜DSML｜parameter>
    </｜DSML｜invoke>
    </｜DSML｜function_calls>

Source of the format: `encoding/encoding_dsv32.py` of the model's folder. That a model may write
the arguments of a call as one JSON object: sgl-project/sglang, its detector of this format.
"""

from __future__ import annotations

import re

from fd_dsa.chat.feed import Steps, TextFeed
from fd_dsa.chat.sink import ArgumentsWriter, EventSink

DSML = "｜DSML｜"
SECTION_BEGIN = f"<{DSML}function_calls>"
SECTION_END = f"</{DSML}function_calls>"
INVOKE_BEGIN = f"<{DSML}invoke"
INVOKE_END = f"</{DSML}invoke>"
PARAMETER_BEGIN = f"<{DSML}parameter"
PARAMETER_END = f"</{DSML}parameter>"

_INVOKE = re.compile(r'\s+name="([^"]+)"\s*')
_PARAMETER = re.compile(r'\s+name="([^"]*)"\s+string="(true|false)"\s*')


class DeepseekV32Tools:
    """Reads the calls. The empty line before the section is a part of it."""

    name = "deepseek_v32"
    starts = (f"\n\n{SECTION_BEGIN}", f"\n{SECTION_BEGIN}", SECTION_BEGIN)
    # the markup is made of ordinary characters, but for this token
    markers = (DSML,)

    def section(self, feed: TextFeed, sink: EventSink, start: str) -> Steps[None]:
        """Read from after `start`, one of `starts`, to the end of the calls."""
        sink.begin_section(start)
        marker: str | None = INVOKE_END
        while marker == INVOKE_END:
            yield from feed.skip_space()
            marker = yield from feed.stream_until(
                (INVOKE_BEGIN, SECTION_END), sink.content, keeps_half=not sink.has_calls
            )
            if marker == INVOKE_BEGIN:
                marker = yield from self._invoke(feed, sink)
        sink.end_section(marker or "")

    def _invoke(self, feed: TextFeed, sink: EventSink) -> Steps[str | None]:
        """Read one call; returns the marker that ended it."""
        attributes, close = yield from feed.until((">",))
        match = _INVOKE.fullmatch(attributes)
        if close is None and sink.has_calls:
            return None
        if match is None or close is None:
            sink.content(INVOKE_BEGIN + attributes + (close or ""))
            return INVOKE_END
        sink.start_call(match[1])
        return (yield from self._body(feed, sink, match[1]))

    def _body(self, feed: TextFeed, sink: EventSink, name: str) -> Steps[str | None]:
        """Read the arguments of one call; returns the marker that ended it."""
        if (yield from feed.skip_space()) == "{":
            marker = yield from feed.stream_until(
                (INVOKE_END, SECTION_END), sink.arguments, keeps_half=False
            )
            if marker is not None:
                sink.end_call()
            return marker
        writer = ArgumentsWriter(sink, sink.schemas.get(name))
        ends = (PARAMETER_BEGIN, INVOKE_END, SECTION_END)
        while True:
            marker = yield from feed.stream_until(ends, sink.content, keeps_half=False)
            if marker != PARAMETER_BEGIN:
                break
            yield from self._parameter(feed, sink, writer)
            yield from feed.skip_space()
        if marker is not None:
            writer.close()
        return marker

    def _parameter(self, feed: TextFeed, sink: EventSink, writer: ArgumentsWriter) -> Steps[None]:
        """Read one parameter."""
        attributes, close = yield from feed.until((">",))
        if close is None:
            # cut off inside of a call, which has what came before
            return
        match = _PARAMETER.fullmatch(attributes)
        if match is None:
            sink.content(PARAMETER_BEGIN + attributes + close)
            return
        writer.begin(match[1])
        if match[2] == "true":
            writer.quote()
            end = yield from feed.stream_until(
                (PARAMETER_END,), writer.characters, keeps_half=False
            )
            if end is not None:
                writer.quote()
            return
        value, end = yield from feed.until((PARAMETER_END,))
        if end is not None:
            writer.value(value)
