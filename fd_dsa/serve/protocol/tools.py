"""Tools of a chat completion, and the choice among them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import PlainValidator, WithJsonSchema

from fd_dsa.serve.errors import ApiError, FieldError, show
from fd_dsa.serve.protocol.fields import TEXT, Body, refuse

MAX_TOOLS = 1024
"""Maximum number of tools in a request."""

# number of tool names in an error message
_SHOWN_TOOLS = 8
# names that the markup of every format can hold
_NAME = re.compile(r'[^\s"<>{}]{1,128}')
_MODES = ("none", "auto", "required")


def _name(value: object) -> str:
    if not isinstance(value, str) or not _NAME.fullmatch(value):
        raise refuse(
            f"got {show(value)}; allowed is a name of 1 to 128 characters without white space, "
            "quotation marks, angle brackets and braces"
        )
    return value


@dataclass(frozen=True)
class ToolChoice:
    """`tool_choice`: "none", "auto", "required", or "named" with the name of a tool.

    Attributes:
        allowed: names of the tools that the model may see and call. None = all.
    """

    mode: str
    name: str | None = None
    allowed: tuple[str, ...] | None = None


def _choice(value: object) -> ToolChoice:
    """Parse `tool_choice` from a word or from an object that names tools."""
    if isinstance(value, str) and value in _MODES:
        return ToolChoice(value)
    name = _named(value)
    if name is not None and value == {"type": "function", "function": {"name": name}}:
        return ToolChoice("named", name)
    given = value.get("allowed_tools") if isinstance(value, dict) else None
    if value == {"type": "allowed_tools", "allowed_tools": given} and isinstance(given, dict):
        return _allowed(given)
    raise refuse(
        f"got {show(value)}; allowed are {', '.join(_MODES)}, "
        '{"type": "function", "function": {"name": "..."}} and '
        '{"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [...]}}'
    )


def _allowed(given: dict[str, Any]) -> ToolChoice:
    """Parse `allowed_tools`. Its tools may repeat the definitions."""
    mode, tools = given.get("mode"), given.get("tools")
    if mode not in ("auto", "required"):
        raise refuse(f"got the mode {show(mode)} of allowed_tools; allowed are auto and required")
    if given.keys() != {"mode", "tools"} or not isinstance(tools, list):
        raise refuse(f"got the allowed_tools {show(given)}; allowed is a mode and a list of tools")
    if len(tools) > MAX_TOOLS:
        raise refuse(f"has {len(tools)} allowed_tools; at most {MAX_TOOLS} are allowed")
    names = []
    for index, tool in enumerate(tools):
        name = _named(tool)
        if name is None:
            raise refuse(
                f"got {show(tool)} as entry {index} of allowed_tools; allowed is "
                '{"type": "function", "function": {"name": "..."}}'
            )
        names.append(name)
    return ToolChoice(mode, allowed=tuple(dict.fromkeys(names)))


def _named(value: object) -> str | None:
    """Return the name in {"type": "function", "function": {"name": ...}}, or None."""
    function = value.get("function") if isinstance(value, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    is_function = isinstance(value, dict) and value.get("type") == "function"
    return name if is_function and isinstance(name, str) else None


_NameField = Annotated[str, PlainValidator(_name), WithJsonSchema(TEXT)]
ChoiceField = Annotated[
    ToolChoice,
    PlainValidator(_choice),
    WithJsonSchema({"anyOf": [{"type": "string", "enum": list(_MODES)}, {"type": "object"}]}),
]


class FunctionDefinition(Body):
    """A function that the model may call."""

    name: _NameField
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Body):
    """A tool. Only functions are supported."""

    type: Literal["function"]
    function: FunctionDefinition


def check_tools(tools: Sequence[Tool], choice: ToolChoice) -> None:
    """Raise ApiError 400 if tools and `tool_choice` contradict each other."""
    # a dict keeps the order of the names
    names = dict[str, None]()
    for index, tool in enumerate(tools):
        name = tool.function.name
        if name in names:
            path = f"tools[{index}].function.name"
            raise FieldError(f"{path}: got {show(name)} a second time")
        names[name] = None
    if choice.mode in ("required", "named") and not (tools and choice.allowed != ()):
        raise ApiError(400, "tool_choice: requires a call, but there are no tools", param="tools")
    if choice.name is not None and choice.name not in names:
        shown, num_more = ", ".join(list(names)[:_SHOWN_TOOLS]), len(names) - _SHOWN_TOOLS
        more = f" and {num_more} more" if num_more > 0 else ""
        raise FieldError(
            f"tool_choice: got the tool {show(choice.name)}; allowed are {shown}{more}"
        )
    for name in choice.allowed or ():
        if name not in names:
            path = "tool_choice.allowed_tools.tools"
            raise FieldError(f"{path}: got {show(name)}, which is not in tools; add it to them")
