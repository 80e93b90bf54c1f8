"""Body of POST /v1/responses: the Responses API of OpenAI, without storage."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import orjson
from pydantic import Field, PlainValidator, PrivateAttr, WithJsonSchema

from fd_dsa.serve.body import LENIENT_BYTES
from fd_dsa.serve.errors import FieldError, show
from fd_dsa.serve.protocol import known_fields
from fd_dsa.serve.protocol.fields import (
    MAX_ENTRIES,
    TEXT,
    at_most,
    check_further_fields,
    packed_json,
    refuse,
)
from fd_dsa.serve.protocol.known_fields import Refused
from fd_dsa.serve.protocol.responses_input import add_items
from fd_dsa.serve.protocol.tools import MAX_TOOLS
from fd_dsa.serve.protocol.translation import (
    RUNS_NO_TOOLS,
    Node,
    TranslatedRequest,
    Translation,
    nodes,
    refused_beside,
)

_STORES_NOTHING = "this server stores no responses; send the whole conversation as input"
_NO_PROMPTS = "this server stores no prompts; send instructions and input"

REFUSED: Mapping[str, Refused] = {
    "access_programs": Refused(({},), reason="this server has none; leave it out"),
    "background": Refused(
        (False,), reason="this server stores no responses; leave it out, and use stream"
    ),
    "background_options": Refused(({},), reason=_STORES_NOTHING),
    "context_management": Refused(([],), reason="this server does not compact; shorten the input"),
    "conversation": Refused(reason=_STORES_NOTHING),
    "moderation": Refused(reason="this server has no moderation; leave it out"),
    "previous_response_id": Refused(reason=_STORES_NOTHING),
    "prompt": Refused(reason=_NO_PROMPTS),
    # fields of chat completions
    "best_of": Refused((1,), reason="a response has one answer; send several requests"),
    "functions": Refused(([],), "tools"),
    "function_call": Refused(instead="tool_choice"),
    "logprobs": Refused((False,), "include or top_logprobs"),
    "max_completion_tokens": Refused(instead="max_output_tokens"),
    "max_tokens": Refused(instead="max_output_tokens"),
    "messages": Refused(instead="input"),
    "n": Refused((1,), reason="a response has one answer; send several requests"),
    "reasoning_effort": Refused(instead="reasoning.effort"),
    "response_format": Refused(instead="text.format"),
    "verbosity": Refused(("medium",), "text.verbosity"),
}
"""Fields of a request that are refused, alongside the refused fields of chat."""

REFUSED_IN: Mapping[str, Mapping[str, Refused]] = {
    "reasoning": {
        "context": Refused(
            ("auto",), reason="the chat template decides which reasoning it keeps; leave it out"
        ),
        "mode": Refused(("standard",), reason="allowed is standard"),
    },
    "text": {
        "verbosity": Refused(
            ("medium",), reason="the model has no switch for it; ask for it in words"
        )
    },
    "tools": {
        "async": Refused(
            (False,), reason="the model waits for the results of its calls; leave it out"
        ),
        "allowed_callers": Refused(
            (["direct"],), reason="only the model calls functions; leave it out"
        ),
        "defer_loading": Refused((False,), reason="this server has no tool search; leave it out"),
    },
}
"""Refused fields of the objects in a request."""

IGNORED = known_fields.IGNORED | {"image", "stream_options"}
"""Fields that cannot change the answer of this server, in addition to those with a type below."""

# values of `include`; the first has an effect, the others belong to tools that this server lacks
_LOGPROBS = "message.output_text.logprobs"
_INCLUDED = (
    _LOGPROBS,
    "code_interpreter_call.outputs",
    "computer_call_output.output.image_url",
    "file_search_call.results",
    "message.input_image.image_url",
    "reasoning.encrypted_content",
    "web_search_call.action.sources",
    "web_search_call.results",
)
_CHOICES = ("none", "auto", "required")
_FORMATS = ("text", "json_object", "json_schema")
# the limits of the OpenAI API, whose answers repeat the metadata too
_MAX_METADATA = 16
_MAX_METADATA_CHARS = 512


def _input(value: object) -> str | list[Any]:
    if not isinstance(value, (str, list)) or not value:
        raise refuse(f"got {show(value)}; allowed is a text or a list of items, not empty")
    if isinstance(value, list) and len(value) > MAX_ENTRIES:
        raise refuse(f"has {len(value)} items; at most {MAX_ENTRIES} are allowed")
    return value


def _metadata(value: Any) -> dict[str, str]:
    is_short = isinstance(value, dict) and len(value) <= _MAX_METADATA
    texts = [*value, *value.values()] if is_short else [None]
    if not all(isinstance(text, str) and len(text) <= _MAX_METADATA_CHARS for text in texts):
        raise refuse(
            f"got {show(value)}; allowed is an object of up to {_MAX_METADATA} texts of up to "
            f"{_MAX_METADATA_CHARS} characters"
        )
    metadata: dict[str, str] = value
    return metadata


_LIST: dict[str, Any] = {"type": "array", "items": {"type": "object"}}
_InputField = Annotated[
    str | list[Any], PlainValidator(_input), WithJsonSchema({"anyOf": [TEXT, _LIST]})
]
_MetadataField = Annotated[
    dict[str, str],
    PlainValidator(_metadata),
    WithJsonSchema({"type": "object", "additionalProperties": TEXT}),
]
_ChoiceField = Annotated[
    Any, WithJsonSchema({"anyOf": [{**TEXT, "enum": list(_CHOICES)}, {"type": "object"}]})
]
_EXAMPLE = {"input": "Hello! What can you do?", "max_output_tokens": 64}


class ResponsesRequest(TranslatedRequest, json_schema_extra={"examples": [_EXAMPLE]}):
    """Body of POST /v1/responses."""

    refused_fields = refused_beside(REFUSED, IGNORED)
    ignored_fields = IGNORED

    input: _InputField = Field(description="A text, or messages, calls, their results, reasoning.")
    instructions: str | None = Field(None, description="The first system message.")
    max_output_tokens: int | None = Field(
        None, description="Maximum number of generated tokens, including the reasoning."
    )
    tools: Annotated[list[dict[str, Any]], at_most(MAX_TOOLS)] | None = Field(
        None, description="Functions that the model may call."
    )
    tool_choice: _ChoiceField = Field(
        None, description="none, auto, required, a function by its name, or allowed_tools."
    )
    parallel_tool_calls: bool | None = Field(
        None, description="false: an answer ends after its first call."
    )
    reasoning: dict[str, Any] | None = Field(None, description="effort, as in a chat completion.")
    text: dict[str, Any] | None = Field(
        None, description="format: of type text, json_object, or json_schema with a schema."
    )
    include: Annotated[list[str], at_most(MAX_ENTRIES)] | None = Field(
        None, description="message.output_text.logprobs adds scores; other values have no effect."
    )
    top_logprobs: int | None = Field(
        None, description="Most likely tokens scored for each token of the text, 0 to 20."
    )
    metadata: _MetadataField | None = Field(None, description="Texts that the response repeats.")
    truncation: Literal["auto", "disabled"] | None = Field(
        None, description="No effect: an input that is too long is a 400."
    )
    store: bool | None = Field(None, description="No effect: the server stores no responses.")
    max_tool_calls: int | None = Field(None, description="No effect: the server has no tools.")
    prompt_cache_key: str | None = None
    safety_identifier: str | None = None
    service_tier: str | None = None
    user: str | None = None

    _repeated: dict[str, orjson.Fragment] = PrivateAttr(default_factory=dict)

    @property
    def repeated(self) -> dict[str, orjson.Fragment]:
        """The fields that the response repeats unchanged, as JSON."""
        return self._repeated

    def translate(self, made: Translation) -> None:
        given = {name: getattr(self, name) for name in _REPEATED}
        if self.text is not None:
            given["text"] = {"format": {"type": "text"}, **self.text}
        self._repeated = {
            name: _packed(name, value)
            for name, value in given.items()
            if value is not None or name not in _NOT_NULL
        }
        made.paths |= {
            "max_completion_tokens": "max_output_tokens",
            "max_tokens": "max_output_tokens",
            "messages": "input",
            "reasoning_effort": "reasoning.effort",
            "response_format": "text.format",
            "tool_choice.allowed_tools": "tool_choice",
        }
        if self.instructions is not None:
            made.add_message("system", "instructions", content=self.instructions)
        if isinstance(self.input, str):
            made.add_message("user", "input", content=self.input)
        else:
            add_items(made, nodes(self.input, "input"))
        made.fields["max_completion_tokens"] = self.max_output_tokens
        made.fields["parallel_tool_calls"] = self.parallel_tool_calls
        self._translate_options(made)
        self._translate_tools(made)

    def _translate_options(self, made: Translation) -> None:
        """Translate reasoning, form and scores."""
        options = Node(self.reasoning or {}, "reasoning").fields
        check_further_fields(options, REFUSED_IN["reasoning"], "reasoning.")
        made.fields["reasoning_effort"] = options.get("effort")
        text = Node(self.text or {}, "text").fields
        check_further_fields(text, REFUSED_IN["text"], "text.")
        if text.get("format") is not None:
            made.fields["response_format"] = _format(Node(text["format"], "text.format"))
        for index, name in enumerate(self.include or []):
            if name not in _INCLUDED:
                allowed = ", ".join(_INCLUDED)
                raise FieldError(f"include[{index}]: got {show(name)}; allowed are {allowed}")
        if _LOGPROBS in (self.include or []) or self.top_logprobs:
            made.fields |= {"logprobs": True, "top_logprobs": self.top_logprobs}

    def _translate_tools(self, made: Translation) -> None:
        choice: Any = self.tool_choice
        if isinstance(choice, dict):
            node = Node(choice, "tool_choice")
            kinds = ("function", "allowed_tools")
            if node.kind(kinds, "this server runs no tools itself") == "function":
                choice = {"type": "function", "function": {"name": node.text("name")}}
            else:
                allowed = {"mode": node.one_of("mode", ("auto", "required")), "tools": _named(node)}
                choice = {"type": "allowed_tools", "allowed_tools": allowed}
        elif choice is not None and choice not in _CHOICES:
            raise FieldError(
                f"tool_choice: got {show(choice)}; allowed are {', '.join(_CHOICES)} and an object"
            )
        for node in nodes(self.tools or [], "tools"):
            node.kind(("function",), RUNS_NO_TOOLS)
            check_further_fields(node.fields, REFUSED_IN["tools"], f"{node.path}.")
            node.text("name")
            made.add_tool(node.path, "parameters", node.kept(_FUNCTION_FIELDS))
        made.fields["tool_choice"] = choice


_REPEATED = (
    *("instructions", "max_output_tokens", "max_tool_calls", "metadata", "prompt_cache_key"),
    *("safety_identifier", "text", "tool_choice", "tools", "user"),
)
# fields of a response that are never null
_NOT_NULL = ("metadata", "text", "tool_choice", "tools")


def _packed(name: str, value: object) -> orjson.Fragment:
    """Return a value of a request as JSON.

    Escapes keep half of a surrogate pair encodable.
    """
    packed = packed_json(value)
    # only a short body can have NaN (null in `packed`), and its JSON is at most this long
    if len(packed) > 8 * LENIENT_BYTES:
        return orjson.Fragment(packed)
    try:
        return orjson.Fragment(json.dumps(value, allow_nan=False))
    except ValueError as error:
        raise FieldError(f"{name}: cannot be written as JSON: {error}; correct it") from error


_FUNCTION_FIELDS = ("name", "description", "parameters", "strict", "output_schema")


def _named(choice: Node) -> list[dict[str, object]]:
    """Return the functions in a `tool_choice` of type allowed_tools, as a chat completion's."""
    named: list[dict[str, object]] = []
    for node in nodes(choice.fields.get("tools"), choice.of("tools")):
        node.kind(("function",), "this server runs no tools itself")
        named.append({"type": "function", "function": {"name": node.text("name")}})
    return named


def _format(node: Node) -> dict[str, Any]:
    """Return the `response_format` of a chat completion."""
    kind = node.kind(_FORMATS, "this server has no such form")
    if kind != "json_schema":
        return {"type": kind}
    node.schema("schema")
    kept = {k: v for k, v in node.fields.items() if k != "type"}
    return {"type": kind, "json_schema": kept}
