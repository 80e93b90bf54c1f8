"""POST /v1/chat/completions."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from fd_dsa.serve.chat_answer import ChoiceParts
from fd_dsa.serve.chat_prompt import AnswerFormat, make_job
from fd_dsa.serve.generation import Job, collect_outputs, stream_outputs
from fd_dsa.serve.logprobs import chat_logprobs
from fd_dsa.serve.protocol import ChatCompletionRequest
from fd_dsa.serve.responses import new_id, prompt_fields, topk_fields, usage_of, with_usage
from fd_dsa.serve.sse import EventStream
from fd_dsa.serve.state import ServerState, State

if TYPE_CHECKING:
    from fd_dsa.engine.output import RequestOutput

router = APIRouter()


@router.post("/v1/chat/completions", summary="Answer a conversation")
async def create_chat_completion(
    body: ChatCompletionRequest, request: Request, state: State
) -> Response:
    """Answer the conversation in the chat format of the model."""
    state.check_available()
    model = state.resolve_model(body.model)
    body.check_supported()
    completion_id = new_id("chatcmpl")
    job, answer = await asyncio.to_thread(make_job, state, body, completion_id)
    request.state.ticket.extend(job.params.n, "n")
    head = {
        "id": completion_id,
        "object": "chat.completion.chunk" if body.stream else "chat.completion",
        "created": int(time.time()),
        "model": model,
    }
    if body.stream:
        chunks = _chunks(state, job, answer, head, body)
        return EventStream(chunks, request.state.request_id)
    outputs = await collect_outputs(state, [job], request)
    choices = [_choice(state, body, answer, output) for output in outputs]
    more = prompt_fields(state.engine.tokenizer, body, outputs[0])
    return JSONResponse({**head, "choices": choices, "usage": usage_of([job], outputs), **more})


def _choice(
    state: ServerState, body: ChatCompletionRequest, answer: AnswerFormat, output: RequestOutput
) -> dict[str, Any]:
    """One choice of a whole answer."""
    tokenizer, scores = state.engine.tokenizer, output.logprobs
    parts = ChoiceParts(answer)
    choice = {
        "index": output.index,
        "message": parts.message(output.text),
        "logprobs": None if scores is None else chat_logprobs(tokenizer, scores),
        "finish_reason": parts.finish_reason(output.finish_reason),
        **topk_fields(tokenizer, output),
    }
    return {**choice, "token_ids": output.token_ids} if body.return_token_ids else choice


async def _chunks(
    state: ServerState,
    job: Job,
    answer: AnswerFormat,
    head: dict[str, Any],
    body: ChatCompletionRequest,
) -> AsyncGenerator[dict[str, Any], None]:
    """The chunks of a streamed answer: roles, parts, finish reasons, and usage if asked for."""

    def chunk(index: int, delta: dict[str, Any], **fields: Any) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}
        return with_usage({**head, "choices": [{**choice, **fields}]}, body.include_usage)

    more = {"prompt_token_ids": job.prompt_token_ids} if body.return_token_ids else {}
    for index in range(job.params.n):
        yield {**chunk(index, {"role": "assistant", "content": ""}), **more}
    parts = [ChoiceParts(answer) for _ in range(job.params.n)]
    last = {}
    async with contextlib.aclosing(stream_outputs(state, [job])) as outputs:
        async for _, output in outputs:
            last[output.index] = output
            part, reason = parts[output.index], output.finish_reason
            deltas = list(part.deltas(output.new_text, is_last=reason is not None))
            fields = _token_fields(state, body, output)
            if fields and not deltas:
                # tokens whose text is held back are scored when they come
                deltas = [{}]
            for delta in deltas:
                yield chunk(output.index, delta, **fields)
                fields = {}
            if reason is not None:
                shown = topk_fields(state.engine.tokenizer, output)
                yield chunk(output.index, {}, finish_reason=part.finish_reason(reason), **shown)
    if body.include_usage:
        yield {**head, "choices": [], "usage": usage_of([job], list(last.values()))}


def _token_fields(
    state: ServerState, body: ChatCompletionRequest, output: RequestOutput
) -> dict[str, Any]:
    """What a chunk tells of its tokens, where asked for."""
    fields: dict[str, Any] = {}
    if output.new_logprobs:
        fields["logprobs"] = chat_logprobs(state.engine.tokenizer, output.new_logprobs)
    if body.return_token_ids:
        fields["token_ids"] = output.new_token_ids
    return fields
