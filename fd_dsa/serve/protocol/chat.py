"""Body of POST /v1/chat/completions."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    FailFast,
    Field,
    PlainValidator,
    WithJsonSchema,
)

from fd_dsa.chat.template import REASONING, RESERVED, SWITCHES, Role
from fd_dsa.engine.sampling_params import MAX_LOGPROBS
from fd_dsa.serve.errors import FieldError, show
from fd_dsa.serve.protocol.fields import (
    MAX_ENTRIES,
    MAX_FIELDS,
    TEXT,
    Body,
    at_most,
    check_further_fields,
    packed_json,
    refuse,
)
from fd_dsa.serve.protocol.generation import GenerationRequest
from fd_dsa.serve.protocol.known_fields import REFUSED_IN_CHAT, REFUSED_IN_MESSAGES
from fd_dsa.serve.protocol.tools import MAX_TOOLS, ChoiceField, Tool, ToolChoice, check_tools

MAX_ARGUMENTS_CHARS = 1 << 20
"""Maximum length of the arguments of one call in the history, characters."""


# type of a content part -> name of its text field
_TEXT_PARTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}


def _content(value: object) -> str | list[dict[str, Any]] | None:
    """Return the content as a string or as text parts with their further fields."""
    if value is None or isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise refuse(f"got {show(value)}; allowed is a string or a list of text parts")
    if len(value) > MAX_ENTRIES:
        raise refuse(f"has {len(value)} parts; at most {MAX_ENTRIES} are allowed")
    parts = []
    for index, part in enumerate(value):
        if isinstance(part, str):
            # as in vLLM
            part = {"type": "text", "text": part}
        elif not isinstance(part, dict):
            raise refuse(f"got {show(part)} as part {index}; allowed is a text part or a string")
        kind = part.get("type")
        field = _TEXT_PARTS.get(kind) if isinstance(kind, str) else None
        if field is None:
            raise refuse(f"part {index} has type {show(kind)}; this server reads text only")
        if not isinstance(part.get(field), str):
            raise refuse(f"part {index} has no {field}; give it as a string")
        if len(part) > MAX_FIELDS:
            raise refuse(f"part {index} has {len(part)} fields; at most {MAX_FIELDS} are allowed")
        parts.append({**part, "type": "text", "text": part[field]})
    return parts


def _arguments(value: object) -> str:
    """Return the arguments of a call as text, which may be cut as in the earlier answer.

    An object is accepted, as in other servers. An empty text and null mean no arguments.
    """
    if value is None:
        return ""
    if isinstance(value, dict):
        _check_arguments(len(packed_json(value).decode()))
        value = json.dumps(value, ensure_ascii=False)
    if not isinstance(value, str):
        raise refuse(f"got {show(value)}; allowed is the JSON text of an object")
    _check_arguments(len(value))
    return value


def _check_arguments(num_chars: int) -> None:
    if num_chars > MAX_ARGUMENTS_CHARS:
        raise refuse(
            f"has {num_chars} characters; at most {MAX_ARGUMENTS_CHARS} are allowed in one call"
        )


def _thinking(value: Any) -> bool | None:
    """Return the reasoning switch from a bool or from the object of hosted APIs."""
    if value is None or isinstance(value, bool):
        return value
    kind = value.get("type") if isinstance(value, dict) else None
    if kind not in ("enabled", "disabled"):
        raise refuse(
            f"got {show(value)}; allowed are true, false, "
            '{"type": "enabled"} and {"type": "disabled"}'
        )
    for name in value:
        if name != "type":
            raise refuse(
                f"has the field {show(name)}; allowed is only type; use reasoning_effort or "
                "chat_template_kwargs for the rest"
            )
    return bool(kind == "enabled")


# developer is the newer name of system
_RoleField = Annotated[Role, AfterValidator(lambda role: "system" if role == "developer" else role)]
_ContentField = Annotated[
    str | list[dict[str, Any]] | None,
    PlainValidator(_content),
    WithJsonSchema(
        {"anyOf": [TEXT, {"type": "array", "items": {"anyOf": [{"type": "object"}, TEXT]}}]}
    ),
]
_ArgumentsField = Annotated[str, PlainValidator(_arguments), WithJsonSchema(TEXT)]
_ThinkingField = Annotated[
    bool,
    PlainValidator(_thinking),
    WithJsonSchema({"anyOf": [{"type": "boolean"}, {"type": "object"}]}),
]


class CalledFunction(Body):
    """The function of a call in the history."""

    name: str = Field(min_length=1)
    arguments: _ArgumentsField = Field("", description="JSON text; may be cut, as in an answer.")


class CallInHistory(Body):
    """A call that the assistant made in an earlier answer."""

    id: str | None = None
    type: Annotated[Literal["function"], BeforeValidator(lambda kind: kind or "function")] = (
        "function"
    )
    function: CalledFunction


class ChatMessage(Body):
    """A message. Unknown fields, such as `name`, reach the chat template."""

    role: _RoleField
    content: _ContentField = Field(None, description="Needed, but in the assistant's messages.")
    refusal: str | None = Field(None, description="Content of an answer that refuses.")
    reasoning_content: str | None = Field(None, description="Reasoning of an earlier answer.")
    reasoning: str | None = Field(None, description="Another name of reasoning_content.")
    thinking: str | None = Field(None, description="Another name of reasoning_content.")
    tool_calls: Annotated[list[CallInHistory], at_most(MAX_ENTRIES)] | None = None
    tool_call_id: str | None = Field(None, description="The call that a tool's result is of.")

    def check(self, path: str) -> None:
        """Raise ApiError 400 if fields contradict each other.

        `path` is the path of the message.
        """
        check_further_fields(self.model_extra or {}, REFUSED_IN_MESSAGES, f"{path}.")
        if self.role == "assistant":
            return
        for name in ("tool_calls", "refusal", *REASONING):
            if getattr(self, name):
                raise FieldError(
                    f"{path}.{name}: given in a message of role {self.role}; only one of role "
                    "assistant has it"
                )
        if self.content is None or (self.content == [] and self.role != "tool"):
            is_given = "content" in self.model_fields_set
            what = f"got {show(self.content)}" if is_given else "is missing"
            raise FieldError(
                f"{path}.content: {what}; allowed is a string or a list of text parts; null is "
                "for a message of role assistant only, an empty list also for a tool's"
            )

    def for_template(self) -> dict[str, Any]:
        """Return the message for the template, without refusal and with one reasoning field."""
        # a copy of a client's long list would hold the interpreter for a long time
        further = {k: v for k, v in (self.model_extra or {}).items() if v is not None}
        fields = self.model_dump(exclude_none=True, exclude={"refusal", *REASONING, *further})
        reasoning = next(filter(None, (getattr(self, name) for name in REASONING)), None)
        return {
            **fields,
            **further,
            "content": self.content or self.refusal or "",
            **({"reasoning_content": reasoning} if reasoning else {}),
        }


ReasoningEffort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]


_EXAMPLE = {
    "messages": [{"role": "user", "content": "Hello! What can you do?"}],
    "max_tokens": 64,
}


class ChatCompletionRequest(GenerationRequest, json_schema_extra={"examples": [_EXAMPLE]}):
    """Body of POST /v1/chat/completions."""

    refused_fields = REFUSED_IN_CHAT

    messages: Annotated[list[ChatMessage], Field(min_length=1), FailFast(), at_most(MAX_ENTRIES)]
    max_completion_tokens: int | None = Field(None, description="Newer name of max_tokens.")
    logprobs: bool | None = Field(None, description="Score every token of the answer.")
    top_logprobs: int | None = Field(
        None, description="Most likely tokens scored for each, 0 to 20; only with logprobs."
    )
    tools: Annotated[list[Tool], at_most(MAX_TOOLS)] | None = Field(
        None, description="Functions that the model may call."
    )
    tool_choice: ChoiceField | None = Field(
        None,
        description="none, auto (with tools the default), required, a tool by its name, or "
        "allowed_tools.",
    )
    parallel_tool_calls: bool | None = Field(
        None, description="false: an answer ends after its first call."
    )
    reasoning_effort: ReasoningEffort | None = Field(
        None, description="none switches the reasoning off, anything else on."
    )
    enable_thinking: bool | None = Field(None, description="Switches the reasoning on or off.")
    thinking: _ThinkingField | None = Field(
        None, description='The same; a bool, {"type": "enabled"} or {"type": "disabled"}.'
    )
    include_reasoning: bool | None = Field(
        None, description="false: the model reasons, and the answer does not show it."
    )
    constrain_reasoning: bool | None = Field(
        None,
        description="true: stop, min_tokens and bad words begin with the reasoning; by default "
        "they begin after it.",
    )
    chat_template: str | None = Field(
        None, description="A Jinja template; needs --trust-request-chat-template."
    )
    chat_template_kwargs: Annotated[dict[str, Any], at_most(MAX_FIELDS)] | None = Field(
        None, description="Variables of the template, such as thinking or enable_thinking."
    )
    add_generation_prompt: bool | None = Field(
        None, description="End the prompt with the start of an answer (default: true)."
    )
    continue_final_message: bool | None = Field(
        None, description="Continue the last message, which is the assistant's."
    )

    @property
    def choice(self) -> ToolChoice:
        """`tool_choice` with its default."""
        return self.tool_choice or ToolChoice("auto" if self.tools else "none")

    @property
    def offered_tools(self) -> list[Tool]:
        """The tools that the prompt lists."""
        choice, tools = self.choice, self.tools or []
        if choice.allowed is not None:
            allowed = set(choice.allowed)
            return [tool for tool in tools if tool.function.name in allowed]
        return tools if choice.mode != "none" else []

    @property
    def one_call(self) -> bool:
        """True if an answer has at most one call."""
        return self.parallel_tool_calls is False or self.choice.mode == "named"

    @property
    def template_variables(self) -> dict[str, Any]:
        """`chat_template_kwargs`, completed by the fields of the reasoning, as in vLLM."""
        variables = dict(self.chat_template_kwargs or {})
        effort = self.reasoning_effort
        switches = (
            self.enable_thinking,
            self.thinking,
            None if effort is None else effort != "none",
        )
        switch = next((value for value in switches if value is not None), None)
        if switch is not None and not any(name in variables for name in SWITCHES):
            variables["enable_thinking"] = switch
        return variables if effort is None else {"reasoning_effort": effort, **variables}

    def check_supported(self) -> None:
        """Raise ApiError 400 for unsupported or contradictory fields."""
        super().check_supported()
        for index, message in enumerate(self.messages):
            message.check(f"messages[{index}]")
        check_tools(self.tools or [], self.choice)
        if {self.thinking, self.enable_thinking} == {True, False}:
            raise FieldError(
                "thinking: differs from enable_thinking; they are two names of one switch, send one"
            )
        if self.continue_final_message and self.add_generation_prompt:
            raise FieldError(
                "continue_final_message: true together with add_generation_prompt; an answer "
                "either continues the last message or begins a new one"
            )
        for name in self.chat_template_kwargs or {}:
            if name in RESERVED:
                raise FieldError(
                    f"chat_template_kwargs: has {name}, which is not a variable of the caller's; "
                    "leave it out"
                )

    def score_fields(self) -> dict[str, int | None]:
        """Convert the flag and the number of scores to the numbers of SamplingParams.

        Raises:
            ApiError: 400 if the number is out of range, or given without the flag.
        """
        count = self.top_logprobs or 0
        if not 0 <= count <= MAX_LOGPROBS:
            raise FieldError(f"top_logprobs: got {count}; allowed is 0 to {MAX_LOGPROBS}")
        if count and not self.logprobs:
            raise FieldError(
                f'top_logprobs: got {count} without logprobs; set "logprobs": true or leave it out'
            )
        return {
            "logprobs": count if self.logprobs else None,
            "prompt_logprobs": self.prompt_logprobs,
        }
