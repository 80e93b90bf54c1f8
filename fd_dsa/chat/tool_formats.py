"""Formats of tool calls, and the base of their parsers.

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

GLM-4.5 to GLM-5 write strings as plain text and other values as JSON. The tool's schema says
if a value is a string:

    <tool_call>NAME<arg_key>KEY</arg_key><arg_value>VALUE</arg_value>...</tool_call>

A call is read tentatively: its events are held back until it is complete. If it turns out to be
damaged, its text is content. The marks of a format may occur in prose and in values, so a mark
counts only in the right position. Each repair requires clean text around it, without "<" and ">",
so that half of a damaged mark never becomes a part of an argument.

Source of the formats: the chat templates of the models, and the files `encoding_dsv32.py` and
`encoding_dsv4.py` of DeepSeek's folders. V3.2 may write the arguments of a call as one JSON object;
source: sgl-project/sglang, its detector of this format.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from functools import cache
from typing import ClassVar

from fd_dsa.chat.events import EventSink
from fd_dsa.chat.json_arguments import read_object
from fd_dsa.chat.text_feed import Steps, TextFeed

V31_CALLS, V31_CALLS_END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
V31_CALL, V31_CALL_END = "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>"
V31_SEPARATOR = "<｜tool▁sep｜>"

DSML = "｜DSML｜"
V32_CALLS, V32_CALLS_END = f"<{DSML}function_calls>", f"</{DSML}function_calls>"
V4_CALLS, V4_CALLS_END = f"<{DSML}tool_calls>", f"</{DSML}tool_calls>"
V32_CALL, V32_CALL_END = f"<{DSML}invoke", f"</{DSML}invoke>"
V32_ARGUMENT, V32_ARGUMENT_END = f"<{DSML}parameter", f"</{DSML}parameter>"

GLM_CALL, GLM_CALL_END = "<tool_call>", "</tool_call>"
GLM_KEY, GLM_KEY_END = "<arg_key>", "</arg_key>"
GLM_VALUE, GLM_VALUE_END = "<arg_value>", "</arg_value>"

SPACE = r"\s{0,16}"
"""White space inside markup."""
JSON_SPACE = r"\s{0,64}"
"""White space around JSON, of which a grammar allows 40 characters."""
NAME = r"\w(?:[\w.:/-]{0,126}\w)?"
"""Name of a tool."""


class ToolFormat(ABC):
    """The format of tool calls of a family of models, and its parser.

    Attributes:
        name: name for vLLM's `--tool-call-parser`.
        starts: marks that begin a call or a section of calls.
        ends: marks that are markup directly after a call.
        markers: texts that are single tokens in the models' vocabularies and that the parser must
            see.
    """

    name: ClassVar[str]
    starts: ClassVar[tuple[str, ...]]
    ends: ClassVar[tuple[str, ...]]
    markers: ClassVar[tuple[str, ...]]

    @abstractmethod
    def read_call(self, feed: TextFeed, sink: EventSink) -> Steps[None]:
        """Read a call from one of `starts` on, with the mark that begins its section.

        Raises:
            Damaged: the text is not a call, or it cannot be repaired.
        """


_V31_HEAD = re.compile(
    rf"(?:{V31_CALLS}{SPACE}(?:{V31_CALL})?|{V31_CALL}){SPACE}({NAME}){SPACE}"
    rf"(?:{V31_SEPARATOR}|(?={{))"
)
_V31_PARTIAL = re.compile(
    rf"(?:{V31_CALLS}{SPACE})?(?:<[^<>]{{0,24}}>?)?{SPACE}(?:{NAME})?{SPACE}(?:<[^<>]{{0,16}})?"
)
# the arguments may be missing if a mark or the end of the text follows
_V31_ENDS = f"(?:{V31_CALL_END}|{V31_CALLS_END})"
_V31_ARGUMENTS = re.compile(rf"{JSON_SPACE}(?:(?={{)|(?={_V31_ENDS}\s{{0,16}}<)())")
_V31_MAYBE = re.compile(rf"{JSON_SPACE}(?:<[^<>]{{0,24}}>?\s{{0,16}})?")
_V31_LAST = re.compile(rf"{JSON_SPACE}(?={_V31_ENDS}\s{{0,16}}\Z)()")


class DeepseekV31Tools(ToolFormat):
    """Parser of DeepSeek-V3.1's calls. The marks around all calls are optional."""

    name = "deepseek_v31"
    starts = (V31_CALLS, V31_CALL)
    ends = (V31_CALL_END, V31_CALLS_END)
    markers = (V31_CALLS, V31_CALLS_END, V31_CALL, V31_CALL_END, V31_SEPARATOR)

    def read_call(self, feed: TextFeed, sink: EventSink) -> Steps[None]:
        head = yield from feed.peek(_V31_HEAD, _V31_PARTIAL)
        if head is None:
            raise feed.broken()
        feed.read_match(head)
        arguments = yield from feed.peek(_V31_ARGUMENTS, _V31_MAYBE)
        if arguments is None and feed.ends_near:
            arguments = feed.match(_V31_LAST)
        if arguments is None:
            raise feed.broken()
        feed.read_match(arguments)
        sink.start_call(head[1])
        if arguments[1] is None:
            yield from read_arguments(feed, sink, (V31_CALL_END, V31_CALLS_END, V31_CALL))
        else:
            sink.arguments("{}")
            sink.end_call()


def read_arguments(feed: TextFeed, sink: EventSink, ends: tuple[str, ...]) -> Steps[None]:
    """Read arguments that are one JSON object, and complete the call.

    Args:
        ends: marks that may follow. The end of the text may follow too, because the object is
            complete.
    """
    yield from read_object(feed, sink.arguments)
    end = yield from feed.peek(after_space(ends, JSON_SPACE))
    if end is None and not feed.is_last:
        raise feed.broken()
    sink.arguments("}")
    sink.end_call()


@cache
def after_space(marks: tuple[str, ...], space: str = SPACE) -> re.Pattern[str]:
    """Return a pattern of white space and one of the marks."""
    return re.compile(space + f"(?:{'|'.join(map(re.escape, marks))})")


def half_mark(size: int) -> str:
    """Return a pattern of text with a damaged mark of `size` characters."""
    return rf"[^<>]{{0,{size}}}[<>][\s\S]{{0,{size + 16}}}?"
