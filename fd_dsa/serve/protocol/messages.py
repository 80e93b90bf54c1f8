"""Bodies of POST /v1/messages and /v1/messages/count_tokens of Anthropic's API."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field, WithJsonSchema

from fd_dsa.engine.sampling_params import MAX_STOP_STRINGS
from fd_dsa.serve.errors import FieldError
from fd_dsa.serve.protocol import known_fields
from fd_dsa.serve.protocol.fields import MAX_ENTRIES, TEXT, at_most, check_further_fields
from fd_dsa.serve.protocol.known_fields import Refused
from fd_dsa.serve.protocol.messages_input import add_messages, joined_texts
from fd_dsa.serve.protocol.tools import MAX_TOOLS
from fd_dsa.serve.protocol.translation import (
    RUNS_NO_TOOLS,
    Node,
    TranslatedRequest,
    Translation,
    nodes,
    refused_beside,
)

_NO_CONTAINERS = "this server runs no tools itself and has no containers; leave it out"
_STORES_NOTHING = "this server stores no messages; send the whole conversation as messages"

REFUSED: Mapping[str, Refused] = {
    "compaction": Refused(reason="this server does not compact; shorten the messages"),
    "container": Refused(reason=_NO_CONTAINERS),
    "diagnostics": Refused(reason=f"{_STORES_NOTHING}, without diagnostics"),
    "fallback_credit_token": Refused(reason="this server has no fallbacks; leave it out"),
    "fallbacks": Refused(([],), reason="this server has no fallbacks; send the request again"),
    "inference_geo": Refused(reason="the model runs where this server runs; leave it out"),
    "mcp_servers": Refused(([],), reason="this server runs no tools itself; offer them as tools"),
    "speed": Refused(("standard",), reason="allowed is standard"),
    # after this code the tool runner of the `anthropic` client sends whole conversations
    "thread": Refused(reason=_STORES_NOTHING, code="thread_unsupported_request"),
    # fields of chat completions
    "best_of": Refused((1,), reason="a message has one answer; send several requests"),
    "logprobs": Refused((False,), reason="messages have no scores; use /v1/chat/completions"),
    "max_completion_tokens": Refused(instead="max_tokens"),
    "n": Refused((1,), reason="a message has one answer; send several requests"),
    "parallel_tool_calls": Refused((True,), "tool_choice.disable_parallel_tool_use"),
    "reasoning_effort": Refused(instead="output_config.effort or thinking"),
    "response_format": Refused(instead="output_config.format"),
    "stop": Refused(([],), "stop_sequences"),
    "top_logprobs": Refused((0,), reason="messages have no scores; use /v1/chat/completions"),
}
"""Fields of a request that are refused, alongside the refused fields of chat."""

REFUSED_IN: Mapping[str, Mapping[str, Refused]] = {
    "output_config": {"task_budget": Refused(reason="the model knows no budget; use max_tokens")},
    "tools": {
        "allowed_callers": Refused(
            (["direct"],), reason="only the model calls tools; leave it out"
        ),
        "defer_loading": Refused((False,), reason="this server has no tool search; leave it out"),
    },
}
"""Refused fields of the objects in a request."""

IGNORED = known_fields.IGNORED | {
    *("betas", "billing_policy", "cache_control", "context_management", "user_profile_id"),
    "workspace_id",
}
"""Fields without effect on an answer, or whose effect is only a shorter prompt."""

_EFFORTS = ("low", "medium", "high", "xhigh", "max")
_MODES = {"auto": "auto", "any": "required", "none": "none"}
_DISPLAYS = ("summarized", "omitted", "updates")
_FUNCTION_FIELDS = ("name", "description", "strict", "input_examples")
_BLOCKS = {"type": "array", "items": {"type": "object"}}
_SystemField = Annotated[Any, WithJsonSchema({"anyOf": [TEXT, _BLOCKS]})]
_EXAMPLE = {"messages": [{"role": "user", "content": "Hello! What can you do?"}]}


class CountTokensRequest(TranslatedRequest, json_schema_extra={"examples": [_EXAMPLE]}):
    """Body of POST /v1/messages/count_tokens."""

    # a whole body of /v1/messages can be counted
    ignored_fields = IGNORED | {"max_tokens"}
    refused_fields = refused_beside(REFUSED, ignored_fields)

    messages: Annotated[list[Any], Field(min_length=1), at_most(MAX_ENTRIES)] = Field(
        description="Of role user, assistant or system; the answer continues a last message of "
        "the assistant."
    )
    system: _SystemField = Field(None, description="A text or a list of text blocks.")
    tools: Annotated[list[dict[str, Any]], at_most(MAX_TOOLS)] | None = Field(
        None, description="Tools of the client."
    )
    tool_choice: dict[str, Any] | None = Field(
        None, description="Of type auto, any, tool or none; disable_parallel_tool_use."
    )
    thinking: dict[str, Any] | None = Field(
        None, description="Of type enabled, adaptive or disabled; display omitted hides it."
    )
    output_config: dict[str, Any] | None = Field(
        None, description="effort, and format of type json_schema with a schema."
    )
    output_format: dict[str, Any] | None = Field(
        None, description="Older name of output_config.format."
    )
    stop_sequences: Annotated[list[str], at_most(MAX_STOP_STRINGS)] | None = Field(
        None, description="Texts that end the answer."
    )

    def translate(self, made: Translation) -> None:
        made.paths["stop"] = "stop_sequences"
        if self.system is not None:
            made.add_message("system", "system", content=joined_texts(self.system, "system"))
        add_messages(made, nodes(self.messages, "messages"))
        is_prefill = made.fields["messages"][-1]["role"] == "assistant"
        made.fields["continue_final_message"] = is_prefill or None
        made.fields["stop"] = self.stop_sequences or None
        self._translate_tools(made)
        self._translate_output(made)
        self._translate_thinking(made)

    def _translate_tools(self, made: Translation) -> None:
        for node in nodes(self.tools or [], "tools"):
            node.kind(("custom",), RUNS_NO_TOOLS, "custom")
            check_further_fields(node.fields, REFUSED_IN["tools"], f"{node.path}.")
            function = {**node.kept(_FUNCTION_FIELDS), "parameters": node.schema("input_schema")}
            made.add_tool(node.path, "input_schema", function)
        if self.tool_choice is None:
            return
        node = Node(self.tool_choice, "tool_choice")
        kind = node.kind((*_MODES, "tool"), "no such choice")
        made.fields["tool_choice"] = (
            {"type": "function", "function": {"name": node.text("name")}}
            if kind == "tool"
            else _MODES[kind]
        )
        if node.flag("disable_parallel_tool_use"):
            made.fields["parallel_tool_calls"] = False

    def _translate_output(self, made: Translation) -> None:
        config = Node(self.output_config or {}, "output_config")
        check_further_fields(config.fields, REFUSED_IN["output_config"], "output_config.")
        made.fields["reasoning_effort"] = config.option("effort", _EFFORTS)
        given = {
            "output_config.format": config.fields.get("format"),
            "output_format": self.output_format,
        }
        forms = {path: value for path, value in given.items() if value is not None}
        if len(forms) > 1:
            raise FieldError("output_format: given with output_config.format; leave it out")
        for path, value in forms.items():
            node = Node(value, path)
            node.kind(("json_schema",), "this server has no such form")
            made.paths["response_format"] = path
            form = {"type": "json_schema", "json_schema": {"schema": node.schema("schema")}}
            made.fields["response_format"] = form

    def _translate_thinking(self, made: Translation) -> None:
        """Switch the reasoning, unless an extension field switches it already."""
        if self.thinking is None:
            return
        node = Node(self.thinking, "thinking")
        kind = node.kind(("enabled", "adaptive", "disabled"), "the model has one switch")
        if node.option("display", _DISPLAYS) == "omitted":
            made.fields.setdefault("include_reasoning", False)
        made.fields.setdefault("enable_thinking", kind != "disabled")


_MESSAGE_EXAMPLE = {**_EXAMPLE, "max_tokens": 64}


class MessagesRequest(CountTokensRequest, json_schema_extra={"examples": [_MESSAGE_EXAMPLE]}):
    """Body of POST /v1/messages."""

    max_tokens: int = Field(
        ge=1, description="Maximum number of tokens, limited by the rest of the context."
    )
