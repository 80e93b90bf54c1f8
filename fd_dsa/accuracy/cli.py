"""`python -m fd_dsa.accuracy COMMAND`, with a module for each command.

A module is imported when its command is used. Its function fills the parser. The parser's default
`run` is a function that takes the parsed flags, does the work and returns the exit status.
"""

from __future__ import annotations

from collections.abc import Collection
from importlib import import_module

from fd_dsa.command_line.failures import reports_failures
from fd_dsa.command_line.parser import Parser, split_flags
from fd_dsa.commands import own_command

COMMANDS = {
    "ifeval": ("ifeval.fill_parser", "ask a server the IFEval prompts and score its answers"),
    "score": ("ifeval.fill_score_parser", "score kept answers, or a file of responses"),
    "compare": (
        "compare.fill_parser",
        "compare two runs pairwise: flips, tests, a verdict in words",
    ),
    "retrieval": ("retrieval.command.fill_parser", "what is hidden in long contexts"),
    "selection": ("selection.command.fill_parser", "what the indexer chose, layer by layer"),
}
"""Command -> the function that fills its parser, and a line for `--help`."""


def build_parser(commands: Collection[str] = COMMANDS) -> Parser:
    """Build a parser with the flags of these commands, and only the names of the others."""
    parser = Parser(prog=own_command("accuracy"), description="Measure a model's answers.")
    subparsers = parser.add_subparsers(
        title="commands (each has a --help)", metavar="COMMAND", required=True
    )
    for command, (place, text) in COMMANDS.items():
        own = subparsers.add_parser(command, help=text)
        if command in commands:
            module, _, fill = place.rpartition(".")
            getattr(import_module(f"fd_dsa.accuracy.{module}"), fill)(own)
    return parser


@reports_failures
def main(arguments: list[str]) -> int:
    """Run one command.

    Everything after the first `--` goes to the command as `args.passed`, and all arguments as
    `args.arguments`.

    Returns:
        Exit status: 0 on success, 1 if a server went away, 2 if the command cannot begin, 130 after
            Ctrl-C. One line on stderr has the reason and, for a run, the command that continues it.
    """
    command = arguments[0] if arguments else "--help"
    own, passed = split_flags(arguments)
    parser = build_parser([command] if command in COMMANDS else [])
    args = parser.parse_args(own or [command])
    args.passed, args.arguments = tuple(passed), tuple(arguments)
    return int(args.run(args))
