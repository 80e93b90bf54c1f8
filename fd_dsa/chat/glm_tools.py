"""Tool calls of GLM-4.5 to GLM-5.

    <tool_call>NAME<arg_key>KEY</arg_key><arg_value>VALUE</arg_value>...</tool_call>

A string is written as it is, anything else as JSON; the tool's schema says which a value is.
Source of the format: the chat templates of these models.
"""

from __future__ import annotations

import re

from fd_dsa.chat.feed import Steps, TextFeed
from fd_dsa.chat.sink import ArgumentsWriter, EventSink

CALL_BEGIN = "<tool_call>"
CALL_END = "</tool_call>"
KEY_BEGIN = "<arg_key>"
KEY_END = "</arg_key>"
VALUE_BEGIN = "<arg_value>"
VALUE_END = "</arg_value>"

_NAME = re.compile(r'[^\s<>"{}]+')


class GlmTools:
    """Reads the calls. A line break before a call is a part of it."""

    name = "glm47"
    starts = (f"\n{CALL_BEGIN}", CALL_BEGIN)
    markers = (CALL_BEGIN, CALL_END, KEY_BEGIN, KEY_END, VALUE_BEGIN, VALUE_END)

    def section(self, feed: TextFeed, sink: EventSink, start: str) -> Steps[None]:
        """Read one call from after `start`, one of `starts`."""
        text, marker = yield from feed.until((KEY_BEGIN, CALL_END))
        name = text.strip()
        if marker is None and sink.num_calls:
            # cut off after another call
            return
        if marker is None or not _NAME.fullmatch(name):
            sink.content(start + text + (marker or ""))
            return
        sink.start_call(name)
        writer = ArgumentsWriter(sink, sink.schemas.get(name))
        while marker == KEY_BEGIN:
            yield from self._argument(feed, sink, writer)
            yield from feed.skip_space()
            marker = yield from feed.stream_until(
                (KEY_BEGIN, CALL_END), sink.content, keeps_half=False
            )
        if marker is not None:
            writer.close()

    def _argument(self, feed: TextFeed, sink: EventSink, writer: ArgumentsWriter) -> Steps[None]:
        """Read one key and its value."""
        key, marker = yield from feed.until((KEY_END,))
        if marker is None:
            # cut off inside of a call, which has what came before
            return
        if not (yield from feed.opens_with(VALUE_BEGIN)):
            if not feed.is_cut_off_in(VALUE_BEGIN):
                sink.content(KEY_BEGIN + key + marker)
            return
        types = writer.types_of(key.strip())
        if types == {"string"}:
            writer.begin(key.strip())
            writer.quote()
            end = yield from feed.stream_until((VALUE_END,), writer.characters, keeps_half=False)
            if end is not None:
                writer.quote()
            return
        writer.begin(key.strip())
        value, end = yield from feed.until((VALUE_END,))
        if end is not None:
            writer.value(value, types)
