"""Arguments of the calls of LLM, converted from every allowed form to that of the engine."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any, get_args

import numpy as np

from fd_dsa.chat.parser import AnswerFormat
from fd_dsa.chat.template import RESERVED, Role, opens_reasoning
from fd_dsa.engine.reasoning import Reasoning
from fd_dsa.engine.sampling_params import SamplingParams
from fd_dsa.engine.tokenizer import Tokenizer
from fd_dsa.errors import ArgumentError, argument_error, nearest_name

Prompt = str | Sequence[int]
Prompts = str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]]
Message = Mapping[str, Any]
Conversations = Sequence[Message] | Sequence[Sequence[Message]]
Params = SamplingParams | Sequence[SamplingParams] | None

SAMPLING_FIELDS = tuple(one.name for one in fields(SamplingParams))
"""Names of the arguments of SamplingParams."""

_ROLES: tuple[str, ...] = get_args(Role)
_MESSAGE = '{"role": "user", "content": TEXT}'
_TOOL = '{"type": "function", "function": {"name": NAME, "parameters": SCHEMA}}'


def read_prompts(prompts: object) -> list[str | list[int]]:
    """List the prompts of one of the four forms, each a text or token ids.

    Raises:
        ArgumentError: the prompts have another form.
    """
    if isinstance(prompts, str):
        return [prompts]
    several = _entries(
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
    several = _entries("messages", messages, rule)
    if any(isinstance(one, (str, Mapping)) for one in several):
        return [_conversation("messages", several)]
    return [
        _conversation(f"messages[{i}]", _entries(f"messages[{i}]", one, "a list of messages"))
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
    entries = _entries("tools", tools, "a list of tools")
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


def read_params(
    params: object, count: int, default: SamplingParams, counted: str
) -> list[SamplingParams]:
    """Give each of `count` prompts its SamplingParams.

    Args:
        counted: name of the argument that has the prompts.

    Raises:
        ArgumentError: the parameters have another type or number.
    """
    if params is None or isinstance(params, SamplingParams):
        return [params or default] * count
    rule = "a SamplingParams, or a list with one for each prompt"
    if isinstance(params, Mapping):
        given = ", ".join(f"{key}=..." for key in params if key in SAMPLING_FIELDS)
        raise argument_error("sampling_params", params, rule, f"write SamplingParams({given})")
    several = _entries("sampling_params", params, rule, "write SamplingParams(NAME=VALUE)")
    for index, one in enumerate(several):
        if not isinstance(one, SamplingParams):
            name = f"sampling_params[{index}]"
            raise argument_error(name, one, "a SamplingParams", "write SamplingParams(NAME=VALUE)")
    if len(several) != count:
        raise ArgumentError(
            f"sampling_params: got {len(several)} entries for {count} {counted}; must be one for "
            "all, or a list with one for each; write a single SamplingParams"
        )
    return several


def fit_into_context(
    params: Sequence[SamplingParams], prompts: Sequence[Sequence[int]], max_model_len: int
) -> list[SamplingParams]:
    """Lower each `max_tokens` of a caller without parameters to the room after the prompt."""
    fitting = []
    for one, prompt in zip(params, prompts, strict=True):
        room = max(max_model_len - len(prompt), 1)
        is_long = one.max_tokens is not None and one.max_tokens > room
        fitting.append(replace(one, max_tokens=room) if is_long else one)
    return fitting


def check_switches(**switches: object) -> None:
    """Raise the ArgumentError of an argument that is neither True nor False."""
    for name, value in switches.items():
        if not isinstance(value, bool):
            raise argument_error(name, value, "True or False")


def place_of(name: str, index: int, count: int) -> str:
    """Name one of the prompts of a call, as in `prompts[2]`."""
    return f"{name}[{index}]" if count > 1 else name


@contextlib.contextmanager
def naming(place: str) -> Iterator[None]:
    """Put the name of an argument before the error that its value causes.

    Errors about an argument of SamplingParams have a name already.
    """
    try:
        yield
    except ArgumentError:
        raise
    except ValueError as error:
        if str(error).partition(" ")[0].rstrip(":") in SAMPLING_FIELDS:
            raise
        raise ArgumentError(f"{place}: {error}") from error


def for_chat(
    params: SamplingParams,
    tokenizer: Tokenizer,
    has_tools: bool,
    prompt: str,
    continued: Message | None,
) -> SamplingParams:
    """Add the markers that separate the parts of an answer, if it has several parts.

    Args:
        params: parameters of the request.
        tokenizer: tokenizer of the model.
        has_tools: True if the model may call tools.
        prompt: text of the prompt, whose markers show if the answer begins in the reasoning.
        continued: message that the answer continues, or None.
    """
    renderer = tokenizer.chat_renderer
    if renderer is None:
        return params
    has_reasoning = renderer.has_reasoning()
    tool_format = renderer.tool_format() if has_tools else None
    if not has_reasoning and tool_format is None:
        return params
    in_reasoning = opens_reasoning(prompt, continued)
    answer = AnswerFormat(has_reasoning, in_reasoning, tool_format)
    kept = frozenset(tokenizer.special_ids_of(answer.markers).values())
    return replace(
        params,
        kept_special_token_ids=params.kept_special_token_ids | kept,
        reasoning=Reasoning.of(answer) if params.reasoning is None else params.reasoning,
    )


def _entries(name: str, value: object, rule: str, hint: str = "") -> list[Any]:
    """List the entries of an argument that has several."""
    is_unordered = isinstance(value, (str, bytes, bytearray, Mapping, set, frozenset))
    if is_unordered or not isinstance(value, Iterable):
        raise argument_error(name, value, rule, hint)
    return list(value)


def _is_id(value: object) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def _token_ids(name: str, value: object) -> list[int]:
    """List the token ids of one prompt."""
    hint = "chat takes messages" if isinstance(value, Mapping) and "role" in value else ""
    ids = _entries(name, value, "a text or a list of token ids", hint)
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
        for index, call in enumerate(_entries(f"{name}.tool_calls", calls, "a list of calls")):
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
