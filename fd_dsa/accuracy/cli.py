"""`python -m fd_dsa.accuracy COMMAND`: each command is a module that is imported when asked for.

A command's module has `add_parser(subparsers)`, which adds its parser and perhaps others. Their
default `run` is the function of the parsed flags that does the work and returns the exit status.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from importlib import import_module
from typing import Any

from fd_dsa.serve.flag_values import reports_failures, split_flags
from fd_dsa.serve.parser import Parser, program

COMMANDS = {
    "ifeval": ("fd_dsa.accuracy.ifeval", "ask a server the IFEval prompts and score its answers"),
    "score": ("fd_dsa.accuracy.ifeval", "score kept answers, or a file of responses"),
    "compare": (
        "fd_dsa.accuracy.compare",
        "compare two runs pairwise: flips, tests, a verdict in words",
    ),
    "retrieval": ("fd_dsa.accuracy.retrieval.command", "what is hidden in long contexts"),
    "selection": ("fd_dsa.accuracy.selection.command", "what the indexer chose, layer by layer"),
    "perplexity": ("fd_dsa.accuracy.perplexity", "perplexity of a text in one pass"),
}
"""Command -> its module and a line for `--help`."""


class _Commands(argparse._SubParsersAction):  # type: ignore[type-arg]
    """Adds the line about a command to its parser."""

    def add_parser(self, name: str, **kwargs: Any) -> Any:
        return super().add_parser(name, help=COMMANDS[name][1], **kwargs)


def build_parser(commands: Iterable[str] = COMMANDS) -> Parser:
    """The parser with the flags of these commands; of the others it has the names alone."""
    parser = Parser(prog=program("accuracy"), description="Measure a model's answers.")
    subparsers = parser.add_subparsers(
        title="commands (each has a --help)", metavar="COMMAND", required=True, action=_Commands
    )
    wanted = dict.fromkeys(COMMANDS[command][0] for command in commands)
    for module in wanted:
        import_module(module).add_parser(subparsers)
    for command, (module, _) in COMMANDS.items():
        if module not in wanted:
            subparsers.add_parser(command)
    return parser


@reports_failures
def main(arguments: list[str]) -> int:
    """Run one command; returns the exit status.

    0 when it is done, 1 when a server went away, 2 when it cannot begin, 130 after Ctrl-C, with one
    line on stderr that says why and, for a run, how to go on. What comes after the first `--` is
    handed to the command as `args.passed`, all of it as `args.arguments`.
    """
    command = arguments[0] if arguments else "--help"
    own, passed = split_flags(arguments)
    parser = build_parser([command] if command in COMMANDS else [])
    args = parser.parse_args(own or [command])
    args.passed, args.arguments = tuple(passed), tuple(arguments)
    return int(args.run(args))
