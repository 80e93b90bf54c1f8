"""Regular expressions of JSON schemas, rewritten for llguidance.

JSON Schema's `pattern` is a search with the syntax of ECMA 262. llguidance matches whole texts with
the syntax of Rust's `regex`, without anchors, look-around and back-references.
"""

from __future__ import annotations

import re
from functools import lru_cache

from fd_dsa.errors import shorten

ANY_TEXT = "(?s:.*)"
MAX_PATTERN_CHARS = 1_000
_MAX_NAME_CHARS = 128
_MAX_BRANCHES = 64
# limit for the atoms of all alternatives while groups are expanded, about 2 ms
_MAX_WORK = 16_000
_CLASSES = {"d": "0-9", "w": "A-Za-z0-9_"}
# escapes with the same meaning in Rust, Python and ECMA 262
_SAME_ESCAPES = frozenset("dDwWsSnrtfv") | frozenset(r"\/^$.|?*+()[]{}-\"'#&~ @%!,:;=<>_`")
_HEX = re.compile(r"\\(?:x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4})")
_QUANTIFIER = re.compile(r"[*+?]|\{[0-9]+(?:,[0-9]*)?\}")

_DAY = (
    r"[1-9][0-9]{3}-(?:02-(?:0[1-9]|1[0-9]|2[0-8])|(?:0[469]|11)-(?:0[1-9]|[12][0-9]|30)"
    r"|(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01]))"
)
_ZONE = "(?:Z|[+-](?:0[0-9]|1[0-3]):[0-5][0-9])"
_TIME = rf"(?:[01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](?:\.[0-9]{{1,9}})?{_ZONE}"
_BYTE = "(?:25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])"
_LABEL = "[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
_H16 = "[0-9a-fA-F]{1,4}"
_N = "[0-9]{1,6}"
_DAYS = f"(?:{_N}Y(?:{_N}M(?:{_N}D)?)?|{_N}M(?:{_N}D)?|{_N}D)"
_SECONDS = f"(?:{_N}H(?:{_N}M(?:{_N}S)?)?|{_N}M(?:{_N}S)?|{_N}S)"

FORMATS: dict[str, str] = {
    "date": _DAY,
    "time": _TIME,
    "date-time": f"{_DAY}T{_TIME}",
    "duration": f"P(?:{_N}W|{_DAYS}(?:T{_SECONDS})?|T{_SECONDS})",
    "email": rf"[A-Za-z0-9_+-]+(?:\.[A-Za-z0-9_+-]+)*@{_LABEL}(?:\.{_LABEL})+",
    "hostname": rf"{_LABEL}(?:\.{_LABEL})*",
    "ipv4": rf"{_BYTE}(?:\.{_BYTE}){{3}}",
    "ipv6": f"(?:(?:{_H16}:){{7}}{_H16}|(?:{_H16}:){{1,6}}:|::(?:{_H16}:){{0,5}}{_H16})",
    "uuid": "[0-9a-fA-F]{8}(?:-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}",
    "uri": r"[A-Za-z][A-Za-z0-9+.-]*:(?:[A-Za-z0-9._~/?#@!$&'()*+,;=:-]|%[0-9a-fA-F]{2})+",
}
"""Enforced formats, each as a regex of the whole text.

Other formats are annotations.
"""


def full_regex(pattern: str) -> str:
    """Return a regex of all texts that contain a match of a JSON Schema pattern.

    Raises:
        ValueError: llguidance lacks a feature of the pattern, or the pattern is too long.
    """
    if len(pattern) > MAX_PATTERN_CHARS:
        raise ValueError(f"got {len(pattern)} characters; at most {MAX_PATTERN_CHARS} are allowed")
    branches = [_anchored(branch) for branch in _expanded(_pieces(pattern))]
    return branches[0] if len(branches) == 1 else f"(?:{'|'.join(branches)})"


def matches(pattern: str, name: str) -> bool:
    """Return True if a name contains a match of a pattern.

    Raises:
        ValueError: the comparison could be slow, for example because of nested quantifiers.
    """
    if len(pattern) > MAX_PATTERN_CHARS or len(name) > _MAX_NAME_CHARS:
        raise ValueError(f"got {shorten(pattern)}; it or the name {shorten(name)} is too long")
    pieces = _pieces(pattern)
    quantified = [pieces[i - 1] for i, piece in enumerate(pieces) if i and _is_quantifier(piece)]
    max_quantified = 2 if pieces[:1] == ["^"] and "|" not in pieces else 1
    if ")" in quantified or len(quantified) > max_quantified:
        raise ValueError(
            f"got {shorten(pattern)}, which has too many quantifiers to be compared with names"
        )
    try:
        return re.search("".join(pieces), name) is not None
    except re.error as error:
        raise ValueError(
            f"got {shorten(pattern)}, which is no regular expression: {error}"
        ) from error


def _is_quantifier(piece: str) -> bool:
    return len(piece) < 20 and _QUANTIFIER.fullmatch(piece) is not None


@lru_cache(512)
def _pieces(pattern: str) -> list[str]:
    """Split a pattern into atoms and operators, in a syntax shared by Rust and Python."""
    pieces: list[str] = []
    at = 0
    while at < len(pattern):
        char = pattern[at]
        if char == "\\":
            piece, at = _escape(pattern, at, in_class=False)
        elif char == "[":
            piece, at = _class(pattern, at)
        elif char == "(":
            piece, at = _group(pattern, at)
        elif char == "{" and (match := _QUANTIFIER.match(pattern, at)) is not None:
            piece, at = match[0], match.end()
        else:
            # other braces are literal characters in ECMA 262
            piece, at = ("\\" + char if char in "{}" else char), at + 1
        if _is_quantifier(piece) and pieces and _is_quantifier(pieces[-1]):
            if piece != "?":
                raise ValueError(
                    f"got {shorten(pattern)}, which has a quantifier after a quantifier"
                )
            # a lazy quantifier matches the same texts
            continue
        pieces.append(piece)
    return pieces


def _escape(pattern: str, at: int, in_class: bool) -> tuple[str, int]:
    """Read an escape, and return it and the position after it."""
    match = _HEX.match(pattern, at)
    if match is not None:
        return f"\\x{int(match[0][2:], 16):02x}" if len(match[0]) == 4 else match[0], match.end()
    name = pattern[at + 1 : at + 2]
    if name in _CLASSES:
        return (_CLASSES[name] if in_class else f"[{_CLASSES[name]}]"), at + 2
    if not name or name not in _SAME_ESCAPES:
        raise ValueError(f"got {shorten(pattern)}, whose \\{name} is not supported")
    # Python and Rust have more escapes than the punctuation that needs one
    return ("\\" + name if name.isalnum() else re.escape(name)), at + 2


def _class(pattern: str, at: int) -> tuple[str, int]:
    """Read a character class, and return it and the position after it."""
    begin = at
    at += 1
    parts = ["["]
    if pattern[at : at + 1] == "^":
        parts.append("^")
        at += 1
    while at < len(pattern) and pattern[at] != "]":
        char = pattern[at]
        if char == "\\":
            part, at = _escape(pattern, at, in_class=True)
        else:
            # a hyphen makes a range; other operators of Rust's classes are literal characters here
            part, at = ("\\" + char if char in "[&~^|" else char), at + 1
            if part == "-" and parts[-1] == "-":
                part = "\\-"
        parts.append(part)
    if at == len(pattern) or len(parts) == 1 + ("^" in parts[1:2]):
        raise ValueError(f"got {shorten(pattern)}, whose class at {begin} is empty or not closed")
    return "".join([*parts, "]"]), at + 1


def _group(pattern: str, at: int) -> tuple[str, int]:
    """Read the start of a group, and return it and the position after it."""
    if pattern.startswith("(?:", at) or not pattern.startswith("(?", at):
        return "(?:", at + (3 if pattern.startswith("(?", at) else 1)
    name = re.compile(r"\(\?P?<[A-Za-z]\w*>").match(pattern, at)
    if name is None:
        raise ValueError(f"got {shorten(pattern)}; look-around and flags are not supported")
    return "(?:", name.end()


def _expanded(pieces: list[str]) -> list[list[str]]:
    """Return alternatives of a pattern that have ^ and $ only at their ends.

    A group at an end is replaced by its alternatives if it contains an anchor.
    """
    done = []
    todo = _top_level(pieces)
    work = 0
    while todo:
        branch = todo.pop(0)
        work += len(branch)
        begin, end = branch[:1] == ["^"], branch[-1:] == ["$"]
        inner = branch[begin : len(branch) - end]
        size = _group_size(inner)
        last = len(inner) - _group_size(inner[::-1])
        is_quantified = any(map(_is_quantifier, inner[size : size + 1]))
        if not begin and _has_anchor(inner[:size]) and not is_quantified:
            groups = _top_level(inner[1 : size - 1])
            todo += [[*each, *inner[size:], *branch[len(branch) - end :]] for each in groups]
        elif not end and _has_anchor(inner[last:]):
            groups = _top_level(inner[last + 1 : -1])
            todo += [[*branch[:begin], *inner[:last], *each] for each in groups]
        else:
            done.append(branch)
        if len(todo) + len(done) > _MAX_BRANCHES or work > _MAX_WORK:
            raise ValueError(
                f"got {shorten(''.join(pieces))}, which has too many alternatives or groups with "
                "^ or $"
            )
    return done


def _has_anchor(pieces: list[str]) -> bool:
    return "^" in pieces or "$" in pieces


def _group_size(pieces: list[str]) -> int:
    """Return the number of pieces in the group at the beginning, 0 without a group.

    Reversed pieces are accepted too.
    """
    depth = 0
    for number, piece in enumerate(pieces, 1):
        depth += (piece == "(?:") - (piece == ")")
        if not depth:
            return number if number > 1 else 0
    return 0


def _top_level(pieces: list[str]) -> list[list[str]]:
    """Return the alternatives outside all groups."""
    branches: list[list[str]] = [[]]
    depth = 0
    for piece in pieces:
        depth += (piece == "(?:") - (piece == ")")
        if piece == "|" and not depth:
            branches.append([])
        else:
            branches[-1].append(piece)
    return branches


def _anchored(pieces: list[str]) -> str:
    """Return a regex of whole texts for one alternative of a search."""
    begin = pieces[:1] == ["^"]
    end = pieces[-1:] == ["$"] and len(pieces) > begin
    inner = pieces[begin : len(pieces) - end]
    if "^" in inner or "$" in inner:
        raise ValueError(
            f"got {shorten(''.join(pieces))}; ^ and $ are supported at the ends of alternatives "
            "only"
        )
    return ("" if begin else ANY_TEXT) + "".join(inner) + ("" if end else ANY_TEXT)
