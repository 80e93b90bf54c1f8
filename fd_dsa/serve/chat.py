"""POST /v1/chat/completions."""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from fastapi import APIRouter, Request
from starlette.responses import Response

from fd_dsa.chat.events import Event, join_events
from fd_dsa.serve.answer import respond
from fd_dsa.serve.body import BodyRoute
from fd_dsa.serve.chat_prompt import make_job
from fd_dsa.serve.conversation import ConversationAnswer
from fd_dsa.serve.logprobs import chat_logprobs
from fd_dsa.serve.protocol.answers import (
    AnswerMessage,
    ChatChoice,
    ChatChunkBody,
    ChatChunkChoice,
    ChatCompletion,
    ChatEnd,
    ChatLogprobs,
    Delta,
    FunctionText,
    PromptFields,
    ToolCall,
    ToolCallDelta,
)
from fd_dsa.serve.protocol.chat import ChatCompletionRequest
from fd_dsa.serve.state import State

if TYPE_CHECKING:
    from fd_dsa.engine.logprobs import TokenLogprobs
    from fd_dsa.engine.output import RequestOutput

router = APIRouter(route_class=BodyRoute)


@router.post("/v1/chat/completions", summary="Answer a conversation", response_model=ChatCompletion)
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

    def take(self, job_index: int, output: RequestOutput) -> None:
        super().take(job_index, output)
        # only an answer with one call may end early, so others are parsed once, which is cheaper
        if self.body.one_call:
            self.parsed[output.index].keep(self.add(output))

    def choices(self) -> Iterator[ChatChoice]:
        for index, choice in enumerate(self.parsed):
            if not self.body.one_call:
                choice.keep(choice.add(self.outputs[0, index], is_whole=True))
            fields: ChatChoice = {
                "index": index,
                "message": _message(choice.events),
                "logprobs": self._scores(choice.scores),
                "finish_reason": None,
                "stop_reason": None,
            }
            if self.body.return_token_ids:
                fields["token_ids"] = choice.token_ids
            yield {**fields, **self._end(self.outputs[0, index])}

    def shared_fields(self) -> PromptFields:
        return self.prompt_fields(self.outputs[0, 0])

    def opening(self) -> Iterator[ChatChunkBody]:
        """Yield the role of each choice."""
        for index in range(len(self.parsed)):
            chunk: ChatChunkBody = {
                "choices": [_delta(index, {"role": "assistant", "content": ""})]
            }
            if self.body.return_token_ids:
                chunk["prompt_token_ids"] = self.jobs[0].prompt_token_ids
            yield chunk

    def deltas(self, job_index: int, output: RequestOutput) -> list[ChatChunkChoice]:
        choice = self.parsed[output.index]
        deltas = list(_deltas(self.add(output)))
        shows_ids = bool(self.body.return_token_ids and choice.new_token_ids)
        if (choice.new_scores or shows_ids) and not deltas:
            # the scores of tokens are sent at once, even while the parser holds back their text
            deltas = [{}]
        chunks = [_delta(output.index, delta) for delta in deltas]
        if choice.new_scores:
            chunks[0]["logprobs"] = self._scores(choice.new_scores)
        if shows_ids:
            chunks[0]["token_ids"] = list(choice.new_token_ids)
        if output.finished:
            chunks.append({**_delta(output.index, {}), **self._end(output)})
        return chunks

    def _end(self, output: RequestOutput) -> ChatEnd:
        return {"finish_reason": self.finish_reason(output), **self.end_fields(0, output)}

    def _scores(self, entries: Sequence[TokenLogprobs]) -> ChatLogprobs | None:
        if self.jobs[0].params.logprobs is None:
            return None
        return chat_logprobs(self.tokenizer, entries)


def _message(events: Iterable[Event]) -> AnswerMessage:
    joined = join_events(events)
    message: AnswerMessage = {"role": "assistant", "content": joined.content or None}
    if joined.reasoning:
        message["reasoning_content"] = joined.reasoning
    if joined.tool_calls:
        message["tool_calls"] = [_call(call.name, call.arguments) for call in joined.tool_calls]
    elif not joined.content:
        message["content"] = ""
    return message


def _delta(index: int, delta: Delta) -> ChatChunkChoice:
    return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}


def _deltas(events: Iterable[Event]) -> Iterator[Delta]:
    for event in events:
        if event.kind == "content":
            yield {"content": event.text}
        elif event.kind == "reasoning":
            yield {"reasoning_content": event.text}
        elif event.kind == "arguments":
            yield {"tool_calls": [{"index": event.index, "function": {"arguments": event.text}}]}
        elif event.kind == "call":
            begun: ToolCallDelta = {
                "index": event.index,
                "id": _call_id(),
                "type": "function",
                "function": {"name": event.text, "arguments": ""},
            }
            yield {"tool_calls": [begun]}


def _call(name: str, arguments: str) -> ToolCall:
    function: FunctionText = {"name": name, "arguments": arguments}
    return {"id": _call_id(), "type": "function", "function": function}


def _call_id() -> str:
    return f"call_{uuid.uuid4().hex[:24]}"
