"""Tool calls of DeepSeek-V3.1 and DeepSeek-V3.2-Exp.

    <｜tool▁calls▁begin｜><｜tool▁call▁begin｜>NAME<｜tool▁sep｜>JSON<｜tool▁call▁end｜>...<｜tool▁calls▁end｜>

Source of the format: the chat templates of these models.
"""

from __future__ import annotations

from fd_dsa.chat.feed import Steps, TextFeed
from fd_dsa.chat.sink import EventSink

CALLS_BEGIN = "<｜tool▁calls▁begin｜>"
CALLS_END = "<｜tool▁calls▁end｜>"
CALL_BEGIN = "<｜tool▁call▁begin｜>"
CALL_END = "<｜tool▁call▁end｜>"
SEPARATOR = "<｜tool▁sep｜>"


class DeepseekV31Tools:
    """Reads the calls; a call may come without the markers around all calls."""

    name = "deepseek_v31"
    starts = (CALLS_BEGIN, CALL_BEGIN)
    markers = (CALLS_BEGIN, CALLS_END, CALL_BEGIN, CALL_END, SEPARATOR)

    def section(self, feed: TextFeed, sink: EventSink, start: str) -> Steps[None]:
        """Read from after `start`, one of `starts`, to the end of the calls."""
        sink.begin_section("" if start == CALL_BEGIN else start)
        marker: str | None = start
        while marker is not None and marker != CALLS_END:
            if marker == CALL_BEGIN:
                marker = yield from self._call(feed, sink)
            if marker != CALLS_END:
                yield from feed.skip_space()
                marker = yield from feed.stream_until(
                    (CALL_BEGIN, CALLS_END), sink.content, keeps_half=not sink.has_calls
                )
        sink.end_section(marker or "")

    def _call(self, feed: TextFeed, sink: EventSink) -> Steps[str | None]:
        """Read one call; returns the marker that ended it."""
        name, marker = yield from feed.until((SEPARATOR, CALL_END, CALLS_END))
        if marker is None and sink.has_calls:
            return None
        if marker != SEPARATOR or not name.strip():
            sink.content(CALL_BEGIN + name + (marker if marker and marker != CALLS_END else ""))
            return marker
        sink.start_call(name.strip())
        pieces: list[int] = []

        def write(text: str) -> None:
            pieces.append(len(text))
            sink.arguments(text)

        yield from feed.skip_space()
        marker = yield from feed.stream_until((CALL_END, CALLS_END), write, keeps_half=False)
        if marker is not None:
            if not pieces:
                sink.arguments("{}")
            sink.end_call()
        return marker
