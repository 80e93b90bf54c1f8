"""Values of flags, from their texts; argparse shows the refusals after the name of the flag."""

from __future__ import annotations

import argparse

from fd_dsa.config import parse_bytes
from fd_dsa.errors import ConfigError


def integer(text: str) -> int:
    """A whole number; its range is checked by the engine's configuration."""
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"got {text!r}; allowed is a whole number") from None


def number(text: str) -> float:
    """A number; its range is checked by the engine's configuration."""
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"got {text!r}; allowed is a number") from None


def positive(text: str) -> int:
    """A whole number of at least 1."""
    if not (text.isascii() and text.isdigit() and int(text) >= 1):
        raise argparse.ArgumentTypeError(f"got {text!r}; allowed is a whole number from 1 on")
    return int(text)


def size(text: str) -> int:
    """A size of at least one byte."""
    try:
        size = parse_bytes(text)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    if size < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}; allowed is 1 byte or more")
    return size


def host(text: str) -> str:
    """A name or an address; for the system an empty one, as of an unset variable, is every one."""
    if not text.strip():
        raise argparse.ArgumentTypeError(
            f"got {text!r}; allowed is a name or an address, 0.0.0.0 for all interfaces"
        )
    return text


def host_name(text: str) -> str:
    """A name or an address as the Host header has it, without a port."""
    if not text or "/" in text or text.count(":") == 1 or any(char.isspace() for char in text):
        raise argparse.ArgumentTypeError(f"got {text!r}; allowed is a name without a port, or *")
    return text


def key(text: str) -> str:
    """A key that a header can carry; an empty one, as of an unset variable, would be no secret."""
    if not text or any(char.isspace() or not char.isprintable() for char in text):
        raise argparse.ArgumentTypeError("allowed is a text of one character or more, none a space")
    return text


def port(text: str) -> int:
    """A TCP port."""
    if not (text.isascii() and text.isdigit() and int(text) <= 65535):
        raise argparse.ArgumentTypeError(f"got {text!r}; allowed is 0..65535")
    return int(text)


def seconds(text: str) -> float:
    """A duration."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"got {text!r}; allowed is a number of seconds, 0 or more")
    return value
