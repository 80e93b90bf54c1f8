"""Bodies of POST /v1/messages and /v1/messages/count_tokens: the Messages API of Anthropic."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, WithJsonSchema

from fd_dsa.engine.sampling_params import MAX_STOP_STRINGS
from fd_dsa.serve.errors import FieldError, show
from fd_dsa.serve.protocol.chat import MAX_TOOLS
from fd_dsa.serve.protocol.fields import MAX_ENTRIES, TEXT, at_most
from fd_dsa.serve.protocol.messages_input import add_messages, joined_texts
from fd_dsa.serve.protocol.translation import (
    Node,
    Refusals,
    TranslatedRequest,
    Translation,
    check_fields,
    nodes,
)

_FIRST = "not a field of /v1/messages; use"
_NO_CONTAINERS = "this server runs no tools itself and has no containers; leave it out"
_STORES_NOTHING = "this server stores no messages; send the whole conversation as messages"

REFUSED: Refusals = {
    "compaction": ((), "this server compacts nothing; shorten the messages"),
    "container": ((), _NO_CONTAINERS),
    "diagnostics": ((), f"{_STORES_NOTHING}, without diagnostics"),
    "fallback_credit_token": ((), "this server has no fallbacks; leave it out"),
    "fallbacks": (([],), "this server has no fallbacks; send the request again"),
    "inference_geo": ((), "the model runs where this server runs; leave it out"),
    "mcp_servers": (([],), "this server runs no tools itself; offer them as tools"),
    "speed": (("standard",), "allowed is standard"),
    "thread": ((), _STORES_NOTHING),
    # of chat completions
    "best_of": ((1,), "a message has one answer; send several requests"),
    "logprobs": ((False,), "messages have no scores; use /v1/chat/completions"),
    "max_completion_tokens": ((), f"{_FIRST} max_tokens"),
    "n": ((1,), "a message has one answer; send several requests"),
    "parallel_tool_calls": ((True,), f"{_FIRST} tool_choice.disable_parallel_tool_use"),
    "reasoning_effort": ((), f"{_FIRST} output_config.effort or thinking"),
    "response_format": ((), f"{_FIRST} output_config.format"),
    "stop": (([],), f"{_FIRST} stop_sequences"),
    "top_logprobs": ((0,), "messages have no scores; use /v1/chat/completions"),
}
"""Fields of a request that are refused; see `Refusals`."""

REFUSED_IN: dict[str, Refusals] = {
    "output_config": {"task_budget": ((), "the model knows no budget; use max_tokens")},
    "tools": {
        "allowed_callers": ((["direct"],), "only the model calls tools; leave it out"),
        "defer_loading": ((False,), "this server has no tool search; leave it out"),
    },
}
"""Refused fields of the objects in a request."""

IGNORED = frozenset(
    {
        "betas",
        "billing_policy",
        "cache_control",
        "context_management",
        "metadata",
        "service_tier",
        "user_profile_id",
        "workspace_id",
    }
)
"""Fields that cannot change the answer of this server, or only leave its prompt longer."""

_EFFORTS = ("low", "medium", "high", "xhigh", "max")
_MODES = {"auto": "auto", "any": "required", "none": "none"}
_DISPLAYS = ("summarized", "omitted", "updates")
_FUNCTION_FIELDS = ("name", "description", "strict", "input_examples")
_BLOCKS = {"type": "array", "items": {"type": "object"}}
_SystemField = Annotated[Any, WithJsonSchema({"anyOf": [TEXT, _BLOCKS]})]
_EXAMPLE = {"messages": [{"role": "user", "content": "Hello! What can you do?"}]}


class CountTokensRequest(TranslatedRequest, json_schema_extra={"examples": [_EXAMPLE]}):
    """Body of POST /v1/messages/count_tokens."""

    refused = REFUSED
    ignored = IGNORED

    messages: Annotated[list[Any], Field(min_length=1), at_most(MAX_ENTRIES)] = Field(
        description="Of role user, assistant or system; the answer goes on with a last message of "
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
        None, description="Older place of output_config.format."
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
            node.kind(("custom",), "this server runs no tools itself, the client does", "custom")
            check_fields(node.fields, REFUSED_IN["tools"], f"{node.path}.")
            schema = node.fields.get("input_schema")
            if not isinstance(schema, dict):
                raise FieldError(
                    f"{node.of('input_schema')}: got {show(schema)}; allowed is a JSON schema"
                )
            given = {k: node.fields.get(k) for k in _FUNCTION_FIELDS}
            kept = {k: v for k, v in given.items() if v is not None}
            made.add_tool(node.path, "input_schema", {**kept, "parameters": schema})
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
        check_fields(config.fields, REFUSED_IN["output_config"], "output_config.")
        effort = config.fields.get("effort")
        if effort is not None and effort not in _EFFORTS:
            raise FieldError(
                f"output_config.effort: got {show(effort)}; allowed are {', '.join(_EFFORTS)}"
            )
        made.fields["reasoning_effort"] = effort
        places = {
            "output_config.format": config.fields.get("format"),
            "output_format": self.output_format,
        }
        forms = {path: value for path, value in places.items() if value is not None}
        if len(forms) > 1:
            raise FieldError("output_format: given beside output_config.format; leave it out")
        for path, value in forms.items():
            node = Node(value, path)
            node.kind(("json_schema",), "this server has no such form")
            schema = node.fields.get("schema")
            if not isinstance(schema, dict):
                raise FieldError(f"{path}.schema: got {show(schema)}; allowed is a JSON schema")
            made.paths["response_format"] = path
            form = {"type": "json_schema", "json_schema": {"schema": schema}}
            made.fields["response_format"] = form

    def _translate_thinking(self, made: Translation) -> None:
        """Switch the reasoning; variables that the request has itself take precedence."""
        if self.thinking is None:
            return
        node = Node(self.thinking, "thinking")
        kind = node.kind(("enabled", "adaptive", "disabled"), "the model has one switch")
        display = node.fields.get("display")
        if display is not None and display not in _DISPLAYS:
            raise FieldError(
                f"thinking.display: got {show(display)}; allowed are {', '.join(_DISPLAYS)}"
            )
        if display == "omitted":
            made.fields.setdefault("include_reasoning", False)
        variables = made.fields.get("chat_template_kwargs") or {}
        if isinstance(variables, dict) and not {"thinking", "enable_thinking"} & set(variables):
            is_on = kind != "disabled"
            made.fields["chat_template_kwargs"] = {**variables, "enable_thinking": is_on}


_MESSAGE_EXAMPLE = {**_EXAMPLE, "max_tokens": 64}


class MessagesRequest(CountTokensRequest, json_schema_extra={"examples": [_MESSAGE_EXAMPLE]}):
    """Body of POST /v1/messages."""

    max_tokens: int = Field(
        ge=1, description="Most tokens to generate; the rest of the context, if that is less."
    )
