"""What both generating endpoints share: a request's jobs in, one answer out, whole or streamed."""

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
"""Of a whole answer that is written in 0.1 ms."""

logger = logging.getLogger("fd_dsa.serve")


async def respond(
    make: Callable[[str], Answer[_Body]],
    prefix: str,
    body: _Body,
    request: Request,
    state: ServerState,
) -> Response:
    """Answer a request that generates.

    Args:
        make: tokenizes and checks the prompts of an answer with this id; runs in a thread, since
            that may take a while.
        prefix: beginning of the id.
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
        jobs: its prompts; `n` choices follow each other for each of them.

    Attributes:
        outputs: the last one of each choice, by the index of its job and its own.
    """

    prompt_field: ClassVar[str]
    """Field of the request that its prompts come from."""
    whole_object: ClassVar[str]
    chunk_object: ClassVar[str]
    names_events: ClassVar[bool] = False
    """Whether an event of a stream has its chunk's `type` as its name."""
    stream_end: ClassVar[bytes] = b"data: [DONE]\n\n"
    """Last bytes of a stream."""

    def __init__(self, state: ServerState, body: _Body, jobs: Sequence[Job]) -> None:
        self.state, self.body, self.jobs = state, body, jobs
        self.tokenizer = state.engine.tokenizer
        self.outputs: dict[tuple[int, int], RequestOutput] = {}

    @abstractmethod
    def choices(self) -> Iterator[Mapping[str, Any]]:
        """The choices of a whole answer, after `collect`."""

    @abstractmethod
    def deltas(self, job_index: int, output: RequestOutput) -> Sequence[Mapping[str, Any]]:
        """The choices of the chunks that a step adds."""

    def opening(self) -> Iterator[Mapping[str, Any]]:
        """Chunks before the first step, without their head."""
        return iter(())

    def shared_fields(self) -> PromptFields:
        """Fields of a whole answer alongside its choices."""
        return {}

    def take(self, job_index: int, output: RequestOutput) -> None:
        """Keep a step of a whole answer."""
        self.outputs[job_index, output.index] = output

    @property
    def is_short(self) -> bool:
        """Whether a whole answer is written in less time than a thread takes to begin."""
        params = self.jobs[0].params
        is_scored = params.logprobs is not None or params.prompt_logprobs is not None
        if is_scored or params.return_topk_positions or self.body.return_token_ids:
            return False
        return sum(output.num_tokens for output in self.outputs.values()) <= SHORT_TOKENS

    def is_small(self, job_index: int, output: RequestOutput) -> bool:
        """Whether the chunks of a step are short: nothing of the prompt, no chosen positions."""
        return output.topk_positions is None

    async def collect(self) -> None:
        """Run the jobs to their end."""
        async with contextlib.aclosing(stream_outputs(self.state, self.jobs)) as outputs:
            async for job_index, output in outputs:
                self.take(job_index, output)

    def whole(self, head: dict[str, object]) -> JsonResponse:
        """The whole answer, after `collect`."""
        choices = list(self.choices())
        return JsonResponse(
            {**head, "choices": choices, "usage": self.usage(), **self.shared_fields()}
        )

    async def chunks(self, head: dict[str, object]) -> AsyncGenerator[Mapping[str, Any], None]:
        """The chunks of a streamed answer, those of all choices as they come, then the usage."""
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
        """Run the jobs; yields the `deltas` of each step."""
        async with contextlib.aclosing(stream_outputs(self.state, self.jobs)) as outputs:
            async for job_index, output in outputs:
                is_small = self.is_small(job_index, output)
                deltas = await self.state.workers.run(
                    self.deltas, job_index, output, is_short=is_small
                )
                self.outputs[job_index, output.index] = output
                yield deltas

    def failure(self, error: ApiError) -> Mapping[str, Any]:
        """The chunk of a stream that fails after its beginning."""
        return error.body()

    def _usage_so_far(self) -> dict[str, Any]:
        """The field `usage` of a chunk before the last one; null in the OpenAI API."""
        if not self.body.include_usage:
            return {}
        return {"usage": self.usage() if self.body.usage_in_each_chunk else None}

    def shown_outputs(self) -> Sequence[RequestOutput]:
        """The last output of each choice whose tokens the answer shows."""
        return list(self.outputs.values())

    def usage(self) -> Usage:
        """Token counts: each prompt once, all outputs.

        `cached_tokens` are those of the prompts that earlier requests had computed; details of
        the completion are there where drafts were verified.
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
        if drafts := sum(output.num_draft_tokens for output in outputs):
            accepted = sum(output.num_accepted_tokens for output in outputs)
            usage["completion_tokens_details"] = {
                "accepted_prediction_tokens": accepted,
                "rejected_prediction_tokens": drafts - accepted,
            }
        return usage

    def end_fields(self, job_index: int, output: RequestOutput) -> EndFields:
        """`stop_reason` and, where asked for, `topk_positions` of a choice that has ended."""
        stop: str | int | None = output.stop_reason
        # as in vLLM: an end of sequence that nobody asked to stop at is no reason to name
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
        """`prompt_logprobs` and `prompt_token_ids` of an output's prompt, where asked for."""
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
    """Text, token ids and scores of a whole output, or what its last step has added."""
    if is_whole:
        return output.text, output.token_ids, output.logprobs or ()
    return output.new_text, output.new_token_ids, output.new_logprobs


class EventStream(StreamingResponse):
    """Server-sent events: `data: {json}` for each chunk, then the end of the answer's streams.

    However the response ends, the generators are closed: a client that goes away aborts its
    requests at once, not when a generator happens to be collected. The head is sent at once, and a
    comment whenever no chunk comes for `sse_ping_interval`. An exception inside the stream
    becomes one error event before the end.
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
