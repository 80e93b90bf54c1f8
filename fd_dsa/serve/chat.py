"""POST /v1/chat/completions."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from fd_dsa.serve.errors import ApiError
from fd_dsa.serve.generation import (
    Job,
    check_jobs,
    collect_outputs,
    resolve_max_tokens,
    stream_outputs,
)
from fd_dsa.serve.protocol import ChatCompletionRequest
from fd_dsa.serve.responses import new_id, usage_of, with_usage
from fd_dsa.serve.sse import EventStream
from fd_dsa.serve.state import ServerState, State

router = APIRouter()


@router.post("/v1/chat/completions", summary="Answer a conversation")
async def create_chat_completion(
    body: ChatCompletionRequest, request: Request, state: State
) -> Response:
    """Answer the conversation, rendered by the model folder's chat template."""
    state.check_available()
    model = state.resolve_model(body.model)
    body.check_supported()
    completion_id = new_id("chatcmpl")
    job = await asyncio.to_thread(_make_job, state, body, completion_id)
    check_jobs(state, [job], "messages")
    head = {
        "id": completion_id,
        "object": "chat.completion.chunk" if body.stream else "chat.completion",
        "created": int(time.time()),
        "model": model,
    }
    if body.stream:
        chunks = _chunks(state, job, head, body.include_usage)
        return EventStream(chunks, request.state.request_id)
    outputs = await collect_outputs(state, [job], request)
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": outputs[0].text},
        "logprobs": None,
        "finish_reason": outputs[0].finish_reason,
    }
    usage = usage_of([job], outputs)
    return JSONResponse({**head, "choices": [choice], "usage": usage})


def _make_job(state: ServerState, body: ChatCompletionRequest, completion_id: str) -> Job:
    """Render and tokenise the conversation; runs in a thread, since that may take a while."""
    tokenizer = state.engine.tokenizer
    if not tokenizer.has_chat_template:
        raise ApiError(
            400,
            "messages: the model folder has no chat template (neither chat_template.jinja nor "
            "chat_template in tokenizer_config.json); use /v1/completions, or add a template",
            param="messages",
        )
    try:
        prompt = tokenizer.apply_chat_template([m.for_template() for m in body.messages])
    except ValueError as error:
        raise ApiError(400, f"messages: {error}", param="messages") from error
    param = "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"
    asked: int | None = getattr(body, param)
    max_tokens = resolve_max_tokens(state, len(prompt), asked, param=param)
    return Job(
        completion_id, prompt, body.sampling_params(max_tokens, state.engine.sampling_defaults)
    )


async def _chunks(
    state: ServerState, job: Job, head: dict[str, Any], include_usage: bool
) -> AsyncGenerator[dict[str, Any], None]:
    """The chunks of a streamed answer: role, texts, finish reason, and usage if asked for."""

    def chunk(delta: dict[str, str], finish_reason: str | None = None) -> dict[str, Any]:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        return with_usage({**head, "choices": [choice]}, include_usage)

    yield chunk({"role": "assistant", "content": ""})
    last = []
    async with contextlib.aclosing(stream_outputs(state, [job])) as outputs:
        async for _, output in outputs:
            last = [output]
            if output.new_text:
                yield chunk({"content": output.new_text})
            if output.finish_reason is not None:
                yield chunk({}, output.finish_reason)
    if include_usage:
        yield {**head, "choices": [], "usage": usage_of([job], last)}
