"""POST /v1/messages and /v1/messages/count_tokens: the Messages API of Anthropic."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import orjson
from fastapi import APIRouter, Request
from pydantic_core import from_json
from starlette.responses import Response

# pydantic reads only this TypedDict before Python 3.12
from typing_extensions import TypedDict

from fd_dsa.chat.parser import AnswerFormat
from fd_dsa.serve.answer import respond
from fd_dsa.serve.blocks import Block, BlockAnswer, Change
from fd_dsa.serve.body import BodyRoute
from fd_dsa.serve.chat_prompt import make_job
from fd_dsa.serve.errors import AnthropicErrorResponse, ApiError, error_responses
from fd_dsa.serve.generation import Job
from fd_dsa.serve.json_response import JsonResponse
from fd_dsa.serve.protocol.messages import CountTokensRequest, MessagesRequest
from fd_dsa.serve.protocol.messages_answers import (
    AnsweredMessage,
    BlockDelta,
    BlockDeltaEvent,
    ContentBlock,
    MessageStartEvent,
    MessageUsage,
    PingEvent,
    Stop,
    StopReason,
    StreamEvent,
)
from fd_dsa.serve.state import ServerState, State
from fd_dsa.serve.tokenization import count_prompt_tokens

if TYPE_CHECKING:
    from fd_dsa.engine.output import RequestOutput

PATH = "/v1/messages"

# clients send it back with the thinking; this server does not verify it
_SIGNATURE = "unsigned"

router = APIRouter(route_class=BodyRoute, responses=error_responses(AnthropicErrorResponse))


class TokenCount(TypedDict):
    """Number of tokens of a prompt."""

    input_tokens: int


@router.post(
    PATH, summary="Answer a conversation, in blocks of content", response_model=AnsweredMessage
)
async def create_message(body: MessagesRequest, request: Request, state: State) -> Response:
    """Answer the messages in the chat format of the model."""

    def make(answer_id: str) -> MessageAnswer:
        job, answer_format = make_job(state, body.chat, answer_id, max_generated=body.max_tokens)
        return MessageAnswer(state, body, job, answer_format)

    with body.own_names():
        return await respond(make, "msg_", body.chat, request, state)


@router.post(f"{PATH}/count_tokens", summary="Tokens of a prompt", response_model=TokenCount)
async def count_tokens(body: CountTokensRequest, request: Request, state: State) -> Response:
    """Count the tokens of the prompt that the same message would have."""
    count: TokenCount = {"input_tokens": await count_prompt_tokens(body, request, state)}
    return JsonResponse(count)


class MessageAnswer(BlockAnswer):
    """A message. Each block of the answer becomes a block of content."""

    whole_object = chunk_object = "message"

    def __init__(
        self, state: ServerState, body: MessagesRequest, job: Job, answer_format: AnswerFormat
    ) -> None:
        super().__init__(state, body.chat, job, answer_format)
        self._room = state.engine.max_model_len - len(job.prompt_token_ids)
        self._is_begun = False

    def choices(self) -> Iterator[AnsweredMessage]:
        content = [_content(block, is_begun=True) for block in self.blocks]
        yield self._message(content, self._stop(self.outputs[0, 0]), self._usage())

    def deltas(self, job_index: int, output: RequestOutput) -> Sequence[Mapping[str, Any]]:
        """See `Answer`.

        The message starts with the first step, which knows the cached tokens.
        """
        events = super().deltas(job_index, output)
        if self._is_begun:
            return events
        self._is_begun = True
        none_yet: Stop = {"stop_reason": None, "stop_sequence": None}
        message = self._message([], none_yet, {**self._usage(), "output_tokens": 0})
        start: MessageStartEvent = {"type": "message_start", "message": message}
        ping: PingEvent = {"type": "ping"}
        return [start, ping, *events]

    def show(self, change: Change) -> Iterator[StreamEvent]:
        block = change.block
        if change.kind == "begin":
            yield {
                "type": "content_block_start",
                "index": block.index,
                "content_block": _content(block, is_begun=False),
            }
        elif change.kind == "more":
            yield _more(block, _delta(block, change.text))
        else:
            if block.kind == "reasoning":
                yield _more(block, {"type": "signature_delta", "signature": _SIGNATURE})
            yield {"type": "content_block_stop", "index": block.index}

    def closing(self, output: RequestOutput) -> Iterator[StreamEvent]:
        yield {"type": "message_delta", "delta": self._stop(output), "usage": self._usage()}
        yield {"type": "message_stop"}

    def failure(self, error: ApiError) -> Mapping[str, Any]:
        return error.body(PATH)

    def _message(
        self, content: list[ContentBlock], stop: Stop, usage: MessageUsage
    ) -> AnsweredMessage:
        return {
            "id": self.head["id"],
            "type": "message",
            "role": "assistant",
            "model": self.head["model"],
            "content": content,
            **stop,
            "usage": {**usage, "service_tier": "standard"},
        }

    def _stop(self, output: RequestOutput) -> Stop:
        why: StopReason
        reason, sequence = self.finish_reason(output), self.end_fields(0, output)["stop_reason"]
        if reason == "length":
            is_full = output.num_tokens >= self._room
            why = "model_context_window_exceeded" if is_full else "max_tokens"
        elif reason == "tool_calls":
            why = "tool_use"
        else:
            why = "stop_sequence" if isinstance(sequence, str) else "end_turn"
        is_stopped = why == "stop_sequence" and isinstance(sequence, str)
        return {"stop_reason": why, "stop_sequence": str(sequence) if is_stopped else None}

    def _usage(self) -> MessageUsage:
        """Return the token counts. Like the API, the input count leaves out cached tokens."""
        usage = self.usage()
        cached = usage["prompt_tokens_details"]["cached_tokens"]
        return {
            "input_tokens": usage["prompt_tokens"] - cached,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": cached,
            "output_tokens": usage["completion_tokens"],
            "output_tokens_details": {"thinking_tokens": self.num_reasoning_tokens},
        }


def _more(block: Block, delta: BlockDelta) -> BlockDeltaEvent:
    return {"type": "content_block_delta", "index": block.index, "delta": delta}


def _content(block: Block, *, is_begun: bool) -> ContentBlock:
    """Return a block of content, whole or before it begins."""
    text = block.text
    if block.kind == "reasoning":
        return {"type": "thinking", "thinking": text, "signature": _SIGNATURE if is_begun else ""}
    if block.kind == "content":
        return {"type": "text", "text": text}
    given: dict[str, object] | orjson.Fragment = _input(text) if is_begun else {}
    call_id = f"toolu_{block.key[:24]}"
    return {"type": "tool_use", "id": call_id, "name": block.name, "input": given}


def _delta(block: Block, text: str) -> BlockDelta:
    if block.kind == "reasoning":
        return {"type": "thinking_delta", "thinking": text}
    if block.kind == "content":
        return {"type": "text_delta", "text": text}
    return {"type": "input_json_delta", "partial_json": text}


def _input(arguments: str) -> orjson.Fragment:
    """Return the arguments of a call, or the received part if the call was cut off.

    Clients complete a streamed call that was cut off in the same way.
    """
    try:
        if isinstance(orjson.loads(arguments), dict):
            return orjson.Fragment(arguments)
    except orjson.JSONDecodeError:
        pass
    try:
        partial = from_json(arguments, allow_partial=True)
        text = json.dumps(partial if isinstance(partial, dict) else {}, allow_nan=False)
    except ValueError:
        text = "{}"
    return orjson.Fragment(text)
