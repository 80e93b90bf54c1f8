"""Tools of a chat completion, and whether the model must call them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import PlainValidator, WithJsonSchema

from fd_dsa.serve.errors import ApiError, FieldError, show
from fd_dsa.serve.protocol.fields import TEXT, Body, refuse

MAX_TOOLS = 1024
"""Of a request."""

# tools that a message about them names
_SHOWN_TOOLS = 8
# the markup of all formats can hold such a name, and no other
_NAME = re.compile(r'[^\s"<>{}]{1,128}')
_MODES = ("none", "auto", "required")


def _name(value: Any) -> str:
    """Name of a tool."""
    if not isinstance(value, str) or not _NAME.fullmatch(value):
        raise refuse(
            f"got {show(value)}; allowed is a name of 1 to 128 characters without white space, "
            "quotation marks, angle brackets and braces"
        )
    return value


@dataclass(frozen=True)
class ToolChoice:
    """`tool_choice`: "none", "auto", "required", or "named" with the name of a tool."""

    mode: str
    name: str | None = None


def _choice(value: Any) -> ToolChoice:
    """`tool_choice` from a word or from an object that names a tool."""
    if value in _MODES:
        return ToolChoice(value)
    function = value.get("function") if isinstance(value, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    if isinstance(value, dict) and value.get("type") == "function" and isinstance(name, str):
        return ToolChoice("named", name)
    raise refuse(
        f"got {show(value)}; allowed are {', '.join(_MODES)} and "
        '{"type": "function", "function": {"name": "..."}}'
    )


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
    """A tool; functions are the only ones."""

    type: Literal["function"]
    function: FunctionDefinition


def check_tools(tools: Sequence[Tool], choice: ToolChoice) -> None:
    """Raise ApiError 400 where tools and choice do not go together."""
    # in their order, which a set would lose
    names = dict[str, None]()
    for index, tool in enumerate(tools):
        name = tool.function.name
        if name in names:
            path = f"tools[{index}].function.name"
            raise FieldError(f"{path}: got {show(name)} a second time")
        names[name] = None
    if choice.mode in ("required", "named") and not tools:
        raise ApiError(400, "tool_choice: asks for a call, but there are no tools", param="tools")
    if choice.name is not None and choice.name not in names:
        raise FieldError(
            f"tool_choice: got the tool {show(choice.name)}; allowed are {_listed(list(names))}"
        )


def _listed(names: Sequence[str]) -> str:
    """The first names, and how many there are beside them."""
    more = len(names) - _SHOWN_TOOLS
    shown = ", ".join(names[:_SHOWN_TOOLS])
    return f"{shown} and {more} more" if more > 0 else shown
