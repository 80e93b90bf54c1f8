"""Tool calls of GLM-4.5 to GLM-5."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial

from fd_dsa.chat.events import ArgumentsWriter, EventSink
from fd_dsa.chat.tagged_tools import Call, TaggedTools, check_end, is_last_mark
from fd_dsa.chat.text_feed import Damaged, Steps, TextFeed
from fd_dsa.chat.tool_formats import (
    GLM_CALL,
    GLM_CALL_END,
    GLM_KEY,
    GLM_KEY_END,
    GLM_VALUE,
    GLM_VALUE_END,
    NAME,
    SPACE,
    after_space,
    half_mark,
)

_KEY = r"([^<>]{1,64}?)"
_WORD = r'[^\s<>"{}]'
_TO_VALUE = f"{GLM_KEY_END}{SPACE}{GLM_VALUE}"
# a value is repaired only if clean text follows, up to the end of the value
_CLEAN = rf"(?=[^<>]{{{len(GLM_VALUE)}}}|[^<>]+{GLM_VALUE_END})"

_HEAD = re.compile(rf"\n?{GLM_CALL}{SPACE}({NAME}){SPACE}(?={GLM_KEY}|{GLM_CALL_END})")
# the mark before the first key is missing, and the name may touch the key
_GLUED = re.compile(
    rf"\n?{GLM_CALL}{SPACE}({_WORD}{{1,128}})(?:\s{{1,16}}({_WORD}{{1,64}}))?{SPACE}{_TO_VALUE}"
)
_PARTIAL = re.compile(
    rf"\n?{GLM_CALL}{SPACE}(?:{NAME}(?:\s{{1,16}}(?:{_WORD}{{1,64}}{SPACE})?)?)?"
    r"(?:<[a-z_/]{0,10}(?:>\s{0,16}(?:<[a-z_]{0,9})?)?)?"
)
_CALL = re.compile(rf"\n?(?:{GLM_CALL_END}|{GLM_VALUE_END})?\s{{0,16}}{_HEAD.pattern}")

_REST = rf"{_KEY}{SPACE}(?:{GLM_KEY_END}{SPACE}){{1,2}}{GLM_VALUE}"
_ARGUMENT = re.compile(rf"(?:{GLM_KEY}{SPACE}){{1,2}}{_REST}")
_MAYBE_ARGUMENT = re.compile(rf"{GLM_KEY}[^<>]{{0,100}}(?:<[^<>]{{0,12}}>?[^<>]{{0,100}}){{0,3}}")
_SLIPS = (
    re.compile(rf"{GLM_KEY}{SPACE}{_KEY}{SPACE}{GLM_VALUE}{_CLEAN}"),
    re.compile(rf"{GLM_KEY}{SPACE}{_KEY}{SPACE}{GLM_KEY_END}(?=\S){_CLEAN}"),
    re.compile(rf"{_KEY}{SPACE}{_TO_VALUE}"),
)
_NEXT = re.compile(rf"{SPACE}(?={GLM_KEY}|{GLM_CALL_END}|{GLM_CALL})")
_NO_KEY = re.compile(
    rf"{GLM_VALUE_END}\s{{0,16}}((?:(?!{GLM_VALUE_END}|{GLM_KEY})[\s\S]){{1,80}}?){SPACE}{_TO_VALUE}"
)
# an argument after the end of its call
_LOST = re.compile(rf"{GLM_CALL_END}{SPACE}(?:{GLM_KEY}|([^\s<>]{{1,64}}){SPACE}{GLM_KEY_END})")
_MAYBE_LOST = re.compile(rf"{GLM_CALL_END}{SPACE}[^\s<>]{{0,64}}{SPACE}(?:</?[arg_key]{{0,7}})?")
_DAMAGED_END = re.compile(f"{GLM_VALUE_END}({half_mark(len(GLM_CALL_END))}){_HEAD.pattern}")
_NEXT_ARGUMENT = re.compile(rf"\n?{GLM_KEY}{SPACE}{_REST}")


class GlmTools(TaggedTools):
    """Parser of GLM's calls, including a line break before them."""

    name = "glm47"
    starts = (f"\n{GLM_CALL}", GLM_CALL)
    ends = (GLM_CALL_END,)
    markers = (GLM_CALL, GLM_CALL_END, GLM_KEY, GLM_KEY_END, GLM_VALUE, GLM_VALUE_END)
    value_end = GLM_VALUE_END
    bounds = (
        GLM_VALUE_END,
        *(GLM_CALL_END, f"\n{GLM_CALL_END}"),
        *(GLM_KEY, f"\n{GLM_KEY}"),
    )
    right_end = re.compile(f"{GLM_VALUE_END}{SPACE}(?:{GLM_KEY}|{GLM_CALL_END})")

    def read_call(self, feed: TextFeed, sink: EventSink) -> Steps[None]:
        head = yield from feed.peek(_HEAD, _PARTIAL)
        if head is not None:
            name, key = head[1], None
        else:
            head = feed.match(_GLUED)
            if head is None:
                raise feed.broken()
            name, key = _name_and_key(head, sink.schemas)
        markup = feed.read_match(head)
        sink.start_call(name)
        call = Call(feed, sink, ArgumentsWriter(sink, name), markup.endswith("\n"))
        if key is not None and not (call.writer.is_described and call.writer.may_take(key)):
            raise Damaged
        yield from self.read_rest(call, self._read_arguments(call, key))

    def _read_arguments(self, call: Call, key: str | None) -> Steps[None]:
        """Read all arguments. `key` is the first argument's key if it is read already."""
        if key is not None:
            yield from self._read_argument(call, key)
        while (yield from self._has_argument(call)):
            yield from self._read_argument(call, (yield from self._key(call)))
        yield from check_end(call, _LOST, _MAYBE_LOST)

    def _has_argument(self, call: Call) -> Steps[bool]:
        """Read up to the next argument.

        Returns False at the end of the call, which stays unread.
        """
        feed = call.feed
        found = yield from feed.peek(_NEXT)
        if found is not None:
            feed.read_match(found)
            return feed.match(after_space((GLM_KEY,))) is not None
        if feed.is_last and not feed.is_cut:
            return False
        no_key = feed.match(after_space(("",)))
        assert no_key is not None, "an empty text matches"
        feed.read_match(no_key)
        return True

    def _key(self, call: Call) -> Steps[str]:
        """Read the head of an argument and return its key."""
        feed = call.feed
        has_key = feed.match(after_space((GLM_KEY,))) is not None
        head = yield from feed.peek(_ARGUMENT, _MAYBE_ARGUMENT if has_key else None)
        if head is None:
            head = next(filter(None, map(feed.match, _SLIPS)), None)
            if head is None or not call.writer.may_take(head[1].strip()):
                raise feed.broken()
        feed.read_match(head)
        return head[1].strip()

    def _read_argument(self, call: Call, key: str) -> Steps[None]:
        yield from call.writer.read(partial(self.read_value, call), key)

    def is_end(self, call: Call) -> bool:
        if self._is_call(call):
            return True
        damaged = call.feed.match(_DAMAGED_END)
        if damaged is not None and call.is_declared(damaged[2]) and not self._has_mark(damaged[1]):
            raise Damaged
        argument = call.feed.match(_NO_KEY)
        if argument is None:
            return False
        key = argument[1]
        is_clean = "<" not in key and ">" not in key
        if call.writer.is_described:
            is_damaged = call.writer.ends_with_name(key)
        else:
            is_damaged = not self._has_mark(key)
        if is_damaged and not is_clean:
            raise Damaged
        return is_clean and call.writer.may_take(key)

    def is_bound(self, call: Call, found: str) -> bool:
        if found.endswith(GLM_CALL_END):
            return self._is_call(call) or is_last_mark(call.feed, found)
        argument = call.feed.match(_NEXT_ARGUMENT)
        return argument is not None and call.writer.may_take(argument[1].strip())

    def _has_mark(self, text: str) -> bool:
        return any(mark in text for mark in self.markers)

    def _is_call(self, call: Call) -> bool:
        head = call.feed.match(_CALL)
        return head is not None and call.is_declared(head[1])


def _name_and_key(head: re.Match[str], schemas: Mapping[str, object]) -> tuple[str, str]:
    """Return the name of a declared tool and the key after it, separated or not."""
    text, key = head[1], head[2]
    if key is not None and text in schemas:
        return text, key
    for name in sorted(schemas, key=len, reverse=True):
        if key is None and text.startswith(name) and text != name:
            return name, text[len(name) :]
    raise Damaged
