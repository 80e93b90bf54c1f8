"""Arguments of calls: accepted forms, checks, and errors with hints."""

from __future__ import annotations

import contextlib
import functools
import inspect
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, ParamSpec, TypeVar, get_args

import numpy as np

from fd_dsa.chat.template import RESERVED, Role
from fd_dsa.errors import ArgumentError, argument_error, nearest_name

_P = ParamSpec("_P")
_R = TypeVar("_R")
_T = TypeVar("_T")
Prompts = str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]]
Message = Mapping[str, Any]
Conversations = Sequence[Message] | Sequence[Sequence[Message]]

MAX_TEXT_CHARS = 512
MAX_TOKEN_ID = 2**31 - 1
LARGEST = sys.float_info.max
"""Upper bound of a number without a bound."""
_ROLES: tuple[str, ...] = get_args(Role)
_MESSAGE = '{"role": "user", "content": TEXT}'
_TOOL = '{"type": "function", "function": {"name": NAME, "parameters": SCHEMA}}'


def explain_calls(
    hints: Mapping[str, str],
) -> Callable[[Callable[_P, _R]], Callable[_P, _R]]:
    """Decorate a function so that a call which does not fit its signature raises ArgumentError.

    The signature is read only after a TypeError, so calls that fit take no more time.

    Args:
        hints: names that callers of other libraries write, and what to write here.
    """

    def decorate(function: Callable[_P, _R]) -> Callable[_P, _R]:
        @functools.wraps(function)
        def call(*args: _P.args, **kwargs: _P.kwargs) -> _R:
            try:
                return function(*args, **kwargs)
            except TypeError:
                refusal = _refusal(function, args, kwargs, hints)
                if refusal is not None:
                    try:
                        raise refusal from None
                    finally:
                        # its traceback has this frame
                        del refusal
                # the call fits, so the error came from inside of the function
                raise

        return call

    return decorate


def explain_fields(hints: Mapping[str, str]) -> Callable[[type[_T]], type[_T]]:
    """Decorate a dataclass as `explain_calls` decorates a function."""

    def decorate(cls: type[_T]) -> type[_T]:
        cls.__init__ = explain_calls(hints)(cls.__init__)  # type: ignore[method-assign]
        return cls

    return decorate


def _refusal(
    function: Callable[..., object],
    args: tuple[object, ...],
    kwargs: Mapping[str, object],
    hints: Mapping[str, str],
) -> ArgumentError | None:
    """Make the error of a call, or None if the call fits the signature."""
    parameters = inspect.signature(function).parameters
    owner = function.__qualname__.removesuffix(".__init__")
    kind = function.__qualname__.split(".")[-2:][0]
    is_method = "self" in parameters and kind != owner
    if is_method and args and kind not in (one.__name__ for one in type(args[0]).__mro__):
        hint = f"call the method of an instance: {kind.lower()} = {kind}()"
        return argument_error("self", args[0], f"an instance of {kind}", hint)
    names = [name for name in parameters if name != "self"]
    for name, value in kwargs.items():
        if name not in names:
            return argument_error(
                name, value, f"an argument of {owner}", _instead(name, names, hints)
            )
    placed = [
        name
        for name, one in parameters.items()
        if one.kind in (one.POSITIONAL_ONLY, one.POSITIONAL_OR_KEYWORD)
    ]
    if len(args) > len(placed):
        # the first one is self
        num_placed = len(placed) - 1
        named = ", ".join(name for name in names if name not in placed) or "those of the others"
        return argument_error(
            f"argument {num_placed + 1}",
            args[len(placed)],
            f"given by its name, since {owner} takes {num_placed} without one",
            f"write NAME=VALUE; the names are {named}",
        )
    for name in placed[: len(args)]:
        if name in kwargs:
            return ArgumentError(
                f"{name}: got two values, one without a name; must be one; leave one out"
            )
    for name in placed[len(args) :]:
        if parameters[name].default is inspect.Parameter.empty and name not in kwargs:
            return ArgumentError(
                f"{name}: got nothing; must be an argument of {owner}; write {name}=VALUE"
            )
    return None


def _instead(name: str, names: list[str], hints: Mapping[str, str]) -> str:
    """Say what to write for an unknown name."""
    if name.lower() in hints:
        return hints[name.lower()]
    near = nearest_name(name.lower(), (*names, *hints))
    if near is not None and near in hints:
        return hints[near]
    return f"write {near}" if near else f"the names are {', '.join(names)}"


def check_number(name: str, value: Any, low: float, high: float, kind: type, of: str = "") -> None:
    """Raise ArgumentError unless `value` is a number of this type in [low, high].

    Args:
        kind: int or float.
        of: names the entry of the value in the message.
    """
    types, noun = (int, "an integer") if kind is int else ((int, float), "a number")
    is_number = isinstance(value, types) and not isinstance(value, bool)
    if not is_number or not low <= value <= high:
        allowed = f"{noun} in [{low}, {high}]"
        if high >= LARGEST:
            allowed = f"{noun if kind is int else 'a finite number'} >= {low}"
        raise argument_error(name, value, f"{allowed}{of}", _plain_number(value))


def _plain_number(value: object) -> str:
    """Return the hint for a number of NumPy, which may look like one of Python."""
    return "write VALUE.item()" if isinstance(value, np.generic) else ""


def check_texts(name: str, texts: Sequence[object], max_texts: int, max_chars: int) -> None:
    """Raise ArgumentError unless these are non-empty strings within the limits."""
    if len(texts) > max_texts:
        raise ArgumentError(f"{name}: got {len(texts)} entries; must be at most {max_texts}")
    num_chars = 0
    for text in texts:
        if not isinstance(text, str) or not text:
            raise argument_error(name, text, "a non-empty string, as every entry")
        if len(text) > MAX_TEXT_CHARS:
            raise ArgumentError(
                f"{name}: got an entry of {len(text)} characters; must be at most {MAX_TEXT_CHARS}"
            )
        if not text.isascii() and any("\ud800" <= char <= "\udfff" for char in text):
            raise argument_error(name, text, "valid Unicode, as every entry")
        num_chars += len(text)
    if num_chars > max_chars:
        raise ArgumentError(
            f"{name}: got {num_chars} characters in all; must be at most {max_chars}"
        )


def check_token_ids(name: str, token_ids: object) -> None:
    """Raise ArgumentError unless this is None or a sequence of possible token ids."""
    if token_ids is None:
        return
    if isinstance(token_ids, str) or not isinstance(token_ids, Sequence):
        raise argument_error(name, token_ids, "a list of token ids")
    for token_id in token_ids:
        integer = isinstance(token_id, int) and not isinstance(token_id, bool)
        if not integer or not 0 <= token_id <= MAX_TOKEN_ID:
            rule = f"a token id, 0 to {MAX_TOKEN_ID}, as every entry"
            raise argument_error(name, token_id, rule, _plain_number(token_id))


def read_prompts(prompts: object) -> list[str | list[int]]:
    """List the prompts of one of the four forms, each a text or token ids.

    Raises:
        ArgumentError: the prompts have another form.
    """
    if isinstance(prompts, str):
        return [prompts]
    several = list_entries(
        "prompts", prompts, "a text, token ids, or a list of either", "write [TEXT] or [[ID, ID]]"
    )
    if several and _is_id(several[0]):
        return [_token_ids("prompts", several)]
    return [
        one if isinstance(one, str) else _token_ids(f"prompts[{index}]", one)
        for index, one in enumerate(several)
    ]


def read_conversations(messages: object) -> list[list[Message]]:
    """List the conversations of either form, each a list of messages.

    Raises:
        ArgumentError: the messages have another form, or one lacks a role or content.
    """
    rule = "a list of messages, or a list of such lists"
    if isinstance(messages, str):
        raise argument_error("messages", messages, rule, f"write [{_MESSAGE}]")
    if isinstance(messages, Mapping):
        raise argument_error("messages", messages, rule, "write [MESSAGE]")
    several = list_entries("messages", messages, rule)
    if any(isinstance(one, (str, Mapping)) for one in several):
        return [_conversation("messages", several)]
    return [
        _conversation(f"messages[{i}]", list_entries(f"messages[{i}]", one, "a list of messages"))
        for i, one in enumerate(several)
    ]


def read_tools(tools: object) -> Sequence[Message] | None:
    """Check the tools of a conversation.

    Raises:
        ArgumentError: a tool has another form than in the OpenAI API.
    """
    if tools is None:
        return None
    if isinstance(tools, Mapping):
        raise argument_error("tools", tools, "a list of tools", "write [TOOL]")
    entries = list_entries("tools", tools, "a list of tools")
    for index, tool in enumerate(entries):
        function = tool.get("function") if isinstance(tool, Mapping) else None
        name = function.get("name") if isinstance(function, Mapping) else None
        if not isinstance(name, str) or not name:
            raise argument_error(
                f"tools[{index}]", tool, "a function with a name", f"write {_TOOL}"
            )
    return entries


def read_variables(variables: object) -> Mapping[str, Any]:
    """Check the variables of a chat template.

    Raises:
        ArgumentError: the variables are no mapping of names, or one of them is set by the call.
    """
    name = "chat_template_kwargs"
    if variables is None:
        return {}
    if not isinstance(variables, Mapping):
        raise argument_error(name, variables, "a dict of variables", 'write {"thinking": True}')
    for key in variables:
        if not isinstance(key, str) or key in RESERVED:
            hint = "leave it out, the call sets it" if key in RESERVED else "write names as texts"
            raise argument_error(name, key, "a variable of the template", hint)
    return variables


def check_switches(**switches: object) -> None:
    """Raise the ArgumentError of an argument that is neither True nor False."""
    for name, value in switches.items():
        if not isinstance(value, bool):
            raise argument_error(name, value, "True or False")


@contextlib.contextmanager
def naming(name: str, index: int, count: int, named: Collection[str]) -> Iterator[None]:
    """Raise the error of a value as an ArgumentError that begins with its name.

    Args:
        name: argument that has `count` values, of which this one is `index`.
        named: arguments whose errors have their names already.
    """
    try:
        yield
    except ArgumentError:
        raise
    except ValueError as error:
        text, place = str(error), f"{name}[{index}]" if count > 1 else name
        has_name = text.partition(" ")[0].rstrip(":") in named
        raise ArgumentError(text if has_name else f"{place}: {text}") from error


def list_entries(name: str, value: object, rule: str, hint: str = "") -> list[Any]:
    """List the entries of an argument that has several."""
    is_unordered = isinstance(value, (str, bytes, bytearray, Mapping, set, frozenset))
    # an array without dimensions is iterable by its type alone
    is_scalar = isinstance(value, np.ndarray) and not value.ndim
    if is_unordered or is_scalar or not isinstance(value, Iterable):
        raise argument_error(name, value, rule, hint)
    return list(value)


def _is_id(value: object) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def _token_ids(name: str, value: object) -> list[int]:
    """List the token ids of one prompt."""
    hint = "chat takes messages" if isinstance(value, Mapping) and "role" in value else ""
    ids = list_entries(name, value, "a text or a list of token ids", hint)
    for index, one in enumerate(ids):
        if not _is_id(one):
            raise argument_error(f"{name}[{index}]", one, "a token id, an integer")
    return ids


def _conversation(name: str, messages: list[Any]) -> list[Message]:
    """Check the messages of one conversation."""
    if not messages:
        raise argument_error(name, messages, "a list with a message", f"write [{_MESSAGE}]")
    for index, message in enumerate(messages):
        _check_message(f"{name}[{index}]", message)
    return messages


def _check_message(name: str, message: object) -> None:
    """Raise the ArgumentError of a message that no chat template can show."""
    if not isinstance(message, Mapping):
        raise argument_error(name, message, "a message", f"write {_MESSAGE}")
    for key in ("role", "content"):
        if key not in message and (key == "role" or message.get("role") != "assistant"):
            near = nearest_name(key, [one for one in message if isinstance(one, str)])
            hint = f"write {key} for {near}" if near else f"write {_MESSAGE}"
            raise argument_error(name, message, f"a message with the key {key}", hint)
    role, content = message["role"], message.get("content")
    if role not in _ROLES:
        near = nearest_name(role, _ROLES) if isinstance(role, str) else None
        hint = f"write {near}" if near else ""
        raise argument_error(f"{name}.role", role, f"one of {', '.join(_ROLES)}", hint)
    if isinstance(content, list):
        for index, part in enumerate(content):
            text = part.get("text") if isinstance(part, Mapping) else None
            if not isinstance(text, str):
                hint = 'models read only text; write {"type": "text", "text": TEXT}'
                raise argument_error(f"{name}.content[{index}]", part, "a text part", hint)
    elif not isinstance(content, str) and (content is not None or role != "assistant"):
        raise argument_error(f"{name}.content", content, "a text or a list of text parts")
    calls = message.get("tool_calls")
    if calls is not None:
        for index, call in enumerate(list_entries(f"{name}.tool_calls", calls, "a list of calls")):
            _check_call(f"{name}.tool_calls[{index}]", call)


def _check_call(name: str, call: object) -> None:
    """Raise the ArgumentError of a call in the history that no chat template can show."""
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        hint = 'write {"type": "function", "function": {"name": NAME, "arguments": TEXT}}'
        raise argument_error(name, call, "a call of a function", hint)
    arguments = function.get("arguments")
    if arguments is not None and not isinstance(arguments, (str, Mapping)):
        place = f"{name}.function.arguments"
        raise argument_error(place, arguments, "a JSON text or a dict")
