"""Arguments of a call that are one JSON object, read while it comes."""

from __future__ import annotations

import json
import re
from collections.abc import Callable

from fd_dsa.chat.text_feed import Damaged, Steps, TextFeed

# strings that are complete are read in one go with what is around them
_OUTSIDE = re.compile(r'(?:[\s:,0-9A-Za-z+\-.]|"(?:[^"\\\x00-\x1f]|\\[^\x00-\x1f])*")+|[{}\[\]"]')
_INSIDE = re.compile(r'(?:[^"\\]|\\[^\x00-\x1f])+|"')
_CONTROL = re.compile(r"[\x00-\x1f]")


def read_object(feed: TextFeed, emit: Callable[[str], None]) -> Steps[None]:
    """Read a JSON object, and hand its text out up to the last brace.

    Control characters in strings are escaped, since models write line breaks as they are. The
    last brace is left to the caller, who knows if the object may end there.

    Raises:
        Damaged: the text is no JSON object.
    """
    written: list[str] = []

    def write(text: str) -> None:
        written.append(text)
        emit(text)

    depth, is_inside = 0, False
    while True:
        text = yield from feed.take(_INSIDE if is_inside else _OUTSIDE)
        if not text:
            raise feed.broken()
        if text == '"':
            is_inside = not is_inside
        elif is_inside:
            text = _CONTROL.sub(_escaped, text)
        else:
            depth += (text in "{[") - (text in "}]")
        if not depth:
            break
        write(text)
    try:
        value = json.loads("".join(written) + text, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise Damaged from error
    if not isinstance(value, dict):
        raise Damaged


def _escaped(match: re.Match[str]) -> str:
    return json.dumps(match[0])[1:-1]


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is no JSON")
