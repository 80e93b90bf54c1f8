"""Console script `fd-dsa`: a door to the commands of the package."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module

from fd_dsa import __version__, environment

# command -> its module, which is imported when it runs, and what it does
_COMMANDS = {
    "serve": ("serve.cli", "serve a model over the OpenAI API"),
    "chat": ("client.chat", "talk to a model in the terminal"),
    "bench": ("client.bench", "measure the speed of a server"),
    "accuracy": ("accuracy.cli", "measure a served model: IFEval, retrieval, comparisons"),
    "doctor": ("doctor", "report device, versions and providers, and check every operator"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status, 2 for an unknown command.

    Args:
        argv: arguments without the program's name; None takes those of the process.
    """
    with environment.command():
        return _run(*(list(sys.argv[1:] if argv is None else argv) or ["--help"]))


def _run(command: str, *rest: str) -> int:
    """Run one command with its flags."""
    if command in _COMMANDS:
        return int(import_module(f"fd_dsa.{_COMMANDS[command][0]}").main(rest))
    if command in ("version", "--version"):
        print(f"fd_dsa {__version__}")
        return 0
    if command in ("--help", "-h", "help"):
        print("usage: fd-dsa COMMAND [flags]\n\ncommands (fd-dsa COMMAND --help lists the flags):")
        for name, (_, purpose) in _COMMANDS.items():
            print(f"  {name:<9} {purpose}")
        print("  version   print the version")
        return 0
    print(
        f"fd_dsa: error: unknown command {command!r}; allowed are {', '.join(_COMMANDS)}, version",
        file=sys.stderr,
    )
    return 2
