"""Translates requests of other APIs to requests for a chat completion."""

from __future__ import annotations

import contextlib
from abc import abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from pydantic import PrivateAttr, ValidationError

from fd_dsa.serve.errors import ApiError, FieldError, show, validation_refusal
from fd_dsa.serve.protocol.chat import ChatCompletionRequest
from fd_dsa.serve.protocol.fields import MAX_ENTRIES, MAX_FIELDS
from fd_dsa.serve.protocol.generation import ModelFields
from fd_dsa.serve.protocol.known_fields import REFUSED_IN_CHAT, Refused

_SAME = tuple(ModelFields.model_fields)
# fields of a chat completion that other APIs express differently
_OF_CHAT = frozenset(
    {
        *("messages", "add_generation_prompt", "continue_final_message"),
        *("max_tokens", "max_completion_tokens", "reasoning_effort", "response_format"),
        *("tools", "tool_choice", "parallel_tool_calls"),
        *("n", "best_of", "stream_options", "logprobs", "top_logprobs", "prompt_logprobs"),
        *("return_token_ids", "return_topk_positions"),
    }
)
EXTENSIONS = frozenset(ChatCompletionRequest.model_fields) - _OF_CHAT - set(_SAME)
"""Fields of a chat completion that other APIs accept under the same names."""
READS_TEXT = "this server reads text only"
# some tools of a client are without a schema, because models of the API know them
RUNS_NO_TOOLS = "this server runs no tools itself, the client does, and describes each by a schema"


def refused_beside(own: Mapping[str, Refused], ignored: Collection[str]) -> dict[str, Refused]:
    """Return the refused fields of an API: its own, chat's own, and those refused in chat.

    Args:
        ignored: names that the API ignores.
    """
    of_chat = dict.fromkeys(_OF_CHAT, Refused((False,), "/v1/chat/completions"))
    refused = {**REFUSED_IN_CHAT, **of_chat, **own}
    return {name: rule for name, rule in refused.items() if name not in ignored}


class Node:
    """An object of a request with its path, read field by field by a translation."""

    def __init__(self, value: object, path: str) -> None:
        if not isinstance(value, dict):
            raise FieldError(f"{path}: got {show(value)}; allowed is an object")
        if len(value) > MAX_FIELDS:
            raise FieldError(f"{path}: has {len(value)} fields; at most {MAX_FIELDS} are allowed")
        self.fields: dict[str, Any] = value
        self.path = path

    def of(self, name: str) -> str:
        """Return the path of a field."""
        return f"{self.path}.{name}"

    def text(self, name: str) -> str:
        """Return a required field that must be a string."""
        if name not in self.fields:
            raise FieldError(f"{self.of(name)}: is missing; the field is required")
        value = self.fields[name]
        if not isinstance(value, str):
            raise FieldError(f"{self.of(name)}: got {show(value)}; allowed is a string")
        return value

    def flag(self, name: str) -> bool:
        """Return a field that must be true or false. Absent means false."""
        value = self.fields.get(name)
        if value is not None and not isinstance(value, bool):
            raise FieldError(f"{self.of(name)}: got {show(value)}; allowed is true or false")
        return bool(value)

    def schema(self, name: str) -> dict[str, Any]:
        """Return a field that must be a JSON schema."""
        value = self.fields.get(name)
        if not isinstance(value, dict):
            raise FieldError(f"{self.of(name)}: got {show(value)}; allowed is a JSON schema")
        return value

    def one_of(self, name: str, allowed: Sequence[str]) -> str:
        """Return a field that must be one of several texts."""
        value = self.fields.get(name)
        if value not in allowed:
            names = ", ".join(allowed)
            raise FieldError(f"{self.of(name)}: got {show(value)}; allowed are {names}")
        return str(value)

    def option(self, name: str, allowed: Sequence[str]) -> str | None:
        """Return a field that may be one of several texts. Absent and null mean None."""
        return None if self.fields.get(name) is None else self.one_of(name, allowed)

    def kept(self, names: Sequence[str]) -> dict[str, Any]:
        """Return the fields of these names that have a value."""
        given = ((name, self.fields.get(name)) for name in names)
        return {name: value for name, value in given if value is not None}

    def kind(self, allowed: Collection[str], what: str, default: str | None = None) -> str:
        """Return the field `type`.

        Args:
            what: reason for a refusal.
        """
        value = self.fields.get("type", default)
        if value not in allowed:
            names = ", ".join(sorted(allowed))
            raise FieldError(f"{self.of('type')}: got {show(value)}; {what}; allowed is {names}")
        return str(value)


def nodes(value: object, path: str) -> list[Node]:
    """Return the objects of a list."""
    if not isinstance(value, list):
        raise FieldError(f"{path}: got {show(value)}; allowed is a list of objects")
    if len(value) > MAX_ENTRIES:
        raise FieldError(f"{path}: has {len(value)} entries; at most {MAX_ENTRIES} are allowed")
    return [Node(entry, f"{path}[{index}]") for index, entry in enumerate(value)]


def texts_of(value: object, path: str, kinds: Collection[str], name: str) -> list[str]:
    """Return the texts of a content, which is a string or a list of objects with a text.

    Args:
        kinds: types of the objects. The text of a `refusal` is its field of this name.
        name: what the API calls the objects.
    """
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list):
        raise FieldError(f"{path}: got {show(value)}; allowed is a string or a list of text {name}")
    texts = []
    for part in nodes(value, path):
        kind = part.kind(kinds, READS_TEXT)
        texts.append(part.text("refusal" if kind == "refusal" else "text"))
    return texts


@dataclass
class Translation:
    """The body of a chat completion under construction.

    Attributes:
        fields: fields of the chat completion.
        paths: path in the chat completion -> path in the original request.
    """

    fields: dict[str, Any] = field(default_factory=lambda: {"messages": []})
    paths: dict[str, str] = field(default_factory=dict)

    def add_message(self, role: str, path: str, **fields: object) -> dict[str, Any]:
        """Append a message that was made from the object at `path`."""
        messages: list[dict[str, Any]] = self.fields["messages"]
        self.paths[f"messages[{len(messages)}]"] = path
        messages.append({"role": role, **fields})
        return messages[-1]

    def add_call(self, path: str, call_id: str, name: str, arguments: object) -> None:
        """Append a call to the last message."""
        calls = self.fields["messages"][-1].setdefault("tool_calls", [])
        index = len(self.fields["messages"]) - 1
        self.paths[f"messages[{index}].tool_calls[{len(calls)}].function"] = path
        function = {"name": name, "arguments": arguments}
        calls.append({"id": call_id, "type": "function", "function": function})

    def add_tool(self, path: str, parameters: str, function: dict[str, object]) -> None:
        """Append a function.

        Args:
            parameters: the request's field name for the schema of the arguments.
        """
        tools: list[dict[str, Any]] = self.fields.setdefault("tools", [])
        chat_path = f"tools[{len(tools)}].function"
        self.paths |= {chat_path: path, f"{chat_path}.parameters": f"{path}.{parameters}"}
        tools.append({"type": "function", "function": function})

    def renamed(self, error: ApiError) -> ApiError:
        """Return an error of the chat completion with the field names of the request."""
        param = error.param or ""
        begins = [p for p in self.paths if param.startswith(p) and param[len(p) :][:1] in "[."]
        if not begins:
            return error
        longest = max(begins, key=len)
        own, message = self.paths[longest] + param[len(longest) :], error.message
        if message.startswith(param):
            message = own + message[len(param) :]
        return ApiError(error.status, message, param=own, code=error.code, headers=error.headers)


class TranslatedRequest(ModelFields):
    """A request of another API. `chat` is the equivalent chat completion."""

    ignored_fields: ClassVar[frozenset[str]]

    _chat: ChatCompletionRequest = PrivateAttr()
    _translation: Translation = PrivateAttr(default_factory=Translation)

    @property
    def chat(self) -> ChatCompletionRequest:
        """The request for a chat completion, after `check_supported`."""
        return self._chat

    @property
    def unknown_fields(self) -> Sequence[str]:
        known = EXTENSIONS | self.ignored_fields
        return [name for name in super().unknown_fields if name not in known]

    @abstractmethod
    def translate(self, made: Translation) -> None:
        """Write the fields of the chat completion. Extensions are written already.

        Raises:
            ApiError: 400 for an invalid or unsupported field.
        """

    def check_supported(self) -> None:
        """Translate the request. Raises ApiError 400 for unsupported fields."""
        super().check_supported()
        extra = self.model_extra or {}
        made = self._translation
        made.fields |= {name: getattr(self, name) for name in _SAME}
        made.fields |= {name: value for name, value in extra.items() if name in EXTENSIONS}
        self.translate(made)
        with self.own_names():
            try:
                self._chat = ChatCompletionRequest.model_validate(made.fields)
            except ValidationError as error:
                raise validation_refusal(error) from error
            self._chat.check_supported()

    @contextlib.contextmanager
    def own_names(self) -> Iterator[None]:
        """Rename the fields in errors of the chat completion to the fields of this request."""
        try:
            yield
        except ApiError as error:
            raise self._translation.renamed(error) from error
