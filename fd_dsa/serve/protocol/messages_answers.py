"""Answers of the Messages API: a message, its blocks, and the events of its stream."""

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
    """Token counts of a message. The input count excludes cached tokens."""

    input_tokens: int
    cache_creation_input_tokens: int
    cache_read_input_tokens: int
    output_tokens: int
    output_tokens_details: ThinkingTokens
    service_tier: NotRequired[Literal["standard"]]


class TextBlock(TypedDict):
    """A block with a text."""

    type: Literal["text"]
    text: str


class ThinkingBlock(TypedDict):
    """A block with the reasoning."""

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
    """An event that keeps the connection alive."""

    type: Literal["ping"]


class BlockStartEvent(TypedDict):
    """The start of a block of content."""

    type: Literal["content_block_start"]
    index: int
    content_block: ContentBlock


class TextDelta(TypedDict):
    """An addition to a text."""

    type: Literal["text_delta"]
    text: str


class ThinkingDelta(TypedDict):
    """An addition to the reasoning."""

    type: Literal["thinking_delta"]
    thinking: str


class SignatureDelta(TypedDict):
    """The signature at the end of a reasoning."""

    type: Literal["signature_delta"]
    signature: str


class InputDelta(TypedDict):
    """An addition to the input of a call, as JSON text."""

    type: Literal["input_json_delta"]
    partial_json: str


BlockDelta = TextDelta | ThinkingDelta | SignatureDelta | InputDelta


class BlockDeltaEvent(TypedDict):
    """An addition to a block of content."""

    type: Literal["content_block_delta"]
    index: int
    delta: BlockDelta


class BlockStopEvent(TypedDict):
    """The end of a block of content."""

    type: Literal["content_block_stop"]
    index: int


class MessageDeltaEvent(TypedDict):
    """The stop reason and the token counts."""

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
