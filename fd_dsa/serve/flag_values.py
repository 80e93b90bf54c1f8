"""What all commands share: values of flags from their texts, and the one line of a failure."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import functools
import math
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from typing import TypeVar

from fd_dsa.config import parse_bytes
from fd_dsa.errors import FdDsaError, RemoteError

EXIT_BAD_START = 2

_T = TypeVar("_T")


def fail(message: str, status: int) -> int:
    """Print the one line of a command that cannot go on; returns its exit status."""
    sys.stderr.write(f"fd_dsa: error: {message}\n")
    return status


def reports_failures(run: Callable[[list[str]], int]) -> Callable[..., int]:
    """The `main` of a command, which takes its arguments, or None for those of the process.

    It returns what `run` does, 1 after a server went away, or 2 for a bad start. Signals are for
    `command`, which is around it.
    """

    @functools.wraps(run)
    def main(argv: Sequence[str] | None = None) -> int:
        try:
            return run(list(sys.argv[1:] if argv is None else argv))
        except RemoteError as error:
            return fail(str(error), 1)
        except BrokenPipeError:
            raise
        except (FdDsaError, OSError) as error:
            return fail(str(error), EXIT_BAD_START)

    return main


def split_flags(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Flags of a command, and those after `--`, which are for a server."""
    words = list(arguments)
    place = words.index("--") if "--" in words else len(words)
    return words[:place], words[place + 1 :]


@contextlib.contextmanager
def signals_call(handle: Callable[[int], None]) -> Iterator[None]:
    """Let SIGINT and SIGTERM call `handle` in the event loop; only the main thread can."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    loop, numbers = asyncio.get_running_loop(), (signal.SIGINT, signal.SIGTERM)
    for number in numbers:
        loop.add_signal_handler(number, handle, number)
    try:
        yield
    finally:
        for number in numbers:
            loop.remove_signal_handler(number)


def reader(
    read: Callable[[str], _T], rule: str, is_allowed: Callable[[_T], object] = lambda _: True
) -> Callable[[str], _T]:
    """A type of argparse, which shows its refusals after the name of the flag.

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
        raise argparse.ArgumentTypeError(f"got {text!r}; must be {rule}")

    return parse


def _digits(text: str) -> int:
    if not (text.isascii() and text.isdigit()):
        raise ValueError
    return int(text)


def whole_number(text: str) -> int:
    """A whole number; as in vLLM 32k is 32,000 and 32K is 32,768, m and g alike."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([kmg])", text, re.ASCII | re.IGNORECASE)
    if match is None:
        return _digits(text)
    base = 1000 if match[2].islower() else 1024
    value = Fraction(match[1]) * base ** (1 + "kmg".index(match[2].lower()))
    if value.denominator != 1:
        raise ValueError
    return int(value)


def number(kind: type, least: float, forms: str = "") -> Callable[[str], float]:
    """A reader of finite numbers from `least` on, of type int or float.

    `forms` ends the error's line: how else a number may be written.
    """
    read, what = (whole_number, "a whole number") if kind is int else (float, "a number")
    return reader(read, f"{what} from {least:g} on{forms}", lambda x: least <= x < math.inf)


def add_numbers(
    parser: argparse._ActionsContainer, *rows: tuple[str, type, float, float | None, str]
) -> None:
    """Add flags that take a number: name, kind, smallest value, default, help."""
    for flag, kind, least, default, text in rows:
        shown = text if default is None else f"{text} (default: {default:g})"
        metavar = "N" if kind is int else "X"
        parser.add_argument(
            flag, metavar=metavar, type=number(kind, least), default=default, help=shown
        )


port = reader(_digits, "0 to 65535", lambda value: value <= 65535)
# for the system an empty name, as of an unset variable, is every interface
host = reader(str, "a name or an address, 0.0.0.0 for all interfaces", str.strip)
_BYTES = "1 byte or more: a number and an optional unit K, M, G or T, for example 8G or 512MiB"
size = reader(parse_bytes, _BYTES, lambda num_bytes: num_bytes >= 1)
host_name = reader(
    str,
    "a name without a port, or *",
    lambda text: text and text.count(":") != 1 and not re.search(r"[/\s]", text),
)


def key(text: str) -> str:
    """A key that a header can carry; an empty one, as of an unset variable, would be no secret."""
    if not text or any(char.isspace() or not char.isprintable() for char in text):
        raise argparse.ArgumentTypeError("allowed is a text of one character or more, none a space")
    return text


def parser_name(names: Sequence[str]) -> Callable[[str], str]:
    """Return a function that finds the name of a parser in SGLang's spelling too.

    SGLang writes `deepseek-v3` and `deepseekv32` for `deepseek_v3` and `deepseek_v32`.
    """
    spelled = {name.replace("_", ""): name for name in names}
    return lambda text: spelled.get(text.lower().replace("-", "").replace("_", ""), text)
