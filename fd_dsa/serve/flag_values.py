"""Values of flags, from their texts; argparse shows the refusals after the name of the flag."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from typing import TypeVar

from fd_dsa.config import parse_bytes
from fd_dsa.errors import ConfigError

_T = TypeVar("_T")


def _reader(
    read: Callable[[str], _T], rule: str, is_allowed: Callable[[_T], object] = lambda _: True
) -> Callable[[str], _T]:
    """A type of argparse.

    Args:
        read: of a text; raises ValueError.
        rule: what is allowed, for the message.
        is_allowed: whether a value is.
    """

    def parse(text: str) -> _T:
        try:
            value = read(text)
            if is_allowed(value):
                return value
        except ValueError:
            pass
        raise argparse.ArgumentTypeError(f"got {text!r}; allowed is {rule}")

    return parse


def _digits(text: str) -> int:
    """A whole number without a sign."""
    if not (text.isascii() and text.isdigit()):
        raise ValueError
    return int(text)


def _is_host_name(text: str) -> bool:
    """Whether a text can be the host of a Host header, without a port."""
    return bool(text) and not (
        "/" in text or text.count(":") == 1 or any(char.isspace() for char in text)
    )


# the engine's configuration checks the ranges of these two
integer = _reader(int, "a whole number")
number = _reader(float, "a number")
positive = _reader(_digits, "a whole number from 1 on", lambda value: value >= 1)
port = _reader(_digits, "0..65535", lambda value: value <= 65535)
seconds = _reader(float, "a number of seconds, 0 or more", lambda value: 0 <= value < math.inf)
# for the system an empty name, as of an unset variable, is every interface
host = _reader(str, "a name or an address, 0.0.0.0 for all interfaces", str.strip)
host_name = _reader(str, "a name without a port, or *", _is_host_name)


def size(text: str) -> int:
    """A size of at least one byte."""
    try:
        num_bytes = parse_bytes(text)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    if num_bytes < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}; allowed is 1 byte or more")
    return num_bytes


def key(text: str) -> str:
    """A key that a header can carry; an empty one, as of an unset variable, would be no secret."""
    if not text or any(char.isspace() or not char.isprintable() for char in text):
        raise argparse.ArgumentTypeError("allowed is a text of one character or more, none a space")
    return text
