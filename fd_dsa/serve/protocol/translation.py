"""Requests of other APIs, as requests for a chat completion."""

from __future__ import annotations

import contextlib
import logging
from abc import abstractmethod
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from pydantic import Field, PrivateAttr, ValidationError

from fd_dsa.serve.errors import ApiError, FieldError, show, validation_refusal
from fd_dsa.serve.protocol.chat import ChatCompletionRequest
from fd_dsa.serve.protocol.fields import MAX_ENTRIES, MAX_FIELDS, Body

logger = logging.getLogger("fd_dsa.serve")

EXTENSIONS = frozenset(
    {
        "bad_words",
        "bad_words_token_ids",
        "cache_salt",
        "chat_template",
        "chat_template_kwargs",
        "frequency_penalty",
        "guided_choice",
        "guided_grammar",
        "guided_json",
        "guided_json_object",
        "guided_regex",
        "ignore_eos",
        "include_reasoning",
        "include_stop_str_in_output",
        "logit_bias",
        "min_p",
        "min_tokens",
        "presence_penalty",
        "repetition_penalty",
        "seed",
        "skip_special_tokens",
        "speculative",
        "stop",
        "stop_token_ids",
        "structured_outputs",
        "top_k",
    }
)
"""Fields of a chat completion that other APIs take too, under the same names."""

# fields of every request here that are fields of a chat completion
_SAME = ("model", "stream", "temperature", "top_p")

Refusals = Mapping[str, tuple[tuple[Any, ...], str]]
"""Name of a field -> values that change nothing (None is one of them), and what to do instead."""


def check_fields(fields: Mapping[str, Any], refused: Refusals, path: str = "") -> None:
    """Raise ApiError 400 for a field whose value cannot be honoured.

    Args:
        path: path of the object that has the fields, with a dot at its end.
    """
    for name, value in fields.items():
        if name not in refused:
            logger.debug("unknown field %s is ignored", show(name))
            continue
        neutral, reason = refused[name]
        # false is not 0
        if value is None or any(type(value) is type(v) and value == v for v in neutral):
            continue
        raise FieldError(f"{path}{name}: got {show(value)}; {reason}")


class Node:
    """An object of a request and its path, for translations that read it field by field."""

    def __init__(self, value: Any, path: str) -> None:
        if not isinstance(value, dict):
            raise FieldError(f"{path}: got {show(value)}; allowed is an object")
        if len(value) > MAX_FIELDS:
            raise FieldError(f"{path}: has {len(value)} fields; at most {MAX_FIELDS} are allowed")
        self.fields: dict[str, Any] = value
        self.path = path

    def of(self, name: str) -> str:
        """Path of a field."""
        return f"{self.path}.{name}"

    def text(self, name: str, default: str | None = None) -> str:
        """A field that is a text; without a default the field is required."""
        value = self.fields.get(name, default)
        if value is None and name not in self.fields:
            raise FieldError(f"{self.of(name)}: is missing; the field is required")
        if not isinstance(value, str):
            raise FieldError(f"{self.of(name)}: got {show(value)}; allowed is a string")
        return value

    def flag(self, name: str) -> bool:
        """A field that is true or false; false by default."""
        value = self.fields.get(name)
        if value is not None and not isinstance(value, bool):
            raise FieldError(f"{self.of(name)}: got {show(value)}; allowed is true or false")
        return bool(value)

    def kind(self, allowed: Collection[str], what: str, default: str | None = None) -> str:
        """The field `type`.

        Args:
            what: reason of a refusal.
        """
        value = self.fields.get("type", default)
        if value not in allowed:
            names = ", ".join(sorted(allowed))
            raise FieldError(f"{self.of('type')}: got {show(value)}; {what}; allowed is {names}")
        return str(value)


def nodes(value: Any, path: str) -> list[Node]:
    """The objects of a list."""
    if not isinstance(value, list):
        raise FieldError(f"{path}: got {show(value)}; allowed is a list of objects")
    if len(value) > MAX_ENTRIES:
        raise FieldError(f"{path}: has {len(value)} entries; at most {MAX_ENTRIES} are allowed")
    return [Node(entry, f"{path}[{index}]") for index, entry in enumerate(value)]


@dataclass
class Translation:
    """The body of a chat completion while it is made.

    Attributes:
        fields: fields of the chat completion.
        paths: path in the chat completion -> path in the request that it was made from.
    """

    fields: dict[str, Any] = field(default_factory=lambda: {"messages": []})
    paths: dict[str, str] = field(default_factory=dict)

    def add_message(self, role: str, path: str, **fields: Any) -> dict[str, Any]:
        """Append a message that was made from what is at `path`."""
        messages: list[dict[str, Any]] = self.fields["messages"]
        self.paths[f"messages[{len(messages)}]"] = path
        messages.append({"role": role, **fields})
        return messages[-1]

    def add_call(self, path: str, call_id: str, name: str, arguments: Any) -> None:
        """Append a call to the last message."""
        calls = self.fields["messages"][-1].setdefault("tool_calls", [])
        index = len(self.fields["messages"]) - 1
        self.paths[f"messages[{index}].tool_calls[{len(calls)}].function"] = path
        function = {"name": name, "arguments": arguments}
        calls.append({"id": call_id, "type": "function", "function": function})

    def add_tool(self, path: str, parameters: str, function: dict[str, Any]) -> None:
        """Append a function.

        Args:
            parameters: name that the request has for the schema of its arguments.
        """
        tools: list[dict[str, Any]] = self.fields.setdefault("tools", [])
        chat_path = f"tools[{len(tools)}].function"
        self.paths |= {chat_path: path, f"{chat_path}.parameters": f"{path}.{parameters}"}
        tools.append({"type": "function", "function": function})

    def renamed(self, error: ApiError) -> ApiError:
        """An error of the chat completion, under the names of the request."""
        param = error.param or ""
        begins = [p for p in self.paths if param.startswith(p) and param[len(p) :][:1] in "[."]
        if not begins:
            return error
        longest = max(begins, key=len)
        own, message = self.paths[longest] + param[len(longest) :], error.message
        if message.startswith(param):
            message = own + message[len(param) :]
        return ApiError(error.status, message, param=own, code=error.code, headers=error.headers)


class TranslatedRequest(Body):
    """A request of another API; `chat` is the same request for a chat completion."""

    refused: ClassVar[Refusals]
    ignored: ClassVar[frozenset[str]]

    model: str | None = Field(None, description="A served name; the first one by default.")
    stream: bool | None = None
    temperature: float | None = Field(
        None, description="0 is greedy; left out: what generation_config.json says, or 1."
    )
    top_p: float | None = None

    _chat: ChatCompletionRequest = PrivateAttr()
    _translation: Translation = PrivateAttr(default_factory=Translation)

    @property
    def chat(self) -> ChatCompletionRequest:
        """The request for a chat completion, after `check_supported`."""
        return self._chat

    @abstractmethod
    def translate(self, made: Translation) -> None:
        """Write the fields of the chat completion, in which extensions are already.

        Raises:
            ApiError: 400, a field is wrong or cannot be honoured.
        """

    def check_supported(self) -> None:
        """Translate the request; raises ApiError 400 for what cannot be honoured."""
        extra = self.model_extra or {}
        extensions = {name: value for name, value in extra.items() if name in EXTENSIONS}
        known = (EXTENSIONS | self.ignored) - self.refused.keys()
        others = {name: value for name, value in extra.items() if name not in known}
        check_fields(others, self.refused)
        made = self._translation
        made.fields |= {name: getattr(self, name) for name in _SAME} | extensions
        self.translate(made)
        with self.own_names():
            try:
                self._chat = ChatCompletionRequest.model_validate(made.fields)
            except ValidationError as error:
                raise validation_refusal(error) from error
            self._chat.check_supported()

    @contextlib.contextmanager
    def own_names(self) -> Iterator[None]:
        """Errors of the chat completion name the fields of this request."""
        try:
            yield
        except ApiError as error:
            raise self._translation.renamed(error) from error
