"""What the commands share: parsing, and the one line of a failure."""

from __future__ import annotations

import argparse
import math
import re
import sys
from collections.abc import Callable
from typing import Any, NoReturn

from fd_dsa.errors import ConfigError, FdDsaError, RemoteError

_EXIT_BAD_START = 2
_EXIT_INTERRUPTED = 130


class Parser(argparse.ArgumentParser):
    """An argparse parser whose errors are one line of ours."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(re.sub(r"^argument ([^:]+): ", r"\1: ", message))


def number(kind: type, least: float) -> Callable[[str], Any]:
    """A parser of finite numbers from `least` on."""

    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not least <= value < math.inf:
            what = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"got {text!r}; allowed is {what} from {least:g} on")
        return value

    return parse


def exit_status(run: Callable[[], int]) -> int:
    """What `run` returns; 1 after a server went away, 2 for a bad start, 130 after Ctrl-C."""
    try:
        return run()
    except KeyboardInterrupt as stop:
        return _fail(str(stop) or "interrupted", _EXIT_INTERRUPTED)
    except RemoteError as error:
        return _fail(str(error), 1)
    except BrokenPipeError:
        raise
    except (FdDsaError, OSError) as error:
        return _fail(str(error), _EXIT_BAD_START)


def _fail(message: str, status: int) -> int:
    """Print the one line of a command that cannot go on."""
    sys.stderr.write(f"fd_dsa: error: {message}\n")
    return status


def add_numbers(
    parser: argparse._ActionsContainer, *rows: tuple[str, type, float, Any, str]
) -> None:
    """Add flags that take a number: name, kind, smallest value, default, help."""
    for flag, kind, least, default, text in rows:
        shown = text if default is None else f"{text} (default: {default:g})"
        metavar = "N" if kind is int else "X"
        parser.add_argument(
            flag, metavar=metavar, type=number(kind, least), default=default, help=shown
        )
