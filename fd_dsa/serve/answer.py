"""Base class of answers: runs a request's jobs and sends the answer whole or streamed."""

from __future__ import annotations

import contextlib
import logging
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

import orjson
from fastapi import Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from fd_dsa.serve.errors import ApiError, internal_error
from fd_dsa.serve.generation import Job, check_form, stream_outputs
from fd_dsa.serve.heartbeat import pinging
from fd_dsa.serve.json_response import JsonResponse, packed, packed_list, slices
from fd_dsa.serve.logprobs import prompt_logprobs, token_text
from fd_dsa.serve.protocol.answers import (
    EndFields,
    PromptFields,
    SelectedPositions,
    Usage,
)
from fd_dsa.serve.protocol.generation import GenerationRequest
from fd_dsa.serve.state import ServerState
from fd_dsa.serve.workers import unless_gone

if TYPE_CHECKING:
    from fd_dsa.engine.logprobs import TokenLogprobs
    from fd_dsa.engine.output import RequestOutput

_Body = TypeVar("_Body", bound=GenerationRequest)

SHORT_TOKENS = 4096
"""Largest whole answer, in tokens, that is encoded on the event loop.

It takes 0.1 ms.
"""

logger = logging.getLogger("fd_dsa.serve")


async def respond(
    make: Callable[[str], Answer[_Body]],
    prefix: str,
    body: _Body,
    request: Request,
    state: ServerState,
) -> Response:
    """Answer a request that generates tokens.

    Args:
        make: builds the answer with this id. It tokenizes and checks the prompts, so it runs in a
            thread.
        prefix: first characters of the id.
    """
    state.check_available(is_accepted=True)
    model = state.resolve_model(body.model)
    answer_id = f"{prefix}{uuid.uuid4().hex}"
    answer = await state.prompt_workers.run(make, answer_id, request=request)
    await unless_gone(request, check_form(state, answer.jobs[0], answer.prompt_field))
    state.hold(request.scope["state"], sum(job.params.n for job in answer.jobs), "n")
    kind = answer.chunk_object if body.stream else answer.whole_object
    head = {"id": answer_id, "object": kind, "created": int(time.time()), "model": model}
    if body.stream:
        return EventStream(answer, head, request.state.request_id)
    await unless_gone(request, answer.collect())
    return await state.workers.run(answer.whole, head, request=request, is_short=answer.is_short)


class Answer(ABC, Generic[_Body]):
    """The answer to one request.

    Args:
        jobs: the prompts of the request. Each has `n` choices, in order.

    Attributes:
        outputs: last output of each choice, by (index of the job, index of the choice).
    """

    prompt_field: ClassVar[str]
    """Request field that holds the prompts."""
    whole_object: ClassVar[str]
    chunk_object: ClassVar[str]
    names_events: ClassVar[bool] = False
    """True if each event of a stream is named after the `type` of its chunk."""
    stream_end: ClassVar[bytes] = b"data: [DONE]\n\n"
    """Last bytes of a stream."""

    def __init__(self, state: ServerState, body: _Body, jobs: Sequence[Job]) -> None:
        self.state, self.body, self.jobs = state, body, jobs
        self.tokenizer = state.engine.tokenizer
        self.outputs: dict[tuple[int, int], RequestOutput] = {}

    @abstractmethod
    def choices(self) -> Iterator[Mapping[str, Any]]:
        """Yield the choices of a whole answer, after `collect`."""

    @abstractmethod
    def deltas(self, job_index: int, output: RequestOutput) -> Sequence[Mapping[str, Any]]:
        """Return the choices of the chunks that one step adds."""

    def opening(self) -> Iterator[Mapping[str, Any]]:
        """Return the chunks before the first step, without their head."""
        return iter(())

    def shared_fields(self) -> PromptFields:
        """Return the fields of a whole answer other than its choices."""
        return {}

    def take(self, job_index: int, output: RequestOutput) -> None:
        """Store the output of one step for a whole answer."""
        self.outputs[job_index, output.index] = output

    @property
    def is_short(self) -> bool:
        """True if encoding the whole answer takes less time than handing it to a thread."""
        params = self.jobs[0].params
        is_scored = params.logprobs is not None or params.prompt_logprobs is not None
        if is_scored or params.return_topk_positions or self.body.return_token_ids:
            return False
        return sum(output.num_tokens for output in self.outputs.values()) <= SHORT_TOKENS

    def is_small(self, job_index: int, output: RequestOutput) -> bool:
        """Return True if this step's chunks are short (no prompt fields, no selected keys)."""
        return output.topk_positions is None

    async def collect(self) -> None:
        """Run the jobs to their end."""
        async with contextlib.aclosing(stream_outputs(self.state, self.jobs)) as outputs:
            async for job_index, output in outputs:
                self.take(job_index, output)

    def whole(self, head: dict[str, object]) -> JsonResponse:
        """Return the whole answer, after `collect`."""
        choices = list(self.choices())
        return JsonResponse(
            {**head, "choices": choices, "usage": self.usage(), **self.shared_fields()}
        )

    async def chunks(self, head: dict[str, object]) -> AsyncGenerator[Mapping[str, Any], None]:
        """Yield the chunks of all choices in the order of their steps, then the usage."""
        for chunk in self.opening():
            yield {**head, **chunk, **self._usage_so_far()}
        async with contextlib.aclosing(self.steps()) as steps:
            async for choices in steps:
                usage = self._usage_so_far() if choices else {}
                for choice in choices:
                    yield {**head, "choices": [choice], **usage}
        if self.body.include_usage:
            yield {**head, "choices": [], "usage": self.usage()}

    async def steps(self) -> AsyncGenerator[Sequence[Mapping[str, Any]], None]:
        """Run the jobs and yield the `deltas` of each step."""
        async with contextlib.aclosing(stream_outputs(self.state, self.jobs)) as outputs:
            async for job_index, output in outputs:
                is_small = self.is_small(job_index, output)
                deltas = await self.state.workers.run(
                    self.deltas, job_index, output, is_short=is_small
                )
                self.outputs[job_index, output.index] = output
                yield deltas

    def failure(self, error: ApiError) -> Mapping[str, Any]:
        """Return the chunk of a stream that fails after its first chunk."""
        return error.body()

    def _usage_so_far(self) -> dict[str, Any]:
        """Return `usage` for a chunk before the last one (null in the OpenAI API)."""
        if not self.body.include_usage:
            return {}
        return {"usage": self.usage() if self.body.usage_in_each_chunk else None}

    def shown_outputs(self) -> Sequence[RequestOutput]:
        """Return the last output of each choice whose tokens the answer shows."""
        return list(self.outputs.values())

    def usage(self) -> Usage:
        """Return the token counts. Each prompt counts once, every output counts.

        `cached_tokens` are prompt tokens found in the prefix cache. `host_cached_tokens` are there
        only if some were in host memory, and the completion's details only if drafts were verified.
        """
        outputs = self.shown_outputs()
        prompt = sum(len(job.prompt_token_ids) for job in self.jobs)
        completion = sum(len(output.token_ids) for output in outputs)
        usage: Usage = {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {
                "cached_tokens": sum(out.num_cached_tokens for out in outputs if out.index == 0)
            },
        }
        if on_host := sum(out.num_host_cached_tokens for out in outputs if out.index == 0):
            usage["prompt_tokens_details"]["host_cached_tokens"] = on_host
        if drafts := sum(output.num_draft_tokens for output in outputs):
            accepted = sum(output.num_accepted_tokens for output in outputs)
            usage["completion_tokens_details"] = {
                "accepted_prediction_tokens": accepted,
                "rejected_prediction_tokens": drafts - accepted,
            }
        return usage

    def end_fields(self, job_index: int, output: RequestOutput) -> EndFields:
        """Return `stop_reason` and, if requested, `topk_positions` of a finished choice."""
        stop: str | int | None = output.stop_reason
        # like vLLM: the model's own end-of-sequence token is not shown as a stop reason
        if isinstance(stop, int) and stop not in (self.jobs[job_index].params.stop_token_ids or ()):
            stop = None
        chosen = output.topk_positions
        if chosen is None:
            return {"stop_reason": stop}
        token_ids = [*output.prompt_token_ids, *output.token_ids][: chosen.position + 1]
        texts = (
            [token_text(self.tokenizer, token) for token in part] for part in slices(token_ids)
        )
        positions: SelectedPositions = {
            "position": chosen.position,
            "layers": [packed_list(packed([layer.tolist()])) for layer in chosen.layers],
            "tokens": packed_list(packed(texts)),
        }
        return {"stop_reason": stop, "topk_positions": positions}

    def prompt_fields(self, output: RequestOutput) -> PromptFields:
        """Return the requested fields `prompt_logprobs` and `prompt_token_ids`."""
        fields: PromptFields = {}
        if self.body.prompt_logprobs is not None:
            scores = output.prompt_logprobs
            shown = None if scores is None else prompt_logprobs(self.tokenizer, scores)
            fields["prompt_logprobs"] = shown
        if self.body.return_token_ids:
            fields["prompt_token_ids"] = output.prompt_token_ids
        return fields


def shown(
    output: RequestOutput, is_whole: bool
) -> tuple[str, Sequence[int], Sequence[TokenLogprobs]]:
    """Return text, token ids and scores of a whole output or of its last step."""
    if is_whole:
        return output.text, output.token_ids, output.logprobs or ()
    return output.new_text, output.new_token_ids, output.new_logprobs


class EventStream(StreamingResponse):
    """Server-sent events: `data: {json}` for each chunk, then `stream_end`.

    The generators are closed in every case, so a client that disconnects aborts its requests at
    once. The head is sent at once. A comment is sent after each `sse_ping_interval` without a
    chunk. An exception inside the stream becomes one error event before the end.
    """

    def __init__(self, answer: Answer[Any], head: dict[str, object], request_id: str) -> None:
        self._answer, self._request_id = answer, request_id
        self._chunks = answer.chunks(head)
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(iter(()), media_type="text/event-stream", headers=headers)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.body_iterator = events = self._events()
        state: ServerState = scope["app"].state.server
        async with (
            contextlib.aclosing(self._chunks),
            contextlib.aclosing(events),
            pinging(receive, send, state.options.sse_ping_interval) as channel,
        ):
            await super().__call__(scope, *channel)

    async def _events(self) -> AsyncGenerator[bytes, None]:
        try:
            async for chunk in self._chunks:
                yield self._event(chunk)
        except ApiError as error:
            yield self._event(self._answer.failure(error))
        except Exception:
            logger.exception("request %s failed while streaming", self._request_id)
            yield self._event(self._answer.failure(internal_error(self._request_id)))
        if self._answer.stream_end:
            yield self._answer.stream_end

    def _event(self, chunk: Mapping[str, object]) -> bytes:
        name = f"event: {chunk['type']}\n".encode() if self._answer.names_events else b""
        return name + b"data: " + orjson.dumps(chunk) + b"\n\n"
