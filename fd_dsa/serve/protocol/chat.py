"""Body of POST /v1/chat/completions."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import FailFast, Field

from fd_dsa.chat.template import RESERVED
from fd_dsa.engine.sampling_params import MAX_LOGPROBS
from fd_dsa.serve.errors import FieldError
from fd_dsa.serve.protocol.fields import MAX_ENTRIES, MAX_FIELDS, at_most
from fd_dsa.serve.protocol.generation import GenerationRequest
from fd_dsa.serve.protocol.messages import ChatMessage
from fd_dsa.serve.protocol.tools import MAX_TOOLS, ChoiceField, Tool, ToolChoice, check_tools
from fd_dsa.serve.protocol.unsupported import IN_CHAT

ReasoningEffort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]
_SWITCHES = ("thinking", "enable_thinking")


class ChatCompletionRequest(GenerationRequest):
    """Body of POST /v1/chat/completions."""

    unsupported_fields = IN_CHAT

    messages: Annotated[list[ChatMessage], Field(min_length=1), FailFast(), at_most(MAX_ENTRIES)]
    max_completion_tokens: int | None = Field(None, description="Newer name of max_tokens.")
    logprobs: bool | None = Field(None, description="Score every token of the answer.")
    top_logprobs: int | None = Field(
        None, description="Likeliest tokens scored beside each, 0 to 20; only with logprobs."
    )
    tools: Annotated[list[Tool], at_most(MAX_TOOLS)] | None = Field(
        None, description="Functions that the model may call."
    )
    tool_choice: ChoiceField | None = Field(
        None, description="none, auto (with tools the default), required, or a tool by its name."
    )
    parallel_tool_calls: bool | None = Field(
        None, description="false: an answer ends after its first call."
    )
    reasoning_effort: ReasoningEffort | None = Field(
        None, description="none switches the reasoning off, anything else on."
    )
    include_reasoning: bool | None = Field(
        None, description="false: the model reasons, and the answer does not show it."
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
        None, description="Go on with the last message, the assistant's."
    )

    @property
    def choice(self) -> ToolChoice:
        """`tool_choice` with its default."""
        return self.tool_choice or ToolChoice("auto" if self.tools else "none")

    @property
    def one_call(self) -> bool:
        """Whether an answer has one call at most."""
        return self.parallel_tool_calls is False or self.choice.mode == "named"

    @property
    def template_variables(self) -> dict[str, Any]:
        """`chat_template_kwargs`, and what `reasoning_effort` adds to them, as in vLLM."""
        variables = dict(self.chat_template_kwargs or {})
        if self.reasoning_effort is None:
            return variables
        if not any(name in variables for name in _SWITCHES):
            variables["enable_thinking"] = self.reasoning_effort != "none"
        return {"reasoning_effort": self.reasoning_effort, **variables}

    def check_supported(self) -> None:
        """Raise ApiError 400 for fields that cannot be honoured, or not together."""
        super().check_supported()
        for index, message in enumerate(self.messages):
            message.check(f"messages[{index}]")
        check_tools(self.tools or [], self.choice)
        if self.continue_final_message and self.add_generation_prompt:
            raise FieldError(
                "continue_final_message: true together with add_generation_prompt; an answer "
                "either goes on with the last message or begins a new one"
            )
        for name in self.chat_template_kwargs or {}:
            if name in RESERVED:
                raise FieldError(
                    f"chat_template_kwargs: has {name}, which is not a variable of the caller's; "
                    "leave it out"
                )

    def score_fields(self) -> dict[str, int | None]:
        """A flag and a number become one number.

        Raises:
            ApiError: 400, the number is out of range, or there without the flag.
        """
        most = self.top_logprobs or 0
        if not 0 <= most <= MAX_LOGPROBS:
            raise FieldError(f"top_logprobs: got {most}; allowed is 0 to {MAX_LOGPROBS}")
        if most and not self.logprobs:
            raise FieldError(
                f'top_logprobs: got {most} without logprobs; set "logprobs": true or leave it out'
            )
        return {
            "logprobs": most if self.logprobs else None,
            "prompt_logprobs": self.prompt_logprobs,
        }
