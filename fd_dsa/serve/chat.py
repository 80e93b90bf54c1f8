"""POST /v1/chat/completions."""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from fd_dsa.chat.events import Event, join_events
from fd_dsa.chat.parser import AnswerFormat
from fd_dsa.serve.answer import respond
from fd_dsa.serve.body import BodyRoute
from fd_dsa.serve.chat_prompt import make_job
from fd_dsa.serve.conversation import ConversationAnswer
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

    return await respond(make, "chatcmpl-", body, request, state)


class ChatAnswer(ConversationAnswer):
    """The answer to a chat completion."""

    whole_object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def __init__(
        self, state: ServerState, body: ChatCompletionRequest, job: Job, answer_format: AnswerFormat
    ) -> None:
        super().__init__(state, body, job, answer_format)
        # a whole answer is read when it has ended, which costs less, where all of it is shown
        self._reads_steps = body.one_call or body.include_reasoning is False

    def take(self, job_index: int, output: RequestOutput) -> None:
        super().take(job_index, output)
        if self._reads_steps:
            self.parsed[output.index].keep(self.add(output))

    def choices(self) -> Iterator[dict[str, Any]]:
        for index, choice in enumerate(self.parsed):
            if not self._reads_steps:
                choice.keep(choice.add(self.outputs[0, index], is_whole=True))
            fields = {
                "index": index,
                "message": _message(choice.events),
                "logprobs": self._scores(choice.scores),
                **self._end(self.outputs[0, index]),
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
        for index in range(len(self.parsed)):
            yield {"choices": [_delta(index, {"role": "assistant", "content": ""})], **more}

    def deltas(self, job_index: int, output: RequestOutput) -> list[dict[str, Any]]:
        choice = self.parsed[output.index]
        deltas = list(_deltas(self.add(output)))
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
            chunks.append({**_delta(output.index, {}), **self._end(output)})
        return chunks

    def _end(self, output: RequestOutput) -> dict[str, Any]:
        return {"finish_reason": self.finish_reason(output), **self.end_fields(0, output)}

    def _scores(self, entries: Sequence[TokenLogprobs]) -> dict[str, Any] | None:
        if self.jobs[0].params.logprobs is None:
            return None
        return chat_logprobs(self.tokenizer, entries)


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
