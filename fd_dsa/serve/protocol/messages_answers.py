"""Answers of the Messages API: a message, its blocks of content, and the events of its stream."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import orjson
from typing_extensions import NotRequired, TypedDict

from fd_dsa.serve.protocol.answers import PackedAs

StopReason = Literal[
    "end_turn", "max_tokens", "stop_sequence", "tool_use", "model_context_window_exceeded"
]


class ThinkingTokens(TypedDict):
    """Tokens of the thinking."""

    thinking_tokens: int


class MessageUsage(TypedDict):
    """Token counts of a message, without cached tokens in those of the input."""

    input_tokens: int
    cache_creation_input_tokens: int
    cache_read_input_tokens: int
    output_tokens: int
    output_tokens_details: ThinkingTokens
    service_tier: NotRequired[Literal["standard"]]


class TextBlock(TypedDict):
    """A text."""

    type: Literal["text"]
    text: str


class ThinkingBlock(TypedDict):
    """A reasoning."""

    type: Literal["thinking"]
    thinking: str
    signature: str


class ToolUseBlock(TypedDict):
    """A call of a tool."""

    type: Literal["tool_use"]
    id: str
    name: str
    input: Annotated[dict[str, Any] | orjson.Fragment, PackedAs(dict[str, Any])]


ContentBlock = TextBlock | ThinkingBlock | ToolUseBlock


class Stop(TypedDict):
    """Reason why a message has ended, null before its end."""

    stop_reason: StopReason | None
    stop_sequence: str | None


class AnsweredMessage(Stop):
    """The answer to a message."""

    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[ContentBlock]
    usage: MessageUsage


class MessageStartEvent(TypedDict):
    """The message before its content."""

    type: Literal["message_start"]
    message: AnsweredMessage


class PingEvent(TypedDict):
    """Sign of life."""

    type: Literal["ping"]


class BlockStartEvent(TypedDict):
    """A block of content that begins."""

    type: Literal["content_block_start"]
    index: int
    content_block: ContentBlock


class TextDelta(TypedDict):
    """More of a text."""

    type: Literal["text_delta"]
    text: str


class ThinkingDelta(TypedDict):
    """More of a reasoning."""

    type: Literal["thinking_delta"]
    thinking: str


class SignatureDelta(TypedDict):
    """The signature at the end of a reasoning."""

    type: Literal["signature_delta"]
    signature: str


class InputDelta(TypedDict):
    """More of the input of a call, as JSON text."""

    type: Literal["input_json_delta"]
    partial_json: str


BlockDelta = TextDelta | ThinkingDelta | SignatureDelta | InputDelta


class BlockDeltaEvent(TypedDict):
    """More of a block of content."""

    type: Literal["content_block_delta"]
    index: int
    delta: BlockDelta


class BlockStopEvent(TypedDict):
    """The end of a block of content."""

    type: Literal["content_block_stop"]
    index: int


class MessageDeltaEvent(TypedDict):
    """Reason of the end and token counts."""

    type: Literal["message_delta"]
    delta: Stop
    usage: MessageUsage


class MessageStopEvent(TypedDict):
    """The end of the message."""

    type: Literal["message_stop"]


StreamEvent = (
    MessageStartEvent
    | PingEvent
    | BlockStartEvent
    | BlockDeltaEvent
    | BlockStopEvent
    | MessageDeltaEvent
    | MessageStopEvent
)
