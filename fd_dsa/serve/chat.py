"""POST /v1/chat/completions."""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncGenerator, Sequence
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from fd_dsa.chat.parser import AnswerFormat
from fd_dsa.serve.body import BodyRoute
from fd_dsa.serve.chat_answer import Choice, deltas_of, message_of
from fd_dsa.serve.chat_prompt import make_job
from fd_dsa.serve.disconnect import unless_gone
from fd_dsa.serve.generation import Job, check_form, stream_outputs
from fd_dsa.serve.json_response import JsonResponse
from fd_dsa.serve.logprobs import chat_logprobs
from fd_dsa.serve.protocol import ChatCompletionRequest
from fd_dsa.serve.responses import (
    end_fields,
    is_short,
    new_id,
    prompt_fields,
    usage_of,
    with_usage,
)
from fd_dsa.serve.sse import EventStream
from fd_dsa.serve.state import ServerState, State

if TYPE_CHECKING:
    from fd_dsa.chat.events import Event
    from fd_dsa.engine.logprobs import TokenLogprobs
    from fd_dsa.engine.output import RequestOutput

router = APIRouter(route_class=BodyRoute)


@router.post("/v1/chat/completions", summary="Answer a conversation")
async def create_chat_completion(
    body: ChatCompletionRequest, request: Request, state: State
) -> Response:
    """Answer the conversation in the chat format of the model."""
    state.check_available()
    model = state.resolve_model(body.model)
    completion_id = new_id("chatcmpl")
    job, answer_format = await state.prompt_workers.run(
        make_job, state, body, completion_id, request=request
    )
    await check_form(state, job, "messages")
    request.state.ticket.extend(job.params.n, "n")
    head = {
        "id": completion_id,
        "object": "chat.completion.chunk" if body.stream else "chat.completion",
        "created": int(time.time()),
        "model": model,
    }
    answer = _Answer(state, body, job, answer_format)
    if body.stream:
        return EventStream(answer.chunks(head), request.state.request_id)
    outputs = await unless_gone(request, answer.collect())
    return await state.workers.run(
        answer.whole, head, outputs, request=request, is_short=is_short([job], outputs, body)
    )


class _Answer:
    """The answer to one request, whole or in chunks.

    Args:
        state: of the server.
        body: of the request.
        job: its prompt.
        answer_format: how its choices are read.
    """

    def __init__(
        self,
        state: ServerState,
        body: ChatCompletionRequest,
        job: Job,
        answer_format: AnswerFormat,
    ) -> None:
        self._state = state
        self._body = body
        self._job = job
        self._choices = [
            Choice(
                answer_format,
                one_call=body.one_call,
                shows_reasoning=body.include_reasoning is not False,
                at_once=not body.stream,
            )
            for _ in range(job.params.n)
        ]
        # of each choice of a whole answer
        self._events: list[list[Event]] = [[] for _ in self._choices]
        self._token_ids: list[list[int]] = [[] for _ in self._choices]
        self._all_scores: list[list[TokenLogprobs]] = [[] for _ in self._choices]

    async def collect(self) -> list[RequestOutput]:
        """The last output of each choice of a whole answer."""
        last: dict[int, RequestOutput] = {}
        async with contextlib.aclosing(self._steps()) as steps:
            async for output, new_events in steps:
                choice, index = self._choices[output.index], output.index
                self._events[index] += new_events
                self._token_ids[index] += choice.new_token_ids
                self._all_scores[index] += choice.new_scores
                last[index] = output
        return [last[index] for index in range(len(self._choices))]

    def whole(self, head: dict[str, Any], outputs: Sequence[RequestOutput]) -> JsonResponse:
        """The whole answer, after `collect`."""
        shown = []
        for index, (choice, output) in enumerate(zip(self._choices, outputs, strict=True)):
            fields = {
                "index": index,
                "message": message_of(self._events[index] + choice.read_whole()),
                "logprobs": self._scores(self._all_scores[index]),
                **self._end(choice, output),
            }
            if self._body.return_token_ids:
                fields["token_ids"] = self._token_ids[index]
            shown.append(fields)
        more = prompt_fields(self._state.engine.tokenizer, self._body, outputs[0])
        return JsonResponse({**head, "choices": shown, "usage": self._usage(), **more})

    async def chunks(self, head: dict[str, Any]) -> AsyncGenerator[dict[str, Any], None]:
        """Roles, parts, finish reasons, and usage if asked for."""
        body = self._body

        def chunk(index: int, delta: dict[str, Any], **fields: Any) -> dict[str, Any]:
            choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}
            return with_usage({**head, "choices": [{**choice, **fields}]}, body.include_usage)

        more = {"prompt_token_ids": self._job.prompt_token_ids} if body.return_token_ids else {}
        for index in range(len(self._choices)):
            yield {**chunk(index, {"role": "assistant", "content": ""}), **more}
        async with contextlib.aclosing(self._steps()) as steps:
            async for output, events in steps:
                choice, index = self._choices[output.index], output.index
                fields = self._token_fields(choice)
                deltas = list(deltas_of(events))
                if fields and not deltas:
                    # tokens whose text is held back are scored when they come
                    deltas = [{}]
                for delta in deltas:
                    yield chunk(index, delta, **fields)
                    fields = {}
                if output.finished:
                    is_small = output.topk_positions is None
                    end = await self._state.workers.run(
                        self._end, choice, output, is_short=is_small
                    )
                    yield chunk(index, {}, **end)
        if body.include_usage:
            yield {**head, "choices": [], "usage": self._usage()}

    async def _steps(self) -> AsyncGenerator[tuple[RequestOutput, list[Event]], None]:
        """Each output of the engine, and what it adds; complete choices are ended."""
        engine = self._state.engine
        async with contextlib.aclosing(stream_outputs(self._state, [self._job])) as outputs:
            async for _, output in outputs:
                choice = self._choices[output.index]
                was_complete = choice.is_complete
                events = choice.add(output)
                if choice.is_complete and not (was_complete or output.finished):
                    engine.finish_output(self._job.request_id, output.index)
                yield output, events

    def _end(self, choice: Choice, output: RequestOutput) -> dict[str, Any]:
        """Why a choice has ended, and what is told with it."""
        reason = choice.finish_reason(output.finish_reason)
        return {
            "finish_reason": reason,
            **end_fields(self._state.engine.tokenizer, self._job, output),
        }

    def _token_fields(self, choice: Choice) -> dict[str, Any]:
        """What a chunk tells of its tokens, where asked for."""
        fields: dict[str, Any] = {}
        if choice.new_scores:
            fields["logprobs"] = self._scores(choice.new_scores)
        if self._body.return_token_ids and choice.new_token_ids:
            fields["token_ids"] = choice.new_token_ids
        return fields

    def _scores(self, entries: Any) -> dict[str, Any] | None:
        """`logprobs` of a choice, None where they are not asked for."""
        if self._job.params.logprobs is None:
            return None
        return chat_logprobs(self._state.engine.tokenizer, entries)

    def _usage(self) -> dict[str, Any]:
        """Token counts; of a choice that was complete before its end, those up to there."""
        outputs = [choice.output for choice in self._choices if choice.output is not None]
        return usage_of([self._job], outputs)
