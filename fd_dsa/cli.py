"""Console script `fd-dsa`: a door to the commands of the package."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module

from fd_dsa import __version__, environment

_USAGE = """\
usage: fd-dsa COMMAND [flags]

commands:
  serve     serve a model over the OpenAI API (flags: fd-dsa serve --help)
  chat      talk to a model in the terminal (flags: fd-dsa chat --help)
  bench     measure the speed of a server (flags: fd-dsa bench --help)
  accuracy  measure a served model: IFEval, retrieval, comparisons (flags: fd-dsa accuracy --help)
  doctor    report device, versions and providers, and check every operator (--json)
  version   print the version
"""

# imported by its own command alone
_MODULES = {
    "serve": "fd_dsa.serve.cli",
    "chat": "fd_dsa.client.chat",
    "bench": "fd_dsa.client.bench",
    "accuracy": "fd_dsa.accuracy.cli",
    "doctor": "fd_dsa.doctor",
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
    if command in _MODULES:
        status: int = import_module(_MODULES[command]).main(rest)
        return status
    if command in ("version", "--version"):
        print(f"fd_dsa {__version__}")
        return 0
    if command in ("--help", "-h", "help"):
        print(_USAGE, end="")
        return 0
    print(
        f"fd_dsa: error: unknown command {command!r}; allowed are {', '.join(_MODULES)}, version",
        file=sys.stderr,
    )
    return 2
