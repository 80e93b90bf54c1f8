"""The sources of flags: command line, variables, a YAML file and defaults, in this order.

Sources: vLLM's `--config` and llama.cpp's variables, for the order and the names.
"""

from __future__ import annotations

import argparse
import difflib
import io
import itertools
import json
from collections import Counter
from collections.abc import Sequence
from typing import Any

import yaml

from fd_dsa.command_line.inputs import read_bounded
from fd_dsa.command_line.parser import nearest, split_flags
from fd_dsa.environment import process_environment, switch
from fd_dsa.errors import ConfigError, shorten, shorten_text
from fd_dsa.serve.flags import DEFAULTS, build_parser
from fd_dsa.serve.known_flags import check_value, find, remove_known_flags

_PREFIX = "FD_DSA_"
# flags without a meaning outside of a command line
_COMMAND_LINE_ONLY = ("help", "version", "positional_model")
# an empty secret, for example from an unset variable of a script, would leave the server open
_NEVER_EMPTY = ("api_key",)
# variables of the plug-in, whose names resemble flags
_OTHER_VARIABLES = ("FD_DSA_DISABLE",)
# PyYAML reads a megabyte in a second
_MAX_FILE_BYTES = 1 << 20
# a few aliases of lists of aliases would make billions
_MAX_FILE_VALUES = 100_000
_NUMBERS = tuple(f"tag:yaml.org,2002:{kind}" for kind in ("int", "float", "timestamp"))
_TEXT = "tag:yaml.org,2002:str"


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    """Collect the flags of all sources.

    Flags of the engine are included only if a source has them. The namespace also has three other
    names. `given` has the names of flags that a source has. `passed` has the arguments after `--`,
    which are for FastDeploy. `not_needed` has flags of other servers that change no answer, with
    the reasons.

    Raises:
        ConfigError: an unknown flag or key (with the nearest known one), a value of a wrong form,
            or a file that cannot be read. The message names the source unless it is the command
            line.
    """
    words, passed = split_flags(argv)
    words, not_needed = remove_known_flags(words)
    line = _from_command_line(words)
    variables = _from_variables()
    path = line.get("config", variables.get("config"))
    file = {} if path is None else _from_file(path, not_needed)
    given = {**file, **variables, **line}
    return argparse.Namespace(
        **{**DEFAULTS, **given},
        given=frozenset(given),
        passed=tuple(passed),
        not_needed=not_needed,
    )


def unused_variables() -> list[str]:
    """Return a line for each variable whose name is almost that of a flag."""
    known = [_variable(action) for action in _flag_actions().values()]
    lines = []
    ours = {name for name in process_environment() if name.startswith(_PREFIX)}
    for name in sorted(ours.difference(known, _OTHER_VARIABLES)):
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.85)
        if near:
            lines.append(f"the variable {name} is unknown; did you mean {near[0]}?")
    return lines


def _from_command_line(argv: Sequence[str]) -> dict[str, Any]:
    """Return the flags of the command line. The model's folder may be positional."""
    values = vars(build_parser().parse_args(argv))
    folder = values.pop("positional_model", None)
    if folder is not None and values.setdefault("model", folder) != folder:
        raise ConfigError(
            f"--model: got {shorten(values['model'])} and the folder {shorten(folder)}; give one "
            "of them"
        )
    return values


def _from_variables() -> dict[str, Any]:
    """Return the flags of variables such as FD_DSA_PORT.

    Empty variables are ignored, except those of `_NEVER_EMPTY`.
    """
    variables = process_environment()
    values: dict[str, Any] = {}
    for action in _flag_actions().values():
        name = _variable(action)
        text = variables.get(name, "").strip()
        if not text and not (action.dest in _NEVER_EMPTY and name in variables):
            continue
        value: Any = text
        if _takes_several(action):
            value = [part.strip() for part in text.removesuffix(",").split(",")]
            if "" in value and action.dest not in _NEVER_EMPTY:
                # not the values, which may be secrets
                place = f"value {value.index('') + 1} of {len(value)} is empty"
                rule = "allowed: values with one comma between them"
                raise ConfigError(f"{name}: {_flag(action)}: {place}, {rule}")
        elif action.nargs == 0:
            value = switch(name)
        values.update(_parsed(name, action, value))
    return values


def _from_file(path: str, not_needed: dict[str, str]) -> dict[str, Any]:
    """Return the flags of a YAML file, whose names may have dashes or underscores.

    Args:
        not_needed: receives the keys that are flags of other servers and change no answer.
    """
    try:
        data = read_bounded(path, _MAX_FILE_BYTES, "a file has flags only")
        loaded = _load_texts(path, data.decode("utf-8"))
    except ConfigError as error:
        raise ConfigError(f"--config: {error}") from None
    except OSError as error:
        raise ConfigError(f"--config: {shorten(path)} cannot be read: {error.strerror}") from None
    except (ValueError, yaml.YAMLError, RecursionError) as error:
        reason = shorten_text(" ".join(str(error).split()))
        raise ConfigError(f"--config: {shorten(path)} cannot be read: {reason}") from None
    if loaded is None:
        return {}
    if not isinstance(loaded, dict):
        raise ConfigError(
            f"--config: {path} holds a {type(loaded).__name__}; allowed: flags as keys"
        )
    actions = {name: action for name, action in _flag_actions().items() if name != "config"}
    values: dict[str, Any] = {}
    for key, value in loaded.items():
        name = str(key).replace("_", "-")
        action = actions.get(name)
        positive = actions.get(name.removeprefix("no-"))
        if action is None and positive is not None and f"--{name}" in positive.option_strings:
            # as files of vLLM turn a switch off
            action, value = positive, (not value if isinstance(value, bool) else value)
        if action is None and (found := find(f"--{name}")) is not None:
            known, is_off = found
            is_off ^= value is False
            try:
                not_needed[str(key)] = check_value(str(key), str(value), known, is_off)
            except ConfigError as error:
                raise ConfigError(f"--config: {path}: {error}") from None
            continue
        if action is None:
            hint = nearest(name, actions, "keys are flags without their dashes in front")
            raise ConfigError(f"--config: {path}: unknown key {shorten(str(key))}; {hint}")
        if action.dest in values:
            raise ConfigError(f"--config: {path}: {key} is there twice, with - and with _")
        if value is None and action.dest in _NEVER_EMPTY:
            value = []
        if value is not None:
            values.update(_parsed(f"--config: {path}", action, value))
    return values


def _load_texts(path: str, text: str) -> Any:
    """Load YAML whose flags have numbers and dates as texts, like the words of a command line.

    Otherwise the key 0123 is the number 83, and the name 1.10 is 1.1.

    Raises:
        ValueError, yaml.YAMLError, RecursionError: the text is no YAML, or has a key twice.
    """
    # errors quote a text, which may have secrets, but no stream
    loader = yaml.SafeLoader(io.StringIO(text))
    loader.name = path
    try:
        if (node := loader.get_single_node()) is None:
            return None
        pairs = node.value if isinstance(node, yaml.MappingNode) else []
        _count_values(node, {})
        nodes = [one for pair in pairs for one in pair]
        lists = [one.value for one in nodes if isinstance(one, yaml.SequenceNode)]
        # not in objects, whose numbers become numbers of JSON
        for one in itertools.chain(nodes, *lists):
            one.tag = _TEXT if one.tag in _NUMBERS else one.tag
        return loader.construct_document(node)
    finally:
        loader.dispose()


def _count_values(node: yaml.Node, counts: dict[int, int]) -> int:
    """Return the number of values of a YAML node, those of an alias each time.

    Args:
        counts: numbers of nodes that were counted before, by `id`.

    Raises:
        ValueError: an object has a key twice, or there are too many values.
    """
    if id(node) in counts:
        # an alias, which may even have itself
        return counts[id(node)]
    counts[id(node)] = count = 1
    if isinstance(node, yaml.MappingNode):
        names = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
        for name, times in names.most_common(1):
            if times > 1:
                raise ValueError(f"the key {shorten(name)} is there twice")
        count += sum(_count_values(one, counts) for pair in node.value for one in pair)
    elif isinstance(node, yaml.SequenceNode):
        count += sum(_count_values(one, counts) for one in node.value)
    if count > _MAX_FILE_VALUES:
        raise ValueError(f"has more than {_MAX_FILE_VALUES} values")
    counts[id(node)] = count
    return count


def _parsed(source: str, action: argparse.Action, value: object) -> dict[str, Any]:
    """Parse one flag like the parser of the command line, so that all sources have one rule."""
    flag = _flag(action)
    if action.nargs == 0:
        if not isinstance(value, bool):
            raise ConfigError(f"{source}: {flag}: got {shorten(value)}, allowed: true, false")
        return {action.dest: value}
    if isinstance(value, list) and not _takes_several(action):
        raise ConfigError(f"{source}: {flag}: got a list, allowed: one value")
    if isinstance(value, dict) and action.metavar == "JSON":
        try:
            value = json.dumps(value, default=str)
        except (TypeError, ValueError, RecursionError) as error:
            raise ConfigError(f"{source}: {flag}: cannot be written as JSON: {error}") from None
    values = value if isinstance(value, list) else [value]
    # the values themselves may be secrets
    bad = [type(one).__name__ for one in values if type(one) not in (str, int, float)]
    if bad or not values:
        raise ConfigError(
            f"{source}: {flag}: got {bad[0] if bad else 'nothing'}, allowed: a text, a number, or "
            "for some a list; quotes make a text of any value"
        )
    words = [flag, *map(str, values)] if action.nargs else [f"{flag}={one}" for one in values]
    try:
        return vars(build_parser().parse_args(words))
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from None


def _flag_actions() -> dict[str, argparse.Action]:
    """Return the flags that may come from all sources, by name without leading dashes."""
    return {
        _flag(action).removeprefix("--"): action
        for action in build_parser()._actions
        if action.dest not in _COMMAND_LINE_ONLY
    }


def _flag(action: argparse.Action) -> str:
    return next(option for option in action.option_strings if option.startswith("--"))


def _variable(action: argparse.Action) -> str:
    return _PREFIX + action.dest.upper()


def _takes_several(action: argparse.Action) -> bool:
    return isinstance(action, argparse._AppendAction) or bool(action.nargs)
