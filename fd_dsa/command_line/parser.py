"""The parser of every command: errors of one line with the nearest name, and `--help=TOPIC`."""

from __future__ import annotations

import argparse
import ast
import re
import sys
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

from fd_dsa.errors import ConfigError, nearest_name, shorten, shorten_text

# argparse shows a word as a literal of Python
_CHOICE = re.compile(r"""(.*)invalid choice: ('.*'|".*") \(choose from (.*)\)""")
_EXPLICIT = re.compile(r"""(.*ignored explicit argument )('.*'|".*")""")


def nearest(name: str, known: Iterable[str], otherwise: str) -> str:
    """Return a hint for an unknown name: the nearest known name, or else `otherwise`."""
    near = nearest_name(name, known)
    return f"did you mean {near}?" if near else otherwise


def split_flags(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the flags of a command, and the flags after `--`, which are for a server."""
    words = list(arguments)
    place = words.index("--") if "--" in words else len(words)
    return words[:place], words[place + 1 :]


class Parser(argparse.ArgumentParser):
    """An argparse parser whose errors are one line each, with the nearest name.

    Names are never abbreviated, because a new flag would change the meaning of a short form.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**{**kwargs, "add_help": False, "allow_abbrev": False})
        self._words: list[str] = []
        self.add_argument(
            "-h",
            "--help",
            action=_Help,
            nargs="?",
            metavar="TOPIC",
            default=argparse.SUPPRESS,
            help="show this help, of one group or of the flags whose names contain TOPIC",
        )

    def error(self, message: str) -> NoReturn:
        message = re.sub(r"^argument ([^:]+): ", r"\1: ", message)
        if choice := _CHOICE.fullmatch(message):
            where, literal, listed = choice.groups()
            got = ast.literal_eval(literal)
            if where == "COMMAND: ":
                # the word may be the value of a flag whose command is missing
                self._refuse_unknown(self._words[: self._words.index(got)])
            known = re.findall(r"[\w.-]+", listed)
            what = "unknown command " if where == "COMMAND: " else f"{where}got "
            hint = nearest(got, known, "")
            message = f"{what}{shorten(got)}, allowed: {', '.join(known)}" + (hint and f"; {hint}")
        if explicit := _EXPLICIT.fullmatch(message):
            message = explicit[1] + shorten(ast.literal_eval(explicit[2]))
        if "arguments are required: " in message:
            # a mistyped flag is mostly the reason
            self._refuse_unknown(self._words)
            message += "; --help shows the usage"
        raise ConfigError(message)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse the flags, and refuse other words with the nearest flag of this command."""
        self._words = split_flags(args or ())[0]
        found, rest = super().parse_known_args(args, namespace)
        for word in rest:
            if word.startswith("-"):
                raise self._unknown(word)
        if rest:
            raise ConfigError(f"unexpected argument {shorten(rest[0])}; --help shows the usage")
        return found, rest

    def _refuse_unknown(self, words: Sequence[str]) -> None:
        """Raise the error for the first unknown flag among words."""
        for word in words:
            # a short flag may have its value in the same word
            flag = word.partition("=")[0] if word.startswith("--") else word[:2]
            if re.match("-+[a-zA-Z]", word) and flag not in self._option_string_actions:
                raise self._unknown(word)

    def _unknown(self, word: str) -> ConfigError:
        """Return the error for an unknown flag, with the nearest one or the commands."""
        flag, otherwise = word.partition("=")[0], "--help lists the flags"
        if self._subparsers is not None:
            (commands,) = self._subparsers._group_actions
            otherwise = f"a command comes first: {', '.join(map(str, commands.choices or ()))}"
        hint = nearest(flag, self._option_string_actions, otherwise)
        return ConfigError(f"unknown flag {shorten_text(flag)}; {hint}")

    def format_topic(self, topic: str) -> str:
        """Format the help of one group, or else of the flags whose names contain a text."""
        word = topic.strip("-").lower().replace("_", "-")
        groups = {(group.title or "").lower(): group for group in self._action_groups}
        flags = {flag.lstrip("-"): action for flag, action in self._option_string_actions.items()}
        if word in groups:
            shown: Sequence[argparse.Action] = groups[word]._group_actions
        else:
            shown = [*{id(action): action for f, action in flags.items() if word in f}.values()]
        if not shown or not word:
            known = [*groups, *flags]
            hint = nearest(word, known, "see --help")
            raise ConfigError(f"--help: no topic {shorten(topic)}; {hint}")
        formatter = self._get_formatter()
        formatter.add_arguments(shown)
        return formatter.format_help()


class _Help(argparse.Action):
    def __call__(
        self,
        parser: Any,
        namespace: argparse.Namespace,
        values: Any,
        option: str | None = None,
    ) -> None:
        text = parser.format_help() if values is None else parser.format_topic(values)
        sys.stdout.write(text)
        parser.exit()
