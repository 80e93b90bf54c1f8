"""JSON text of values that may be large."""

from __future__ import annotations

import json
import re

from fd_dsa.cancellation import check_cancelled

# pieces between two checks of the client
_CHECKED_PIECES = 4096
_SURROGATE = re.compile("[\ud800-\udfff]")
NOT_UNICODE = "the text holds half of a surrogate pair, which is no valid Unicode"
"""Reason for the refusal of a text that is not `is_unicode`."""


def is_unicode(text: str) -> bool:
    """Return True if no character of a text is half of a surrogate pair."""
    return text.isascii() or not _SURROGATE.search(text)


def json_start(value: object, max_chars: int, *, ensure_ascii: bool = False) -> str:
    """Return the JSON text of a value, or only its beginning if it is long.

    The text ends with the first piece beyond `max_chars` characters, so the rest of the value is
    not encoded.

    Raises:
        RecursionError, TypeError, ValueError: the value has no JSON text.
    """
    pieces = []
    num_chars = 0
    for number, piece in enumerate(json.JSONEncoder(ensure_ascii=ensure_ascii).iterencode(value)):
        if not number % _CHECKED_PIECES:
            check_cancelled()
        pieces.append(piece)
        num_chars += len(piece)
        if num_chars > max_chars:
            break
    return "".join(pieces)


def shortened_json(value: object, max_chars: int) -> str:
    """Return the JSON text of a value for a message, cut by "..." after `max_chars`.

    Raises:
        RecursionError, TypeError, ValueError: see `json_start`.
    """
    head = value[: max_chars + 1] if isinstance(value, str) else value
    text = json_start(head, max_chars)
    return text if len(text) <= max_chars else text[:max_chars] + "..."
