"""What the commands share: numbers among their flags, and the exit status of a failure."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from fd_dsa.errors import FdDsaError, RemoteError
from fd_dsa.serve.flag_values import fail, number

_EXIT_BAD_START = 2
_EXIT_INTERRUPTED = 130


def exit_status(run: Callable[[], int]) -> int:
    """What `run` returns; 1 after a server went away, 2 for a bad start, 130 after Ctrl-C."""
    try:
        return run()
    except KeyboardInterrupt as stop:
        return fail(str(stop) or "interrupted", _EXIT_INTERRUPTED)
    except RemoteError as error:
        return fail(str(error), 1)
    except BrokenPipeError:
        raise
    except (FdDsaError, OSError) as error:
        return fail(str(error), _EXIT_BAD_START)


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
