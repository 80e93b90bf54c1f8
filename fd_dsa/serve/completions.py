"""POST /v1/completions."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Sequence
from typing import TYPE_CHECKING, Any

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
from fd_dsa.serve.protocol import CompletionRequest
from fd_dsa.serve.responses import new_id, usage_of, with_usage
from fd_dsa.serve.sse import EventStream
from fd_dsa.serve.state import ServerState, State

if TYPE_CHECKING:
    from fd_dsa.engine.output import RequestOutput

# the OpenAI API's default for completions; chat has none
_DEFAULT_MAX_TOKENS = 16

router = APIRouter()


@router.post("/v1/completions", summary="Continue a text or a list of token ids")
async def create_completion(body: CompletionRequest, request: Request, state: State) -> Response:
    """Continue each prompt; one choice per prompt, in their order."""
    state.check_available()
    model = state.resolve_model(body.model)
    body.check_supported()
    completion_id = new_id("cmpl")
    jobs = await asyncio.to_thread(_make_jobs, state, body, completion_id)
    check_jobs(state, jobs, "prompt")
    head = {
        "id": completion_id,
        "object": "text_completion",
        "created": int(time.time()),
        "model": model,
    }
    if body.stream:
        chunks = _chunks(state, jobs, head, body.include_usage)
        return EventStream(chunks, request.state.request_id)
    outputs = await collect_outputs(state, jobs, request)
    choices = [_choice(i, out.text, out.finish_reason) for i, out in enumerate(outputs)]
    return JSONResponse({**head, "choices": choices, "usage": usage_of(jobs, outputs)})


def _make_jobs(state: ServerState, body: CompletionRequest, completion_id: str) -> list[Job]:
    """Tokenise the prompts; runs in a thread, since a long text takes a while."""
    jobs = []
    for index, prompt in enumerate(body.prompt):
        if isinstance(prompt, str):
            prompt = _encode(state, prompt)
        max_tokens = resolve_max_tokens(
            state, len(prompt), body.max_tokens, default=_DEFAULT_MAX_TOKENS
        )
        jobs.append(
            Job(
                f"{completion_id}-{index}",
                prompt,
                body.sampling_params(max_tokens, state.engine.sampling_defaults),
            )
        )
    return jobs


def _encode(state: ServerState, prompt: str) -> list[int]:
    """Token ids of a text prompt."""
    try:
        return state.engine.tokenizer.encode(prompt, add_special_tokens=True)
    except ValueError as error:
        raise ApiError(400, f"prompt: {error}", param="prompt") from error


async def _chunks(
    state: ServerState, jobs: Sequence[Job], head: dict[str, Any], include_usage: bool
) -> AsyncGenerator[dict[str, Any], None]:
    """The chunks of a streamed completion, those of all prompts as they come."""
    last: dict[int, RequestOutput] = {}
    async with contextlib.aclosing(stream_outputs(state, jobs)) as outputs:
        async for index, output in outputs:
            last[index] = output
            if output.new_text or output.finish_reason is not None:
                choice = _choice(index, output.new_text, output.finish_reason)
                yield with_usage({**head, "choices": [choice]}, include_usage)
    if include_usage:
        yield {**head, "choices": [], "usage": usage_of(jobs, list(last.values()))}


def _choice(index: int, text: str, finish_reason: str | None) -> dict[str, Any]:
    """One choice of a completion or of its chunk."""
    return {"index": index, "text": text, "logprobs": None, "finish_reason": finish_reason}
