"""POST /v1/chat/completions."""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from fd_dsa.chat.events import Event, join_events
from fd_dsa.chat.parser import AnswerFormat, OutputParser
from fd_dsa.serve.answer import Answer, respond, shown
from fd_dsa.serve.body import BodyRoute
from fd_dsa.serve.chat_prompt import make_job
from fd_dsa.serve.generation import Job
from fd_dsa.serve.logprobs import chat_logprobs
from fd_dsa.serve.protocol.chat import ChatCompletionRequest
from fd_dsa.serve.state import ServerState, State

if TYPE_CHECKING:
    from fd_dsa.engine.logprobs import TokenLogprobs
    from fd_dsa.engine.output import RequestOutput

router = APIRouter(route_class=BodyRoute)


@router.post("/v1/chat/completions", summary="Answer a conversation")
async def create_chat_completion(
    body: ChatCompletionRequest, request: Request, state: State
) -> Response:
    """Answer the conversation in the chat format of the model."""

    def make(answer_id: str) -> ChatAnswer:
        return ChatAnswer(state, body, *make_job(state, body, answer_id))

    return await respond(make, "chatcmpl", body, request, state)


class ChatAnswer(Answer[ChatCompletionRequest]):
    """The answer to a chat completion."""

    prompt_field = "messages"
    whole_object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def __init__(
        self, state: ServerState, body: ChatCompletionRequest, job: Job, answer_format: AnswerFormat
    ) -> None:
        super().__init__(state, body, [job])
        self._choices = [_Choice(answer_format, body) for _ in range(job.params.n)]
        # a whole answer is read when it has ended, which costs less, where all of it is shown
        self._reads_steps = body.one_call or body.include_reasoning is False

    def take(self, job_index: int, output: RequestOutput) -> None:
        super().take(job_index, output)
        if self._reads_steps:
            choice = self._choices[output.index]
            choice.keep(self._add(choice, output))

    def choices(self) -> Iterator[dict[str, Any]]:
        for index, choice in enumerate(self._choices):
            if not self._reads_steps:
                choice.keep(choice.add(self.outputs[0, index], is_whole=True))
            fields = {
                "index": index,
                "message": _message(choice.events),
                "logprobs": self._scores(choice.scores),
                **self._end(choice, self.outputs[0, index]),
            }
            if self.body.return_token_ids:
                fields["token_ids"] = choice.token_ids
            yield fields

    def shared_fields(self) -> dict[str, Any]:
        return self.prompt_fields(self.outputs[0, 0])

    def opening(self) -> Iterator[dict[str, Any]]:
        """The role of each choice."""
        job = self.jobs[0]
        more = {"prompt_token_ids": job.prompt_token_ids} if self.body.return_token_ids else {}
        for index in range(len(self._choices)):
            yield {"choices": [_delta(index, {"role": "assistant", "content": ""})], **more}

    def deltas(self, job_index: int, output: RequestOutput) -> list[dict[str, Any]]:
        choice = self._choices[output.index]
        deltas = list(_deltas(self._add(choice, output)))
        fields: dict[str, Any] = {}
        if choice.new_scores:
            fields["logprobs"] = self._scores(choice.new_scores)
        if self.body.return_token_ids and choice.new_token_ids:
            fields["token_ids"] = choice.new_token_ids
        if fields and not deltas:
            # tokens whose text is held back are scored when they come
            deltas = [{}]
        chunks = [_delta(output.index, delta) for delta in deltas]
        if chunks:
            chunks[0].update(fields)
        if output.finished:
            chunks.append({**_delta(output.index, {}), **self._end(choice, output)})
        return chunks

    def shown_outputs(self) -> Sequence[RequestOutput]:
        """See `Answer`; a choice that was complete before its end counts up to there."""
        return [choice.output for choice in self._choices if choice.output is not None]

    def _add(self, choice: _Choice, output: RequestOutput) -> list[Event]:
        """What a step adds to a choice; one that is complete by that is ended."""
        was_complete = choice.is_complete
        events = choice.add(output)
        if choice.is_complete and not (was_complete or output.finished):
            self.state.engine.end(self.jobs[0].request_id, output.index)
        return events

    def _end(self, choice: _Choice, output: RequestOutput) -> dict[str, Any]:
        """Why a choice has ended, "tool_calls" after a call, and the fields of its end."""
        is_called = choice.has_calls and output.finish_reason == "stop"
        reason = "tool_calls" if is_called or choice.is_complete else output.finish_reason
        return {"finish_reason": reason, **self.end_fields(0, output)}

    def _scores(self, entries: Sequence[TokenLogprobs]) -> dict[str, Any] | None:
        if self.jobs[0].params.logprobs is None:
            return None
        return chat_logprobs(self.tokenizer, entries)


class _Choice:
    """One choice of an answer, while it comes.

    Attributes:
        is_complete: nothing that the engine adds is shown any more.
        new_token_ids, new_scores: what the last step has shown.
        events, token_ids, scores: all that was shown, of a whole answer.
    """

    def __init__(self, answer: AnswerFormat, body: ChatCompletionRequest) -> None:
        self.is_complete = self.has_calls = False
        self.output: RequestOutput | None = None
        self.new_token_ids: Sequence[int] = ()
        self.new_scores: Sequence[TokenLogprobs] = ()
        self.events: list[Event] = []
        self.token_ids: list[int] = []
        self.scores: list[TokenLogprobs] = []
        self._parser = OutputParser(answer)
        self._one_call = body.one_call
        # the reasoning is a part of the answer; its tokens and scores go with it
        self._shows_reasoning = body.include_reasoning is not False

    def add(self, output: RequestOutput, *, is_whole: bool = False) -> list[Event]:
        """What a step adds to the answer, or a whole output."""
        self.new_token_ids, self.new_scores = (), ()
        if self.is_complete:
            return []
        self.output = output
        text, token_ids, scores = shown(output, is_whole)
        was_reasoning = self._parser.is_reasoning
        events = self._parser.feed(text)
        if output.finished:
            events += self._parser.finish(is_cut=output.finish_reason != "stop")
        if self._shows_reasoning or not (was_reasoning or self._parser.is_reasoning):
            self.new_token_ids, self.new_scores = token_ids, scores
        return list(self._shown(events))

    def keep(self, events: list[Event]) -> None:
        """Keep what was added last, for a whole answer."""
        self.events += events
        self.token_ids += self.new_token_ids
        self.scores += self.new_scores

    def _shown(self, events: Iterable[Event]) -> Iterator[Event]:
        for event in events:
            self.has_calls = self.has_calls or event.kind == "call"
            if self._shows_reasoning or event.kind != "reasoning":
                yield event
            if self._one_call and event.kind == "call_end":
                self.is_complete = True
                return


def _message(events: Iterable[Event]) -> dict[str, Any]:
    joined = join_events(events)
    message: dict[str, Any] = {"role": "assistant", "content": joined.content or None}
    if joined.reasoning:
        message["reasoning_content"] = joined.reasoning
    if joined.tool_calls:
        message["tool_calls"] = [_call(call.name, call.arguments) for call in joined.tool_calls]
    elif not joined.content:
        message["content"] = ""
    return message


def _delta(index: int, delta: dict[str, Any]) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}


def _deltas(events: Iterable[Event]) -> Iterator[dict[str, Any]]:
    for event in events:
        if event.kind == "content":
            yield {"content": event.text}
        elif event.kind == "reasoning":
            yield {"reasoning_content": event.text}
        elif event.kind == "arguments":
            yield {"tool_calls": [{"index": event.index, "function": {"arguments": event.text}}]}
        elif event.kind == "call":
            yield {"tool_calls": [{"index": event.index, **_call(event.text, "")}]}


def _call(name: str, arguments: str) -> dict[str, Any]:
    call_id = f"call_{uuid.uuid4().hex[:24]}"
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}
