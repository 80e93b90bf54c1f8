"""Values of flags from their texts: types of argparse whose refusals name what is allowed."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import TypeVar

from fd_dsa.config import MAX_INTEGER, parse_bytes
from fd_dsa.errors import ConfigError, shorten

MAX_PROMPT_TOKENS = 1 << 28
"""Maximum number of tokens of the prompts that a command makes, about 10 GB in memory."""
_Value = TypeVar("_Value")


def reader(
    read: Callable[[str], _Value],
    rule: str,
    is_allowed: Callable[[_Value], object] = lambda _: True,
) -> Callable[[str], _Value]:
    """Make a type of argparse, which shows its refusals after the name of the flag.

    Args:
        read: makes the value of a text; raises ValueError.
        rule: allowed values, for the message. Integers are at most `MAX_INTEGER`, because
            JSON answers repeat them in 64 bits.
        is_allowed: returns True for an allowed value.
    """

    def parse(text: str) -> _Value:
        allowed = rule
        try:
            value = read(text)
            if isinstance(value, int) and value > MAX_INTEGER:
                allowed = f"at most {MAX_INTEGER}"
            elif is_allowed(value):
                return value
        except ValueError:
            pass
        raise argparse.ArgumentTypeError(f"got {shorten(text)}; must be {allowed}")

    return parse


def digits(text: str) -> int:
    """Read a whole number that has only ASCII digits, or raise ValueError."""
    if not (text.isascii() and text.isdigit()):
        raise ValueError
    return int(text)


def whole_number(text: str) -> int:
    """Read a whole number, which may have a unit as in vLLM: 32k is 32,000 and 32K is 32,768."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([kmg])", text, re.ASCII | re.IGNORECASE)
    if match is None:
        return digits(text)
    base = 1000 if match[2].islower() else 1024
    value = Fraction(match[1]) * base ** (1 + "kmg".index(match[2].lower()))
    if value.denominator != 1:
        raise ValueError
    return int(value)


def number(
    kind: type[float], minimum: float, forms: str = "", maximum: int | None = None
) -> Callable[[str], float]:
    """Make a reader of finite numbers from `minimum` on.

    Args:
        kind: int or float.
        forms: end of the error's line, with other ways to write a number.
        maximum: largest number, or None for no limit.
    """
    read: Callable[[str], float] = whole_number if kind is int else float
    what = "a whole number" if kind is int else "a number"
    if maximum is not None:
        rule = f"{what} from {minimum:g} to {maximum}{forms}"
        return reader(read, rule, lambda x: minimum <= x <= maximum)
    return reader(read, f"{what} from {minimum:g} on{forms}", lambda x: minimum <= x < math.inf)


def check_prompt_tokens(flags: str, num_tokens: int, of: str = "prompts") -> None:
    """Raise ConfigError if all prompts of a command have more than MAX_PROMPT_TOKENS tokens.

    Args:
        of: name of the texts in the error, if they are no prompts.
    """
    if num_tokens > MAX_PROMPT_TOKENS:
        raise ConfigError(
            f"{flags}: {num_tokens} tokens of {of}, allowed: at most {MAX_PROMPT_TOKENS} in all"
        )


def add_numbers(
    parser: argparse._ActionsContainer,
    *rows: tuple[str, type[float], float, float | None, str],
    maxima: Mapping[str, int] | None = None,
) -> None:
    """Add flags that take a number.

    Args:
        rows: name, kind, smallest value, default and help of each flag.
        maxima: largest values of flags that have one.
    """
    for flag, kind, minimum, default, text in rows:
        shown = text if default is None else f"{text} (default: {default:g})"
        metavar = "N" if kind is int else "X"
        read = number(kind, minimum, maximum=(maxima or {}).get(flag))
        parser.add_argument(flag, metavar=metavar, type=read, default=default, help=shown)


_BYTES = (
    "1 byte or more: a number and an optional unit K, M, G or T, for example 8G or 512MiB, "
    "below 2**63"
)
size = reader(parse_bytes, _BYTES, lambda num_bytes: num_bytes >= 1)
