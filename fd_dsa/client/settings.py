"""Request fields that a user sets by flags, or by `/set` in a conversation."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from typing import Any

from fd_dsa.command_line.parser import Parser, nearest
from fd_dsa.command_line.values import number, reader
from fd_dsa.errors import ConfigError, shorten


def _between(low: float, high: float) -> Callable[[str], Any]:
    return reader(float, f"a number from {low:g} to {high:g}", lambda x: low <= x <= high)


ON_OR_OFF = reader(lambda text: bool(("off", "on").index(text)), "on or off")
_READERS: dict[str, Callable[[str], Any]] = {
    "temperature": number(float, 0),
    "top_p": _between(0, 1),
    "top_k": reader(int, "a whole number, -1 for all", lambda k: k >= -1),
    "min_p": _between(0, 1),
    "presence_penalty": _between(-2, 2),
    "frequency_penalty": _between(-2, 2),
    "repetition_penalty": reader(float, "a number above 0", lambda x: 0 < x < math.inf),
    "max_tokens": number(int, 1),
    "seed": number(int, 0),
    "thinking": ON_OR_OFF,
}
NAMES = tuple(_READERS)
"""Names of the settings: fields of OpenAI's and vLLM's API, and the template's switch."""


def add_setting_flags(parser: Parser) -> None:
    group = parser.add_argument_group("settings")
    for name, read in _READERS.items():
        is_switch = read is ON_OR_OFF
        metavar, text = ("on|off", "let the model reason first") if is_switch else ("X", None)
        group.add_argument(f"--{name.replace('_', '-')}", metavar=metavar, type=read, help=text)


def given_settings(args: argparse.Namespace, names: Sequence[str] = NAMES) -> dict[str, Any]:
    """Return the settings of these names that the flags give."""
    given = ((name, getattr(args, name)) for name in names)
    return {name: value for name, value in given if value is not None}


def read_setting(name: str, text: str) -> Any:
    name = name.replace("-", "_")
    if name not in _READERS:
        raise ConfigError(
            f"/set: unknown setting {shorten(name)}, allowed: {', '.join(NAMES)}; "
            + nearest(name, NAMES, "/set NAME VALUE")
        )
    try:
        return _READERS[name](text)
    except argparse.ArgumentTypeError as error:
        raise ConfigError(f"/set {name}: {error}") from None


def fields_of(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the request fields of these settings."""
    fields = {name: value for name, value in settings.items() if name != "thinking"}
    if "thinking" in settings:
        fields["chat_template_kwargs"] = reasoning_switch(settings["thinking"])
    return fields


def reasoning_switch(is_on: bool | None) -> dict[str, bool]:
    """Return the reasoning switch under its names in DeepSeek's and GLM's templates."""
    return {} if is_on is None else {"thinking": is_on, "enable_thinking": is_on}
