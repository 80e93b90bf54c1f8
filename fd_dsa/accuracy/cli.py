"""`python -m fd_dsa.accuracy COMMAND`: each command is a module that is imported when asked for.

A command's module has `add_parser(subparsers)`, which adds its parser (and may add others, whose
`run` default names their function), and `run(args) -> int`, which does the work.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module

from fd_dsa.errors import ConfigError
from fd_dsa.serve.flag_values import Parser, exit_status

COMMANDS = {
    "ifeval": ("fd_dsa.accuracy.ifeval", "ask a server the IFEval prompts and score its answers"),
    "score": ("fd_dsa.accuracy.ifeval", "score kept answers, or a file of responses"),
    "compare": ("fd_dsa.accuracy.compare", "two runs, paired: flips, tests, a verdict in words"),
    "retrieval": (
        "fd_dsa.accuracy.retrieval.command",
        "what is hidden in long contexts",
    ),
    "selection": ("fd_dsa.accuracy.selection.command", "what the indexer chose, layer by layer"),
    "perplexity": ("fd_dsa.accuracy.perplexity", "perplexity of a text in one pass"),
}
"""Command -> its module and a line for `--help`."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status.

    0 when it is done, 1 when a server went away, 2 when it cannot begin, 130 after Ctrl-C, with one
    line on stderr that says why and, for a run, how to go on. What comes after the first `--` is
    handed to the command as `args.passed`, all of it as `args.arguments`.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("--help", "-h", "help"):
        lines = "".join(f"  {name:<12}{text}\n" for name, (_, text) in COMMANDS.items())
        usage = "usage: python -m fd_dsa.accuracy COMMAND [flags]"
        sys.stdout.write(f"{usage}\n\ncommands (each has a --help):\n{lines}")
        return 0
    return exit_status(lambda: _run(arguments))


def _run(arguments: list[str]) -> int:
    """Import the command's module, parse, run."""
    command = arguments[0]
    if command not in COMMANDS:
        raise ConfigError(f"unknown command {command!r}; allowed are {', '.join(COMMANDS)}")
    module = import_module(COMMANDS[command][0])
    parser = Parser(prog="python -m fd_dsa.accuracy", allow_abbrev=False)
    module.add_parser(parser.add_subparsers(dest="command", parser_class=Parser))
    place = arguments.index("--") if "--" in arguments else len(arguments)
    args = parser.parse_args(arguments[:place])
    args.passed, args.arguments = tuple(arguments[place + 1 :]), tuple(arguments)
    return int(getattr(args, "run", module.run)(args))
