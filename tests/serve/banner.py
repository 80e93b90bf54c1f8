"""The lines that a server prints when it serves, and the command after them."""

from __future__ import annotations

import shlex
from collections.abc import Callable


def read_banner(line: Callable[[], str]) -> tuple[str, str]:
    """Return the lines before the `curl` command of a server, and this command.

    Args:
        line: returns the next line of the server's output, "" at its end.
    """
    before = ""
    while (command := line()) and not command.startswith("curl "):
        before += command
    while _is_open(command) and (more := line()):
        command += more
    return before, command


def _is_open(command: str) -> bool:
    """Return True if a shell waits for another line."""
    try:
        shlex.split(command)
    except ValueError:
        return True
    return command.endswith("\\\n")
