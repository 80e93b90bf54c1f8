"""Numbers, texts and patterns of JSON schemas that llguidance enforces exactly.

It reads numbers as doubles, and leaves most control characters out of texts.
"""

from __future__ import annotations

import math
import re
from decimal import ROUND_DOWN, Context, Decimal

from fd_dsa.chat.json_text import shortened_json

LOWER, UPPER = ("minimum", "exclusiveMinimum"), ("maximum", "exclusiveMaximum")
_MAX_EXACT = 2**53
# the largest int64 of 15 digits
_MAX_INT64 = 9_223_372_036_854_770_000
_MAX_SHOWN = 60
# control characters that JSON writes by number, and DEL
_LEFT_OUT_CLASS = r"[\x00-\x07\x0b\x0e-\x1f\x7f]"
_LEFT_OUT = re.compile(_LEFT_OUT_CLASS)
_HEX = "[0-9a-fA-F]"
# an escape of Rust's `regex`, the beginning of a class, or another character
_REGEX_PART = re.compile(
    rf"\\(?:x({_HEX}{{2}})|u({_HEX}{{4}})|[xuU]\{{0*({_HEX}{{1,5}})\}}|[pP]\{{[^}}]*\}}|[pP].|.)"
    r"|\[\^?\]?|.",
    re.DOTALL,
)
_CONTROLS = {r"\a": "\a", r"\v": "\v"}


def inner_bound(keyword: str, value: float) -> float:
    """Return a bound of numbers, moved towards zero if it is beyond exact doubles.

    Raises:
        ValueError: the bound leaves only numbers beyond exact doubles, or is not finite.
    """
    if abs(value) < _MAX_EXACT:
        return value
    if (value < 0) != (keyword in LOWER) or not _is_finite(value):
        raise _beyond(value)
    moved = int(Context(prec=15, rounding=ROUND_DOWN).create_decimal(Decimal(abs(value))))
    size = min(max(moved, _MAX_EXACT - 1), _MAX_INT64)
    return -size if value < 0 else size


def check_constant(value: object) -> None:
    """Raise ValueError for a value in `const` or `enum` of which llguidance makes another one.

    Such values are numbers that doubles do not hold, and texts with control characters. The parser
    of bodies makes doubles of integers above 64 bits, so these are refused as well.
    """
    if isinstance(value, str) and (found := _LEFT_OUT.search(value)):
        raise _left_out(f"{shortened_json(value, _MAX_SHOWN)} has", found[0])
    if not isinstance(value, int | float):
        return
    if not _is_finite(value) or (abs(value) > _MAX_EXACT and value == int(value)):
        raise _beyond(value)


def exact_pattern(pattern: str) -> str:
    """Return a regex without the characters that llguidance leaves out of texts.

    llguidance takes a class of all control characters, such as `[^"]`, for one that also has
    quotation marks and backslashes.

    Args:
        pattern: a regex in Rust's syntax. A malformed one may be returned as it is.

    Raises:
        ValueError: the pattern has such a character outside of classes.
    """
    made, depth = list[str](), 0
    for match in _REGEX_PART.finditer(pattern):
        part = match[0]
        code = match[1] or match[2] or match[3]
        char = chr(int(code, 16)) if code else _CONTROLS.get(part, part)
        if part[0] == "[":
            made.append(part if depth else f"[{part}")
            depth += 1
        elif part == "]" and depth:
            depth -= 1
            made.append(part if depth else f"]--{_LEFT_OUT_CLASS}]")
        elif not depth and _LEFT_OUT.fullmatch(char):
            raise _left_out("got", char)
        elif not depth and part[:2] in (r"\p", r"\P"):
            made.append(f"[{part}--{_LEFT_OUT_CLASS}]")
        else:
            made.append(part)
    return pattern if depth else "".join(made)


def _left_out(beginning: str, char: str) -> ValueError:
    which = f"the control character U+{ord(char):04X}, which a grammar cannot enforce"
    return ValueError(f"{beginning} {which}")


def _is_finite(value: float) -> bool:
    # an integer may be too large for isfinite
    return isinstance(value, int) or math.isfinite(value)


def _beyond(value: float) -> ValueError:
    shown = shortened_json(value, _MAX_SHOWN)
    return ValueError(f"{shown} is beyond the integers that doubles hold")
