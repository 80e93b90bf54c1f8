"""Numbers and texts of JSON schemas that llguidance enforces exactly.

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
_LEFT_OUT = re.compile(r"[\x00-\x07\x0b\x0e-\x1f\x7f]")


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
        raise ValueError(
            f"{shortened_json(value, _MAX_SHOWN)} has the control character "
            f"U+{ord(found[0]):04X}, which a grammar cannot enforce"
        )
    if not isinstance(value, int | float):
        return
    if not _is_finite(value) or (abs(value) > _MAX_EXACT and value == int(value)):
        raise _beyond(value)


def _is_finite(value: float) -> bool:
    # an integer may be too large for isfinite
    return isinstance(value, int) or math.isfinite(value)


def _beyond(value: float) -> ValueError:
    shown = shortened_json(value, _MAX_SHOWN)
    return ValueError(f"{shown} is beyond the integers that doubles hold")
