"""Where flags come from: the command line, then variables, then a YAML file, then defaults.

Source of the order and of the names: vLLM's `--config`, and llama.cpp's variables.
"""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from fd_dsa.environment import own_variables
from fd_dsa.errors import ConfigError
from fd_dsa.serve.flags import build_parser

_PREFIX = "FD_DSA_"
# they mean nothing outside of a command line
_COMMAND_LINE_ONLY = ("help", "version", "positional_model")
_SWITCH = {"0": False, "false": False, "1": True, "true": True}


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    """The flags of all sources; those of the engine are there only when they were given.

    Two names more than flags: `given`, the names of those that some source has, and `passed`, the
    arguments after `--`, which are for FastDeploy.

    Args:
        argv: the command line without the program's name.

    Raises:
        ConfigError: an unknown flag or key (with the nearest known one), a value of a wrong form,
            or a file that cannot be read; names the source where it is not the command line.
    """
    own, passed = _split(argv)
    line = _from_command_line(own)
    variables = _from_variables(own_variables(_PREFIX))
    path = line.get("config", variables.get("config"))
    file = {} if path is None else _from_file(path)
    given = {**file, **variables, **line}
    defaults = vars(build_parser().parse_args([]))
    defaults.pop("positional_model", None)
    args = argparse.Namespace(**{**defaults, **given})
    args.given = frozenset(given)
    args.passed = tuple(passed)
    return args


def unused_variables() -> list[str]:
    """What to say about variables whose names are nearly, but not quite, those of a flag."""
    known = [_variable(action) for action in _actions().values()]
    lines = []
    for name in sorted(own_variables(_PREFIX).keys() - set(known)):
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.85)
        if near:
            lines.append(f"the variable {name} is none of fd_dsa's; did you mean {near[0]}?")
    return lines


def _split(argv: Sequence[str]) -> tuple[Sequence[str], Sequence[str]]:
    """The arguments before and after the first `--`."""
    if "--" not in argv:
        return argv, ()
    place = list(argv).index("--")
    return argv[:place], argv[place + 1 :]


def _parse(argv: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """Flags of `argv` without any default, and what is no flag."""
    parser = build_parser()
    for action in parser._actions:
        action.default = argparse.SUPPRESS
    args, rest = parser.parse_known_args(argv)
    return vars(args), rest


def _from_command_line(argv: Sequence[str]) -> dict[str, Any]:
    """Flags of the command line; the model's folder may stand without one."""
    values, rest = _parse(argv)
    if rest:
        raise ConfigError(_unknown_argument(rest[0]))
    folder = values.pop("positional_model", None)
    if folder is not None:
        if values.get("model", folder) != folder:
            raise ConfigError(
                f"--model: got {values['model']!r} and the folder {folder!r}; give one of them"
            )
        values["model"] = folder
    return values


def _from_variables(variables: Mapping[str, str]) -> dict[str, Any]:
    """Flags of variables such as FD_DSA_PORT; an empty one is none."""
    values: dict[str, Any] = {}
    for action in _actions().values():
        name = _variable(action)
        text = variables.get(name, "").strip()
        if not text:
            continue
        value: Any = text
        if _takes_several(action):
            value = [part.strip() for part in text.split(",") if part.strip()]
        elif _is_switch(action):
            if text.lower() not in _SWITCH:
                raise ConfigError(f"{name}: got {text!r}, allowed: 0, 1, false, true, or unset")
            value = _SWITCH[text.lower()]
        values.update(_parsed(name, action, value))
    return values


def _from_file(path: str) -> dict[str, Any]:
    """Flags of a YAML file: names with dashes or underscores, and their values."""
    try:
        with open(path, encoding="utf-8") as file:
            loaded = yaml.safe_load(file)
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"--config: {path!r} cannot be read: {reason}") from None
    if loaded is None:
        return {}
    if not isinstance(loaded, dict):
        raise ConfigError(
            f"--config: {path} holds a {type(loaded).__name__}; allowed: flags as keys"
        )
    actions = _actions()
    values: dict[str, Any] = {}
    for key, value in loaded.items():
        action = actions.get(str(key).replace("_", "-"))
        if action is None or action.dest == "config":
            raise ConfigError(f"--config: {path}: {_unknown_key(str(key), actions)}")
        if action.dest in values:
            raise ConfigError(f"--config: {path}: {key} is there twice, with - and with _")
        if value is not None:
            values.update(_parsed(f"--config: {path}", action, value))
    return values


def _parsed(source: str, action: argparse.Action, value: Any) -> dict[str, Any]:
    """One flag as the parser of the command line reads it, so that all sources have one rule."""
    flag = _flag(action)
    values = value if isinstance(value, list) else [value]
    if _is_switch(action):
        if not isinstance(value, bool):
            raise ConfigError(f"{source}: {flag}: got {value!r}, allowed: true, false")
        return {action.dest: value}
    if isinstance(value, list) and not _takes_several(action):
        raise ConfigError(f"{source}: {flag}: got a list, allowed: one value")
    if not values or not all(isinstance(one, str | int | float) for one in values):
        raise ConfigError(f"{source}: {flag}: allowed: a text, a number, or for some a list")
    if any(isinstance(one, bool) for one in values):
        raise ConfigError(f"{source}: {flag}: got {value!r}, and the flag takes another value")
    try:
        if action.nargs:
            return _parse([flag, *map(str, values)])[0]
        return _parse([f"{flag}={one}" for one in values])[0]
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from None


def _actions() -> dict[str, argparse.Action]:
    """Every flag that may come from all sources, by its name without dashes in front."""
    return {
        _flag(action).removeprefix("--"): action
        for action in build_parser()._actions
        if action.dest not in _COMMAND_LINE_ONLY
    }


def _flag(action: argparse.Action) -> str:
    """The long name of a flag."""
    return next(option for option in action.option_strings if option.startswith("--"))


def _variable(action: argparse.Action) -> str:
    """The variable that stands for a flag."""
    return _PREFIX + action.dest.upper()


def _takes_several(action: argparse.Action) -> bool:
    """True for a flag that may be repeated, or that takes several values."""
    return isinstance(action, argparse._AppendAction) or bool(action.nargs)


def _is_switch(action: argparse.Action) -> bool:
    """True for a flag without a value."""
    return action.nargs == 0


def _unknown_argument(argument: str) -> str:
    """What to say about an argument that the parser does not know."""
    if not argument.startswith("-"):
        return f"unexpected argument {argument!r}; only one model folder is served at a time"
    flag = argument.partition("=")[0]
    known = [option for action in build_parser()._actions for option in action.option_strings]
    near = difflib.get_close_matches(flag, known, n=1)
    hint = f"did you mean {near[0]}?" if near else "--help lists the flags"
    return f"unknown flag {flag}; {hint}"


def _unknown_key(key: str, known: Mapping[str, argparse.Action]) -> str:
    """What to say about a key of the file that is no flag."""
    near = difflib.get_close_matches(key.replace("_", "-"), known, n=1)
    hint = f"did you mean {near[0]}?" if near else "keys are flags without their dashes in front"
    return f"unknown key {key!r}; {hint}"
