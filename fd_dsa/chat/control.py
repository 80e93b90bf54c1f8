"""Prompts in which only the template writes control tokens.

A tokenizer reads the marker of a control token, such as `<|user|>`, in any part of a prompt. So a
client's text with this marker would begin a message of another role. `render_prompt` quotes each
marker in such texts before the template runs: it puts one private character before and one after
each character of the marker. These two characters occur in no other text of the conversation, and
template filters keep them. After rendering they show which markers the client wrote, and are
removed.
"""

from __future__ import annotations

import functools
import heapq
import itertools
import random
import re
from array import array
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import StringIO
from typing import Any, Protocol

from fd_dsa.cancellation import cancellable, check_cancelled
from fd_dsa.chat.parser import Arguments, split_reasoning
from fd_dsa.chat.sandbox import OverBudget
from fd_dsa.chat.template import ChatTemplate, with_read_arguments

MASK = "¤"
"""Replaces each character of a quoted marker. No marker or normalizer affects it."""
QUOTED_CHARS = 3
"""Number of characters of a quoted character."""
SEPARATOR = "\ufdd0"
"""Separates texts that are searched together, each normalized as its own text."""
# U+E000 and U+E001 mark the place where a final message continues
_PRIVATE = [chr(code) for code in range(0xE002, 0xF900)]
# a private character, escaped as in JSON and Python literals
_ESCAPED = re.compile("u([ef][0-9a-f]{3})")
# random, so that no client can predict the quoting characters
_random = random.SystemRandom()

# number of characters unquoted together; each takes 100 bytes of memory
_CHUNK_CHARS = 1 << 16
_Spans = array
"""Half-open ranges of characters, in order, as a flat array."""


class ControlFinder(Protocol):
    """Finds markers of control tokens as a tokenizer does."""

    def find(self, text: str) -> Iterator[tuple[int, int]]:
        """Yield the ranges of the markers. Each `SEPARATOR` begins another text."""

    def texts_in(self, text: str) -> Collection[str]:
        """Return the distinct markers in a text. Faster than `find`."""


@dataclass(frozen=True)
class RenderedPrompt:
    """The text of a prompt.

    Attributes:
        text: the text as the template wrote it.
        masked: text of the same length, in which `MASK` replaces each character of a quoted marker.
            The remaining markers are control tokens.
    """

    text: str
    masked: str


def render_prompt(
    renderer: ChatTemplate,
    control: ControlFinder | None,
    messages: Sequence[Mapping[str, object]],
    add_generation_prompt: bool = True,
    /,
    *,
    tools: Sequence[Mapping[str, object]] | None = None,
    continue_final_message: bool = False,
    **variables: object,
) -> RenderedPrompt:
    """Render a conversation.

    Everything in messages, tools and variables is text, except the roles. If a message of the
    assistant begins with <think>, this marker and the next </think> count as markers.

    Args:
        control: finds markers. None = all markers are control tokens, also those in texts of
            clients.
        renderer, messages to variables: as in `ChatTemplate.render`.

    Raises:
        ValueError: as in `ChatTemplate.render`, or texts with markers use up the characters that
            quote them.
    """
    read = [with_read_arguments(message) for message in messages]
    if control is None:
        text = renderer.render(
            read,
            add_generation_prompt,
            tools=tools,
            continue_final_message=continue_final_message,
            **variables,
        )
        return RenderedPrompt(text, text)
    conversation = _Conversation(read, tools, variables, continue_final_message)

    def render(marks: Mapping[str, _Spans[int]]) -> RenderedPrompt:
        return conversation.render(renderer, add_generation_prompt, marks)

    inside = _find_markers(control, conversation.texts)
    prompt = render(inside)
    # adjacent texts may form a marker together with the template
    markers = control.texts_in(prompt.masked)
    for overlaps in _overlaps(conversation.texts, markers):
        try:
            checked = render({**overlaps, **_joined(inside, overlaps)})
        except OverBudget:
            # a prompt is refused if it could not be checked
            raise
        except ValueError:
            continue
        # texts differ if the template itself reads the quoting characters
        if checked.text == prompt.text:
            found, before = control.find(checked.masked), control.find(prompt.masked)
            is_changed = any(a != b for a, b in itertools.zip_longest(found, before))
            return checked if is_changed else prompt
    return prompt


class _Conversation:
    """Messages, tools and variables of one prompt.

    Attributes:
        texts: distinct texts in it, with field names but without roles.
    """

    def __init__(
        self,
        messages: Sequence[Mapping[str, object]],
        tools: Sequence[Mapping[str, object]] | None,
        variables: Mapping[str, object],
        goes_on: bool,
    ) -> None:
        self._messages = messages
        self._tools = tools
        self._variables = variables
        self._goes_on = goes_on
        values: list[Any] = [list(variables.values()), tools]
        for message in messages:
            written = self._written_fields(message)
            values += (value for name, value in message.items() if name not in written)
            values += (text for parts in written.values() for text in parts[1::2])
            values += message.keys()
        self.texts = list(dict.fromkeys(texts_in(*values)))

    def render(
        self, renderer: ChatTemplate, add_generation_prompt: bool, marks: Mapping[str, _Spans[int]]
    ) -> RenderedPrompt:
        """Render with the markers at these ranges quoted."""
        messages, tools, variables = self._messages, self._tools, self._variables
        begin = end = ""
        if marks:
            begin, end = unused_characters([*self.texts, renderer.source], 2)
            quoted = {text: _quote(text, spans, begin, end) for text, spans in marks.items()}
            try:
                messages = [self._change_message(message, quoted) for message in messages]
                tools, variables = _change(tools, quoted), _change(variables, quoted)
            except RecursionError as error:
                raise ValueError("the values nest too deeply; send flatter ones") from error
        try:
            text = renderer.render(
                messages,
                add_generation_prompt,
                tools=tools,
                continue_final_message=self._goes_on,
                **variables,
            )
        except OverBudget:
            raise
        except ValueError as error:
            raise ValueError(_unquote(str(error), begin, end).text) from error
        return _unquote(text, begin, end)

    def _written_fields(self, message: Mapping[str, object]) -> dict[str, tuple[str, ...]]:
        """Return the fields with markers that count, as alternating markers and texts."""
        role = message.get("role")
        fields: dict[str, tuple[str, ...]] = {"role": (role,)} if isinstance(role, str) else {}
        if role == "assistant":
            parts = split_reasoning(message.get("content"))
            goes_on = self._goes_on and message is self._messages[-1]
            if len(parts) > 2 or (parts and goes_on):
                fields["content"] = parts
        return fields

    def _change_message(
        self, message: Mapping[str, object], changes: Mapping[str, str]
    ) -> dict[str, Any]:
        written = self._written_fields(message)
        changed: dict[str, Any] = {}
        # keep the order, because a template may iterate the fields
        for name, value in message.items():
            parts = list(written.get(name, ()))
            parts[1::2] = [changes.get(part, part) for part in parts[1::2]]
            changed[changes.get(name, name)] = "".join(parts) if parts else _change(value, changes)
        return changed


def texts_in(*values: object, with_names: bool = True) -> Iterator[str]:
    """Yield all texts in JSON values.

    Args:
        with_names: also yield the names of fields.
    """
    # iterative, because arguments of a call may nest as deeply as a JSON parser allows
    todo = list(values)
    while todo:
        value = todo.pop()
        if isinstance(value, str):
            yield value
        elif isinstance(value, Mapping):
            todo += cancellable(value.values())
            if with_names:
                yield from value
            if isinstance(value, Arguments):
                yield str(value)
        elif isinstance(value, list | tuple):
            todo += (entry for entry in cancellable(value) if not isinstance(entry, int | float))


def _change(value: object, changes: Mapping[str, str]) -> Any:
    """Return a JSON value with texts and field names replaced."""
    if isinstance(value, str):
        return changes.get(value, value)
    if isinstance(value, Mapping):
        items = cancellable(value.items())
        changed = {_change(name, changes): _change(v, changes) for name, v in items}
        if isinstance(value, Arguments):
            return Arguments(changed, _change(str(value), changes))
        return changed
    if isinstance(value, list | tuple):
        return [_change(entry, changes) for entry in cancellable(value)]
    return value


def _find_markers(control: ControlFinder, texts: Sequence[str]) -> dict[str, _Spans[int]]:
    """Return the ranges of whole markers by text, without texts that have no marker."""
    # search all texts together, because most conversations have no marker
    joined = SEPARATOR.join(texts)
    found: dict[str, _Spans[int]] = {}
    spans = control.find(joined) if control.texts_in(joined) else iter(())
    span = next(spans, None)
    begin = 0
    for text in cancellable(texts):
        end = begin + len(text)
        while span is not None and span[0] < end:
            place = max(span[0] - begin, 0), min(span[1], end) - begin
            found.setdefault(text, array("q")).extend(place)
            span = next(spans, None)
        begin = end + len(SEPARATOR)
    return found


def _overlaps(texts: Sequence[str], markers: Collection[str]) -> Iterator[dict[str, _Spans[int]]]:
    """Yield the ranges of stripped texts that may be a part of one of the markers.

    Yields:
        The ranges with texts from the middle of a marker, then the ranges without them. Only
        non-empty ones.
    """
    heads, tails = _parts(frozenset(markers))
    firsts, lasts = {marker[0] for marker in markers}, {marker[-1] for marker in markers}
    longest = max(map(len, markers), default=0)
    if longest < 2:
        return
    borders: dict[str, _Spans[int]] = {}
    inner: dict[str, _Spans[int]] = {}
    for text in cancellable(texts):
        core = text.strip()
        begin, end = text.find(core), text.find(core) + len(core)
        head, tail = core[: longest - 1], core[1 - longest :]
        spans: list[tuple[int, int]] = []
        if not lasts.isdisjoint(head):
            sizes = [size for size in range(1, len(head) + 1) if head[:size] in heads]
            spans += [(begin, begin + size) for size in sizes[-1:]]
        if not firsts.isdisjoint(tail):
            sizes = [size for size in range(1, len(tail) + 1) if tail[-size:] in tails]
            spans += [(end - size, end) for size in sizes[-1:]]
        if spans:
            borders[text] = _merge(spans)
        elif core and len(core) < longest and any(core in marker for marker in markers):
            inner[text] = array("q", (begin, end))
    if inner:
        yield {**borders, **inner}
    if borders:
        yield borders


@functools.lru_cache(16)
def _parts(markers: frozenset[str]) -> tuple[set[str], set[str]]:
    """Return the texts that end a marker, and those that begin one."""
    heads = {marker[begin:] for marker in markers for begin in range(1, len(marker))}
    tails = {marker[:end] for marker in markers for end in range(1, len(marker))}
    return heads, tails


def _joined(
    inside: Mapping[str, _Spans[int]], overlaps: Mapping[str, _Spans[int]]
) -> dict[str, _Spans[int]]:
    """Merge both kinds of ranges for the texts that have whole markers."""
    return {
        text: _merge(heapq.merge(_pairs(spans), _pairs(overlaps[text])))
        if text in overlaps
        else spans
        for text, spans in inside.items()
    }


def _pairs(spans: _Spans[int]) -> Iterator[tuple[int, int]]:
    numbers = iter(spans)
    return zip(numbers, numbers, strict=True)


def _merge(spans: Iterable[tuple[int, int]]) -> _Spans[int]:
    """Return the ranges in order, with overlapping ones merged."""
    merged: _Spans[int] = array("q")
    for begin, end in spans:
        if merged and begin < merged[-1]:
            merged[-1] = max(end, merged[-1])
        else:
            merged.extend((begin, end))
    return merged


def _quote(text: str, spans: _Spans[int], begin: str, end: str) -> str:
    """Put `begin` and `end` around each character of these ranges."""
    check_cancelled()
    quoted, last = StringIO(), 0
    for first, stop in _pairs(spans):
        between = f"{end}{begin}".join(text[first:stop])
        quoted.write(f"{text[last:first]}{begin}{between}{end}")
        last = stop
    quoted.write(text[last:])
    return quoted.getvalue()


def _unquote(text: str, begin: str, end: str) -> RenderedPrompt:
    """Remove the quoting characters from a text, and mask the quoted ones."""
    if not begin:
        return RenderedPrompt(text, text)
    for mark in (begin, end):
        # undo the escapes of JSON and Python literals
        text = text.replace(f"\\u{ord(mark):04x}", mark)
    plain, masked = StringIO(), StringIO()
    start = 0
    while start < len(text):
        check_cancelled()
        stop = text.find(begin, start + _CHUNK_CHARS)
        stop = len(text) if stop < 0 else stop
        first, *pieces = text[start:stop].split(begin)
        plain.write("".join([first, *pieces]).replace(end, ""))
        pieces = [MASK if len(p) == 2 and p[1] == end else _mask(p, end) for p in pieces]
        masked.write("".join([first, *pieces]).replace(end, ""))
        start = stop
    return RenderedPrompt(plain.getvalue(), masked.getvalue())


def _mask(piece: str, end: str) -> str:
    """Return the text after a quoting character, masked up to the next one."""
    # a filter may have escaped the quoted character (longer) or removed it (empty)
    quoted, found, after = piece.partition(end)
    return MASK * len(quoted) + after if found else piece


def unused_characters(texts: Iterable[str], count: int) -> list[str]:
    """Return characters that do not occur in the texts, not even escaped.

    Raises:
        ValueError: the texts use too many of Unicode's private characters.
    """
    used: set[str] = set()
    for text in texts:
        check_cancelled()
        used.update(text)
        used.update(chr(int(code, 16)) for code in _ESCAPED.findall(text))
    start = _random.randrange(len(_PRIVATE))
    candidates = (char for char in _PRIVATE[start:] + _PRIVATE[:start] if char not in used)
    free = list(itertools.islice(candidates, count))
    if len(free) < count:
        raise ValueError(
            f"the texts have a marker of a control token and all but {len(free)} of the private "
            f"characters U+E002 to U+F8FF, of which {count} must be unused; leave some out"
        )
    return free
