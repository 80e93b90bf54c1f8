"""Values in Python's notation, which models write where a tool's schema wants JSON."""

from __future__ import annotations

import json
import re
from collections.abc import Set

from fd_dsa.chat.schema import type_of

_INTEGER = re.compile(r"[+-]?[0-9]{1,30}")
_NUMBER = re.compile(
    r"[+-]?(?:[0-9]{1,30}(?:\.[0-9]{0,30})?|\.[0-9]{1,30})(?:[eE][+-]?[0-9]{1,2})?"
)
_BOOLEANS = {"true": "true", "1": "true", "false": "false", "0": "false"}
_CONSTANTS = {"True": "true", "False": "false", "None": "null"}
# Strings come first, so that the words inside them are no constants. One without an end is a token
# too, so that each character is read once.
_TOKEN = re.compile(r"""'((?:[^'\\\n]|\\.)*)('?)|"(?:[^"\\\n]|\\.)*"?|\b(?:True|False|None)\b""")
_QUOTE = re.compile(r"""\\'|\\.|\"""")


def loose_json(text: str, types: Set[str]) -> str | None:
    """Return the JSON of a value in another notation, or None for a value of other types.

    Booleans have any case, or are 1 and 0. Numbers may have a plus, leading zeros, or no digit on a
    side of the point. Lists, dicts and None are Python's.

    Args:
        text: the value, without white space around it.
        types: JSON Schema's types that the value may have.
    """
    if "integer" in types or "number" in types:
        if _INTEGER.fullmatch(text):
            return str(int(text))
        if "number" in types and _NUMBER.fullmatch(text):
            return json.dumps(float(text))
    if "boolean" in types and text.lower() in _BOOLEANS:
        return _BOOLEANS[text.lower()]
    converted = _TOKEN.sub(_as_json, text)
    return converted if type_of(converted) in types else None


def _as_json(token: re.Match[str]) -> str:
    """Return the JSON of a string in single quotes or of a constant. Other strings stay."""
    if not token[2]:
        return _CONSTANTS.get(token[0], token[0])
    return f'"{_QUOTE.sub(_escaped, token[1])}"'


def _escaped(found: re.Match[str]) -> str:
    """Return a quote as in a JSON string. Other escapes stay."""
    return {"\\'": "'", '"': '\\"'}.get(found[0], found[0])
