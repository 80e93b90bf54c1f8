"""Console script `fd-dsa`: a door to the commands of the package."""

from __future__ import annotations

import sys
from collections.abc import Sequence

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


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status, 2 for an unknown command.

    Args:
        argv: arguments without the program's name; None takes those of the process.
    """
    with environment.command():
        return _run(*(list(sys.argv[1:] if argv is None else argv) or ["--help"]))


def _run(command: str, *rest: str) -> int:
    """Run one command with its flags."""
    if command == "serve":
        from fd_dsa.serve.cli import main as serve

        return serve(rest)
    if command == "chat":
        from fd_dsa.client.chat import main as chat

        return chat(rest)
    if command == "bench":
        from fd_dsa.client.bench import main as bench

        return bench(rest)
    if command == "accuracy":
        from fd_dsa.accuracy.cli import main as accuracy

        return accuracy(rest)
    if command == "doctor":
        from fd_dsa.doctor import main as doctor

        return doctor(rest)
    if command in ("version", "--version"):
        print(f"fd_dsa {__version__}")
        return 0
    if command in ("--help", "-h", "help"):
        print(_USAGE, end="")
        return 0
    print(
        f"fd_dsa: error: unknown command {command!r}; allowed are serve, chat, bench, accuracy, "
        "doctor, version",
        file=sys.stderr,
    )
    return 2
