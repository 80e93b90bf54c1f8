"""Answers as sequences of blocks: reasoning, text and tool calls."""

from __future__ import annotations

import contextlib
import dataclasses
import uuid
from abc import abstractmethod
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from fd_dsa.chat.events import Event
from fd_dsa.chat.parser import AnswerFormat
from fd_dsa.serve.answer import SHORT_TOKENS
from fd_dsa.serve.conversation import ConversationAnswer
from fd_dsa.serve.errors import ApiError
from fd_dsa.serve.generation import Job
from fd_dsa.serve.json_response import JsonResponse
from fd_dsa.serve.protocol.chat import ChatCompletionRequest
from fd_dsa.serve.state import ServerState

if TYPE_CHECKING:
    from fd_dsa.engine.logprobs import TokenLogprobs
    from fd_dsa.engine.output import RequestOutput


@dataclasses.dataclass
class Block:
    """A part of an answer.

    Attributes:
        kind: "content" is the text of the answer.
        index: position in the answer, from 0.
        name: name of the called tool.
        is_complete: False until the block ends, and for a block that the end of the answer cuts
            off.
        key: random part of the block's id.
        scores: log-probabilities of the tokens of a content block, if requested.
    """

    kind: Literal["reasoning", "content", "call"]
    index: int
    name: str = ""
    is_complete: bool = False
    key: str = dataclasses.field(default_factory=lambda: uuid.uuid4().hex)
    pieces: list[str] = dataclasses.field(default_factory=list)
    scores: list[TokenLogprobs] = dataclasses.field(default_factory=list)

    @property
    def text(self) -> str:
        """Text so far (the arguments of a call)."""
        return "".join(self.pieces)


@dataclasses.dataclass(frozen=True)
class Change:
    """A change of a block: it begins, grows or ends."""

    kind: Literal["begin", "more", "end"]
    block: Block
    text: str = ""
    scores: tuple[TokenLogprobs, ...] = ()


class BlockAnswer(ConversationAnswer):
    """An answer with one choice, sent as one object that holds its blocks.

    Attributes:
        blocks: all blocks that have begun.
        head: id, creation time and model, set by `whole` or `chunks`.
    """

    names_events = True
    scores_reasoning = False
    stream_end = b""

    def __init__(
        self, state: ServerState, body: ChatCompletionRequest, job: Job, answer_format: AnswerFormat
    ) -> None:
        super().__init__(state, body, job, answer_format)
        self.blocks: list[Block] = []
        self.head: dict[str, Any] = {}
        self._open: Block | None = None
        # number of characters of the output so far
        self._num_chars = 0
        # scores of tokens whose text the parser still holds back
        self._waiting: list[TokenLogprobs] = []

    @abstractmethod
    def show(self, change: Change) -> Iterator[Mapping[str, Any]]:
        """Yield the stream events for one change."""

    @abstractmethod
    def closing(self, output: RequestOutput) -> Iterator[Mapping[str, Any]]:
        """Yield the stream events after the last block."""

    def take(self, job_index: int, output: RequestOutput) -> None:
        super().take(job_index, output)
        for _ in self._changes(output):
            pass

    def is_small(self, job_index: int, output: RequestOutput) -> bool:
        """See `Answer`. The last event of a block may be long: it repeats text and scores."""
        is_scored = self.jobs[0].params.logprobs is not None
        is_long = output.finished and output.num_tokens > SHORT_TOKENS
        return super().is_small(job_index, output) and not (is_scored or is_long)

    def whole(self, head: dict[str, object]) -> JsonResponse:
        self.head = head
        (answer,) = self.choices()
        return JsonResponse(answer)

    async def chunks(self, head: dict[str, object]) -> AsyncGenerator[Mapping[str, Any], None]:
        """Yield the events of a streamed answer."""
        self.head = head
        for event in self.opening():
            yield event
        async with contextlib.aclosing(self.steps()) as steps:
            async for events in steps:
                for event in events:
                    yield event

    def deltas(self, job_index: int, output: RequestOutput) -> Sequence[Mapping[str, Any]]:
        events = [event for change in self._changes(output) for event in self.show(change)]
        return [*events, *self.closing(output)] if output.finished else events

    def _changes(self, output: RequestOutput) -> Iterator[Change]:
        """Yield the changes of one step. `blocks` is up to date at each yield."""
        if output.finish_reason == "abort":
            raise ApiError(
                503,
                "the server is shutting down and has ended the request; send it to another one or "
                "retry later",
                code="shutting_down",
            )
        (choice,) = self.parsed
        # in parts, so that scores of content and markup in one step stay apart
        for token in output.by_token() if self.body.one_call else (output,):
            for part in token.by_score(self._num_chars):
                events = self.add(part)
                self._waiting += choice.new_scores
                for event in events:
                    yield from self._apply(event)
                # scores of markup are not shown
                if self.blocks and self.blocks[-1].kind == "call":
                    self._waiting.clear()
            self._num_chars += len(token.new_text)
        if output.finished and self._open is not None:
            is_cut = self._open.kind == "call" or output.finish_reason == "length"
            yield from self._end(is_complete=not is_cut)

    def _apply(self, event: Event) -> Iterator[Change]:
        if event.kind == "call_end":
            yield from self._end()
        elif event.kind == "call":
            yield from self._begin(Block("call", len(self.blocks), event.text))
        elif event.kind == "arguments":
            yield from self._more(event.text)
        else:
            if self._open is None or self._open.kind != event.kind:
                yield from self._begin(Block(event.kind, len(self.blocks)))
            yield from self._more(event.text)

    def _begin(self, block: Block) -> Iterator[Change]:
        # a call that is still open is malformed and never gets an end event
        yield from self._end(is_complete=self._open is None or self._open.kind != "call")
        self.blocks.append(block)
        self._open = block
        yield Change("begin", block)

    def _more(self, text: str) -> Iterator[Change]:
        block = self._open
        assert block is not None, "text comes after the beginning of its block"
        block.pieces.append(text)
        scores = tuple(self._waiting) if block.kind == "content" else ()
        block.scores += scores
        # scores that wait while the reasoning grows belong to the content after it
        if block.kind != "reasoning":
            self._waiting.clear()
        yield Change("more", block, text, scores)

    def _end(self, *, is_complete: bool = True) -> Iterator[Change]:
        block, self._open = self._open, None
        if block is not None:
            block.is_complete = is_complete
            yield Change("end", block)
