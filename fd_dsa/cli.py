"""Console script `fd-dsa` and `python -m fd_dsa`: dispatch to the commands."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any

from fd_dsa import __version__, signals
from fd_dsa.command_line.failures import (
    EXIT_BAD_START,
    describe_import_error,
    fail,
    reports_failures,
)
from fd_dsa.command_line.parser import Parser
from fd_dsa.commands import own_command

# command -> (module with `main` and `build_parser`, imported on use; purpose)
COMMANDS = {
    "serve": ("serve.cli", "serve a model over the OpenAI API"),
    "chat": ("client.chat", "talk to a model in the terminal"),
    "run-batch": ("client.run_batch", "answer an OpenAI batch file"),
    "bench": ("client.bench", "measure the speed of a server"),
    "accuracy": ("accuracy.cli", "measure a served model: IFEval, retrieval, comparisons"),
    "doctor": ("doctor", "report device, versions and providers, and check every operator"),
}
_SHELLS = ("bash", "fish", "zsh", "tcsh")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        Its exit status, or 2 for an unknown command and without a required package.
    """
    arguments = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    if arguments[0] == "help":
        arguments = [*arguments[1:], "--help"]
    with signals.command():
        try:
            if arguments[0] in COMMANDS:
                # Python ignores the KeyboardInterrupt of a handler in some parts of an import
                with signals.signals_exit_at_once():
                    module = import_module(f"fd_dsa.{COMMANDS[arguments[0]][0]}")
                return int(module.main(arguments[1:]))
            return _run(arguments)
        except ImportError as error:
            return fail(describe_import_error(error), EXIT_BAD_START)


def build_parser(parents: dict[str, Parser] | None = None) -> Parser:
    """Build the parser of `fd-dsa`.

    Args:
        parents: parsers of the commands, for a completion script, which completes the plain name of
            the program. None = only help and errors.
    """
    parser = Parser(
        prog=own_command() if parents is None else "fd-dsa",
        description="%(prog)s COMMAND --help lists the command's flags.",
    )
    parser.add_argument("--version", action="version", version=f"fd_dsa {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, (_, purpose) in COMMANDS.items():
        options: dict[str, Any] = {}
        if parents is not None:
            options = {"parents": [parents[name]], "conflict_handler": "resolve"}
        commands.add_parser(name, help=purpose, **options)
    completion = commands.add_parser("completion", help="print a completion script for a shell")
    completion.add_argument("shell", metavar="SHELL", choices=_SHELLS, help=", ".join(_SHELLS))
    completion.set_defaults(run=_print_completion)
    version = commands.add_parser("version", help="print the version")
    version.set_defaults(run=lambda _: print(f"fd_dsa {__version__}"))
    return parser


@reports_failures
def _run(arguments: list[str]) -> int:
    args = build_parser().parse_args(arguments)
    args.run(args)
    return 0


def _complete_values(parser: argparse.ArgumentParser, kinds: Mapping[str, Any]) -> None:
    """Mark the values of a parser's arguments, also those of its commands, by their metavars."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                _complete_values(command, kinds)
        elif action.metavar in kinds:
            # an attribute of shtab
            vars(action)["complete"] = kinds[str(action.metavar)]
        elif action.metavar == "on|off":
            action.choices = ("on", "off")


def _print_completion(args: argparse.Namespace) -> None:
    import shtab

    parents = {
        name: import_module(f"fd_dsa.{module}").build_parser()
        for name, (module, _) in COMMANDS.items()
    }
    # values that the shell itself completes
    kinds = {
        **dict.fromkeys(("FILE", "RUN", "BEFORE", "AFTER"), shtab.FILE),
        **dict.fromkeys(("DIR", "FOLDER", "MODEL"), shtab.DIRECTORY),
    }
    for parent in parents.values():
        _complete_values(parent, kinds)
    print(shtab.complete(build_parser(parents), args.shell))


if __name__ == "__main__":
    sys.exit(main())
