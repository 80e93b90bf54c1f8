"""Tool calls of DeepSeek-V3.2 and later models, in their markup DSML."""

from __future__ import annotations

import re
from functools import partial

from fd_dsa.chat.events import ArgumentsWriter, EventSink
from fd_dsa.chat.tagged_tools import Call, TaggedTools, check_end, is_last_mark
from fd_dsa.chat.text_feed import Damaged, Steps, TextFeed, halves
from fd_dsa.chat.tool_formats import (
    DSML,
    SPACE,
    V4_CALLS,
    V4_CALLS_END,
    V32_ARGUMENT,
    V32_ARGUMENT_END,
    V32_CALL,
    V32_CALL_END,
    V32_CALLS,
    V32_CALLS_END,
    after_space,
    half_mark,
    read_arguments,
)

_SECTION_ENDS = {V32_CALLS: V32_CALLS_END, V4_CALLS: V4_CALLS_END}
_SECTION = f"(?:{'|'.join(_SECTION_ENDS)})"
_SECTION_END = f"(?:{'|'.join(_SECTION_ENDS.values())})"

_ONE = (
    r"\s{0,16}[A-Za-z_]{1,16}\s{0,4}=\s{0,4}"
    r"""(?:"[^"<>]{1,128}"|'[^'<>]{1,128}'|\w{1,128}(?=[\s>]))"""
)
_ATTRIBUTE = re.compile(r"""([A-Za-z_]+)\s*=\s*(?:"([^"]+)"|'([^']+)'|(\w+))""")
_ATTRIBUTES = f"((?:{_ONE}){{1,3}})"
_CLOSE = rf"{SPACE}(/?)>"
_PARTIAL_ATTRIBUTES = r"(?:\s{0,16}(?:[A-Za-z_]{1,16}\s{0,4}(?:=[^<>]{0,400})?)?)"

_CALL = re.compile(V32_CALL + _ATTRIBUTES + _CLOSE)
_HEAD = re.compile(rf"\n{{0,2}}(?:{_SECTION}{SPACE})?{_CALL.pattern}")
_PARTIAL = re.compile(
    rf"\n{{0,2}}(?:{_SECTION}{SPACE})?(?:<[^<>\s]{{0,{len(V32_CALL) - 2}}}"
    rf"|{V32_CALL}{_PARTIAL_ATTRIBUTES})?"
)
_ARGUMENT = re.compile(rf"\n?{V32_ARGUMENT}{_ATTRIBUTES}{_CLOSE}")
# models sometimes omit the DSML mark
_PLAIN_ARGUMENT = re.compile(rf"<parameter{_ATTRIBUTES}{_CLOSE}")
# an attribute or a bracket after the head of an argument that lacks an attribute
_SPILT = re.compile(r"\s{0,4}(?:>|string=)")
_MAYBE_SPILT = re.compile(rf"\s{{0,4}}(?:{halves(('string=',))})?")
_PLAIN_NEXT = re.compile(rf"{V32_ARGUMENT_END}{SPACE}{_PLAIN_ARGUMENT.pattern}")
_NEXT_CALL = re.compile(
    rf"\n?(?:{V32_CALL_END}|{V32_ARGUMENT_END})?{SPACE}(?:{_SECTION_END}|{_CALL.pattern})"
)
_KEY = r"""name\s{0,4}=?\s{0,4}["']?([^"'<>=\s]{1,64})["'\s>]"""
_DAMAGED_ARGUMENT = re.compile(
    rf"{V32_ARGUMENT_END}((?:(?!{V32_ARGUMENT_END}|{V32_ARGUMENT})[\s\S]){{0,60}}?){_KEY}"
)
_DAMAGED_END = re.compile(rf"{V32_ARGUMENT_END}({half_mark(len(V32_CALL_END))}){_CALL.pattern}")
# an argument after the end of its call
_ENDS = f"(?:{V32_CALL_END}|{_SECTION_END})"
_LOST = re.compile(rf"{_ENDS}{SPACE}(?:{V32_ARGUMENT}|{_KEY})")
_MAYBE_LOST = re.compile(
    rf"{_ENDS}{SPACE}(?:{halves((V32_ARGUMENT,))}"
    r"""|[name]{0,4}\s{0,4}=?\s{0,4}["']?[^"'<>\s]{0,64})"""
)
_BRACE = re.compile("{")
_BODY = re.compile(rf"{SPACE}(?={{|{V32_ARGUMENT}|{V32_CALL_END}|{_SECTION_END}|<parameter\s)")
_MAYBE_BODY = re.compile(rf"{SPACE}(?:<[^<>\s]{{0,32}}|{V32_CALL}{_PARTIAL_ATTRIBUTES})?")
_MAYBE_NEXT_CALL = re.compile(rf"\n?(?:{V32_CALL_END}|{V32_ARGUMENT_END})?{_MAYBE_BODY.pattern}")


class DeepseekV32Tools(TaggedTools):
    """Parser of DeepSeek-V3.2's calls, including the empty line before them.

    A call may come without its section, or in the section of DeepSeek-V4.
    """

    name = "deepseek_v32"
    starts = tuple(
        f"{lines}{mark}" for lines in ("\n\n", "\n", "") for mark in (*_SECTION_ENDS, V32_CALL)
    )
    ends = (V32_CALL_END, *_SECTION_ENDS.values())
    # the markup consists of ordinary characters except for this token
    markers = (DSML,)
    value_end = V32_ARGUMENT_END
    bounds = (
        V32_ARGUMENT_END,
        *(V32_CALL_END, f"\n{V32_CALL_END}"),
        *(V32_ARGUMENT, f"\n{V32_ARGUMENT}"),
    )
    right_end = re.compile(f"{V32_ARGUMENT_END}{SPACE}(?:{V32_ARGUMENT}|{V32_CALL_END})")

    def read_call(self, feed: TextFeed, sink: EventSink) -> Steps[None]:
        head = yield from feed.peek(_HEAD, _PARTIAL)
        attributes = _attributes(head, {"name"})
        if head is None or attributes is None:
            raise feed.broken()
        feed.read_match(head)
        sink.start_call(attributes["name"])
        call = Call(feed, sink, ArgumentsWriter(sink, attributes["name"]), in_lines=True)
        if head[2]:
            call.writer.close()
            return
        has_argument = yield from self._has_argument(call)
        if has_argument and feed.match(_BRACE):
            yield from read_arguments(feed, sink, (*self.ends, V32_CALL))
            return
        yield from self.read_rest(call, self._read_arguments(call, has_argument))

    def _read_arguments(self, call: Call, has_argument: bool) -> Steps[None]:
        while has_argument:
            yield from self._read_argument(call)
            has_argument = yield from self._has_argument(call)
        yield from check_end(call, _LOST, _MAYBE_LOST)

    def _has_argument(self, call: Call) -> Steps[bool]:
        """Read up to the next argument.

        Returns False at the end of the call, which stays unread.
        """
        feed = call.feed
        found = yield from feed.peek(_BODY, _MAYBE_BODY)
        if found is not None:
            feed.read_match(found)
            return feed.match(after_space(self.ends)) is None
        found = yield from feed.peek(_NEXT_CALL, _MAYBE_NEXT_CALL)
        if self._begins_call(call, found) or (feed.is_last and not feed.is_cut):
            return False
        raise feed.broken()

    def _read_argument(self, call: Call) -> Steps[None]:
        feed = call.feed
        head = yield from feed.peek(_ARGUMENT)
        head = head or feed.match(_PLAIN_ARGUMENT)
        attributes = _attributes(head, {"name", "string"})
        if head is None or attributes is None or head[2]:
            raise feed.broken()
        feed.read_match(head)
        if "string" not in attributes and (yield from feed.peek(_SPILT, _MAYBE_SPILT)):
            raise Damaged
        says_text = {"true": True, "false": False}.get(attributes.get("string", "").lower())
        yield from call.writer.read(partial(self.read_value, call), attributes["name"], says_text)

    def is_end(self, call: Call) -> bool:
        if self._is_next_call(call):
            return True
        plain = call.feed.match(_PLAIN_NEXT)
        if plain is not None and _may_take(call, plain):
            return True
        argument = call.feed.match(_DAMAGED_ARGUMENT)
        is_known = argument is not None and call.writer.may_take(argument[2])
        if argument and is_known and (call.writer.is_described or not _has_mark(argument)):
            raise Damaged
        end = call.feed.match(_DAMAGED_END)
        if end is not None and not _has_mark(end):
            raise Damaged
        return False

    def is_bound(self, call: Call, found: str) -> bool:
        feed = call.feed
        if found.endswith(V32_CALL_END):
            return self._is_next_call(call) or is_last_mark(feed, found)
        argument = feed.match(_ARGUMENT)
        return argument is not None and _may_take(call, argument)

    def _is_next_call(self, call: Call) -> bool:
        """Return True if the end of the section or another call follows the mark here."""
        return self._begins_call(call, call.feed.match(_NEXT_CALL))

    def _begins_call(self, call: Call, found: re.Match[str] | None) -> bool:
        """Return True for a match of the end of the section, or of the head of another call."""
        if found is None or found[1] is None:
            return found is not None
        attributes = _attributes(found, {"name"})
        return attributes is not None and call.is_declared(attributes["name"])


class DeepseekV4Tools(DeepseekV32Tools):
    """Parser of DeepSeek-V4's calls."""

    name = "deepseek_v4"


def _attributes(head: re.Match[str] | None, known: set[str]) -> dict[str, str] | None:
    """Return the attributes of a head, or None if they are invalid or have no name."""
    if head is None:
        return None
    found = [(one[1], one[2] or one[3] or one[4]) for one in _ATTRIBUTE.finditer(head[1])]
    attributes = dict(found)
    if len(attributes) < len(found) or not attributes.keys() <= known or "name" not in attributes:
        return None
    return attributes


def _has_mark(damaged: re.Match[str]) -> bool:
    return any(mark in damaged[1] for mark in (V32_CALL, V32_ARGUMENT, V32_CALL_END))


def _may_take(call: Call, head: re.Match[str]) -> bool:
    attributes = _attributes(head, {"name", "string"})
    return attributes is not None and call.writer.may_take(attributes["name"])
