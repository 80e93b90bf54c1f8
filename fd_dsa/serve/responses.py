"""POST /v1/responses and /v1/responses/input_tokens: the Responses API, without storage."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

from fastapi import APIRouter, Request
from starlette.responses import Response

# pydantic reads only this TypedDict before Python 3.12
from typing_extensions import TypedDict

from fd_dsa.chat.parser import AnswerFormat
from fd_dsa.serve.answer import respond
from fd_dsa.serve.blocks import Block, BlockAnswer, Change
from fd_dsa.serve.body import BodyRoute
from fd_dsa.serve.chat_prompt import make_job
from fd_dsa.serve.errors import ApiError
from fd_dsa.serve.generation import Job
from fd_dsa.serve.json_response import JsonResponse
from fd_dsa.serve.logprobs import chat_logprobs
from fd_dsa.serve.protocol.responses import ResponsesRequest
from fd_dsa.serve.protocol.responses_answers import (
    Item,
    ItemStatus,
    Part,
    ReasoningPart,
    ResponseObject,
    ResponseUsage,
    Scores,
    TextPart,
)
from fd_dsa.serve.state import ServerState, State
from fd_dsa.serve.tokenization import count_prompt_tokens

if TYPE_CHECKING:
    from fd_dsa.engine.logprobs import TokenLogprobs
    from fd_dsa.engine.output import RequestOutput

PATH = "/v1/responses"

# codes of the error in a failed response
_CODES = {400: "invalid_prompt", 429: "rate_limit_exceeded"}
_PREFIXES = {"reasoning": "rs_", "content": "msg_", "call": "fc_"}

router = APIRouter(route_class=BodyRoute)


class InputTokenCount(TypedDict):
    """Number of tokens of a prompt."""

    object: Literal["response.input_tokens"]
    input_tokens: int


@router.post(PATH, summary="Answer a conversation, in items", response_model=ResponseObject)
async def create_response(body: ResponsesRequest, request: Request, state: State) -> Response:
    """Answer the input in the chat format of the model. No response is stored."""

    def make(answer_id: str) -> ResponseAnswer:
        return ResponseAnswer(state, body, *make_job(state, body.chat, answer_id))

    with body.own_names():
        return await respond(make, "resp_", body.chat, request, state)


@router.post(f"{PATH}/input_tokens", summary="Tokens of an input", response_model=InputTokenCount)
async def count_input_tokens(body: ResponsesRequest, request: Request, state: State) -> Response:
    """Count the tokens of the prompt that the same response would have."""
    count: InputTokenCount = {
        "object": "response.input_tokens",
        "input_tokens": await count_prompt_tokens(body, request, state),
    }
    return JsonResponse(count)


class ResponseAnswer(BlockAnswer):
    """A response. Each block of the answer becomes an item."""

    whole_object = chunk_object = "response"

    def __init__(
        self, state: ServerState, body: ResponsesRequest, job: Job, answer_format: AnswerFormat
    ) -> None:
        super().__init__(state, body.chat, job, answer_format)
        self._responses_body = body
        self._num_events = 0
        # scores of ended blocks, packed once because several events repeat them
        self._packed: dict[int, Scores] = {}

    def choices(self) -> Iterator[dict[str, Any]]:
        yield self._ended(self.outputs[0, 0])

    def opening(self) -> Iterator[dict[str, Any]]:
        response = self._response("in_progress")
        yield self._event("response.created", response=response)
        yield self._event("response.in_progress", response=response)

    def show(self, change: Change) -> Iterator[dict[str, Any]]:
        block = change.block
        if change.kind == "begin":
            item = self._item(block, "in_progress", is_begun=False)
            yield self._event("response.output_item.added", output_index=block.index, item=item)
        yield from self._show_call(change) if block.kind == "call" else self._show_text(change)
        if change.kind == "end":
            item = self._item(block, _status(block))
            yield self._event("response.output_item.done", output_index=block.index, item=item)

    def _show_text(self, change: Change) -> Iterator[dict[str, Any]]:
        block = change.block
        place = {**_place(block), "content_index": 0}
        name = "output_text" if block.kind == "content" else "reasoning_text"
        scores: dict[str, Any] = {}
        if change.kind == "begin":
            yield self._event("response.content_part.added", **place, part=self._part(block))
        elif change.kind == "more":
            if block.kind == "content":
                scores = {"logprobs": self._scores(change.scores)}
            yield self._event(f"response.{name}.delta", **place, delta=change.text, **scores)
        else:
            if block.kind == "content":
                self._packed[block.index] = self._scores(block.scores)
                scores = {"logprobs": self._packed[block.index]}
            yield self._event(f"response.{name}.done", **place, text=block.text, **scores)
            yield self._event("response.content_part.done", **place, part=self._part(block))

    def _show_call(self, change: Change) -> Iterator[dict[str, Any]]:
        block, name = change.block, "response.function_call_arguments"
        if change.kind == "more":
            yield self._event(f"{name}.delta", **_place(block), delta=change.text)
        elif change.kind == "end":
            whole = {"arguments": block.text, "name": block.name}
            yield self._event(f"{name}.done", **_place(block), **whole)

    def closing(self, output: RequestOutput) -> Iterator[dict[str, Any]]:
        response = self._ended(output)
        yield self._event(f"response.{response['status']}", response=response)

    def failure(self, error: ApiError) -> dict[str, Any]:
        code = _CODES.get(error.status, "server_error")
        shown = {"code": code, "message": error.message}
        return self._event("response.failed", response=self._response("failed", error=shown))

    def _event(self, kind: str, **fields: object) -> dict[str, Any]:
        self._num_events += 1
        return {"type": kind, "sequence_number": self._num_events - 1, **fields}

    def _ended(self, output: RequestOutput) -> dict[str, Any]:
        """Return the response after its last token."""
        times = {"completed_at": int(time.time()), "usage": self._usage()}
        if self.finish_reason(output) == "length":
            why = {"reason": "max_output_tokens"}
            return self._response("incomplete", incomplete_details=why, **times)
        return self._response("completed", **times)

    def _usage(self) -> ResponseUsage:
        usage = self.usage()
        cached = usage["prompt_tokens_details"]["cached_tokens"]
        return {
            "input_tokens": usage["prompt_tokens"],
            "input_tokens_details": {"cached_tokens": cached, "cache_write_tokens": 0},
            "output_tokens": usage["completion_tokens"],
            "output_tokens_details": {"reasoning_tokens": self.num_reasoning_tokens},
            "total_tokens": usage["total_tokens"],
        }

    def _response(self, status: str, **fields: object) -> dict[str, Any]:
        """Return the response object: its own fields, and the repeated ones of the request."""
        body, params = self._responses_body, self.jobs[0].params
        return {
            "id": self.head["id"],
            "object": "response",
            "created_at": self.head["created"],
            "completed_at": None,
            "status": status,
            "background": False,
            "error": None,
            "incomplete_details": None,
            "metadata": {},
            "model": self.head["model"],
            "output": [self._item(block, _status(block)) for block in self.blocks],
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": None,
            "reasoning": {"effort": self.body.reasoning_effort, "summary": None},
            "service_tier": "default",
            "store": False,
            "temperature": params.temperature,
            "text": {"format": {"type": "text"}},
            "tool_choice": "auto",
            "tools": [],
            "top_logprobs": body.top_logprobs or 0,
            "top_p": params.top_p,
            "truncation": "disabled",
            "usage": None,
            **body.repeated,
            **fields,
        }

    def _item(self, block: Block, status: ItemStatus, *, is_begun: bool = True) -> Item:
        """Return the item of a block, with empty content before the block begins."""
        if block.kind == "call":
            return {
                "id": _id(block),
                "type": "function_call",
                "status": status,
                "call_id": f"call_{block.key[:24]}",
                "name": block.name,
                "arguments": block.text,
            }
        if block.kind == "content":
            return {
                "id": _id(block),
                "type": "message",
                "status": status,
                "role": "assistant",
                "content": [self._text_part(block)] if is_begun else [],
            }
        return {
            "id": _id(block),
            "type": "reasoning",
            "status": status,
            "summary": [],
            "content": [_reasoning_part(block)] if is_begun else [],
        }

    def _part(self, block: Block) -> Part:
        return _reasoning_part(block) if block.kind == "reasoning" else self._text_part(block)

    def _text_part(self, block: Block) -> TextPart:
        scores = self._packed.get(block.index)
        scores = self._scores(block.scores) if scores is None else scores
        return {"type": "output_text", "text": block.text, "annotations": [], "logprobs": scores}

    def _scores(self, scores: Sequence[TokenLogprobs]) -> Scores:
        return chat_logprobs(self.tokenizer, scores)["content"] if scores else []


def _id(block: Block) -> str:
    return _PREFIXES[block.kind] + block.key


def _place(block: Block) -> dict[str, Any]:
    return {"item_id": _id(block), "output_index": block.index}


def _reasoning_part(block: Block) -> ReasoningPart:
    return {"type": "reasoning_text", "text": block.text}


def _status(block: Block) -> ItemStatus:
    return "completed" if block.is_complete else "incomplete"
