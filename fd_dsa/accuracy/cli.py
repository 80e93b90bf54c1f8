"""`python -m fd_dsa.accuracy COMMAND`: each command is a module that is imported when asked for.

A command's module has `add_parser(subparsers)`, which adds its parser (and may add others, whose
`run` default names their function), and `run(args) -> int`, which does the work.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import NoReturn

from fd_dsa.errors import ConfigError, FdDsaError, RemoteError

_EXIT_BAD_START = 2
_EXIT_INTERRUPTED = 130

COMMANDS = {
    "ifeval": ("fd_dsa.accuracy.ifeval", "ask a server the IFEval prompts and score its answers"),
    "score": ("fd_dsa.accuracy.ifeval", "score the kept answers of an IFEval run again"),
    "compare": ("fd_dsa.accuracy.compare", "two runs, paired: flips, tests, a verdict in words"),
    "retrieval": ("fd_dsa.accuracy.retrieval", "passkeys, needles and variables in long contexts"),
    "selection": ("fd_dsa.accuracy.selection", "what the indexer chose, layer by layer"),
    "perplexity": ("fd_dsa.accuracy.perplexity", "perplexity of a text in one pass"),
    "matrix": ("fd_dsa.accuracy.matrix", "one model through every mode of the engine"),
}
"""Command -> its module and a line for `--help`."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status.

    Args:
        argv: arguments without the program's name; None takes those of the process. What stands
            after the first `--` is handed to the command as `args.passed`, all of it as
            `args.arguments`.

    Returns:
        0 when it is done, 1 when a server went away, 2 when it cannot begin, 130 after Ctrl-C (one
        line on stderr says why and, for a run, how to go on), and what else the command gives.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("--help", "-h", "help"):
        sys.stdout.write(usage())
        return 0
    try:
        return _run(arguments)
    except KeyboardInterrupt as stop:
        return _fail(str(stop) or "interrupted", _EXIT_INTERRUPTED)
    except RemoteError as error:
        return _fail(str(error), 1)
    except BrokenPipeError:
        raise
    except (FdDsaError, OSError) as error:
        return _fail(str(error))


def usage() -> str:
    """The text of `--help`."""
    lines = "\n".join(f"  {name:<12}{text}" for name, (_, text) in COMMANDS.items())
    return (
        "usage: python -m fd_dsa.accuracy COMMAND [flags]\n\n"
        f"commands (each has a --help):\n{lines}\n"
    )


def _run(arguments: list[str]) -> int:
    """Import the command's module, parse, run."""
    command = arguments[0]
    if command not in COMMANDS:
        allowed = ", ".join(COMMANDS)
        raise ConfigError(f"unknown command {command!r}; allowed are {allowed}")
    module = import_module(COMMANDS[command][0])
    parser = Parser(prog="python -m fd_dsa.accuracy", allow_abbrev=False)
    module.add_parser(parser.add_subparsers(dest="command", parser_class=Parser))
    place = arguments.index("--") if "--" in arguments else len(arguments)
    args = parser.parse_args(arguments[:place])
    args.passed, args.arguments = tuple(arguments[place + 1 :]), tuple(arguments)
    run = getattr(args, "run", module.run)
    return int(run(args))


def _fail(message: str, status: int = _EXIT_BAD_START) -> int:
    """Print the one line of a command that cannot go on."""
    sys.stderr.write(f"fd_dsa: error: {message}\n")
    return status


class Parser(argparse.ArgumentParser):
    """An argparse parser whose errors are one line of ours."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(re.sub(r"^argument ([^:]+): ", r"\1: ", message))
