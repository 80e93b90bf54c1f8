"""Answers of the Responses API: a response, its items, and the events of its stream."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import orjson
from typing_extensions import TypedDict

from fd_dsa.serve.protocol.answers import ChatToken, PackedAs

Scores = Annotated[list[Any] | orjson.Fragment, PackedAs(list[ChatToken])]
ItemStatus = Literal["in_progress", "completed", "incomplete"]


class InputTokensDetails(TypedDict):
    """Input tokens found in the prefix cache."""

    cached_tokens: int
    cache_write_tokens: int


class OutputTokensDetails(TypedDict):
    """Tokens of the reasoning."""

    reasoning_tokens: int


class ResponseUsage(TypedDict):
    """Token counts of a response."""

    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int


class TextPart(TypedDict):
    """The text of a message."""

    type: Literal["output_text"]
    text: str
    annotations: list[Any]
    logprobs: Scores


class ReasoningPart(TypedDict):
    """The text of the reasoning."""

    type: Literal["reasoning_text"]
    text: str


class CallItem(TypedDict):
    """A call of a function."""

    id: str
    type: Literal["function_call"]
    status: ItemStatus
    call_id: str
    name: str
    arguments: str


class MessageItem(TypedDict):
    """A message of the assistant."""

    id: str
    type: Literal["message"]
    status: ItemStatus
    role: Literal["assistant"]
    content: list[TextPart]


class ReasoningItem(TypedDict):
    """The reasoning before a message or a call."""

    id: str
    type: Literal["reasoning"]
    status: ItemStatus
    summary: list[Any]
    content: list[ReasoningPart]


Part = TextPart | ReasoningPart
Item = CallItem | MessageItem | ReasoningItem


class ResponseError(TypedDict):
    """Reason why a response has failed."""

    code: str
    message: str


class IncompleteDetails(TypedDict):
    """Reason why a response is incomplete."""

    reason: Literal["max_output_tokens"]


class ResponseReasoning(TypedDict):
    """The reasoning effort of the request."""

    effort: str | None
    summary: None


class ResponseObject(TypedDict):
    """A response, which repeats fields of its request."""

    id: str
    object: Literal["response"]
    created_at: int
    completed_at: int | None
    status: Literal["in_progress", "completed", "incomplete", "failed"]
    background: bool
    error: ResponseError | None
    incomplete_details: IncompleteDetails | None
    instructions: str | None
    max_output_tokens: int | None
    max_tool_calls: int | None
    metadata: dict[str, str]
    model: str
    output: list[Item]
    parallel_tool_calls: bool
    previous_response_id: None
    prompt_cache_key: str | None
    reasoning: ResponseReasoning
    safety_identifier: str | None
    service_tier: str
    store: bool
    temperature: float
    text: dict[str, Any]
    tool_choice: str | dict[str, Any]
    tools: list[dict[str, Any]]
    top_logprobs: int
    top_p: float
    truncation: str
    usage: ResponseUsage | None
    user: str | None


class _Event(TypedDict):
    sequence_number: int


class ResponseEvent(_Event):
    """An event with the response, at its beginning or end."""

    type: Literal[
        "response.created",
        "response.in_progress",
        "response.completed",
        "response.incomplete",
        "response.failed",
    ]
    response: ResponseObject


class ItemEvent(_Event):
    """An event with an item, at its beginning or end."""

    type: Literal["response.output_item.added", "response.output_item.done"]
    output_index: int
    item: Item


class _ItemPlace(_Event):
    item_id: str
    output_index: int


class PartEvent(_ItemPlace):
    """An event with a part of an item, at its beginning or end."""

    type: Literal["response.content_part.added", "response.content_part.done"]
    content_index: int
    part: Part


class TextDeltaEvent(_ItemPlace):
    """An addition to the text of a message."""

    type: Literal["response.output_text.delta"]
    content_index: int
    delta: str
    logprobs: Scores


class TextDoneEvent(_ItemPlace):
    """The whole text of a message."""

    type: Literal["response.output_text.done"]
    content_index: int
    text: str
    logprobs: Scores


class ReasoningDeltaEvent(_ItemPlace):
    """An addition to the reasoning."""

    type: Literal["response.reasoning_text.delta"]
    content_index: int
    delta: str


class ReasoningDoneEvent(_ItemPlace):
    """The whole text of the reasoning."""

    type: Literal["response.reasoning_text.done"]
    content_index: int
    text: str


class ArgumentsDeltaEvent(_ItemPlace):
    """An addition to the arguments of a call."""

    type: Literal["response.function_call_arguments.delta"]
    delta: str


class ArgumentsDoneEvent(_ItemPlace):
    """All arguments of a call."""

    type: Literal["response.function_call_arguments.done"]
    arguments: str
    name: str


StreamEvent = (
    ResponseEvent
    | ItemEvent
    | PartEvent
    | TextDeltaEvent
    | TextDoneEvent
    | ReasoningDeltaEvent
    | ReasoningDoneEvent
    | ArgumentsDeltaEvent
    | ArgumentsDoneEvent
)
