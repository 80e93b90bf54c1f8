"""Choices of a conversation as parser events, for any API that sends them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, ClassVar

from fd_dsa.chat.events import Event
from fd_dsa.chat.parser import AnswerFormat, OutputParser
from fd_dsa.serve.answer import Answer
from fd_dsa.serve.generation import Job
from fd_dsa.serve.protocol.answers import ChatFinish, Usage
from fd_dsa.serve.protocol.chat import ChatCompletionRequest
from fd_dsa.serve.state import ServerState

if TYPE_CHECKING:
    from fd_dsa.engine.logprobs import TokenLogprobs
    from fd_dsa.engine.output import RequestOutput


class ConversationAnswer(Answer[ChatCompletionRequest]):
    """Choices whose text is parsed into reasoning, content and calls."""

    prompt_field = "messages"
    scores_reasoning: ClassVar[bool] = True
    """True if the tokens and scores of the reasoning are shown too."""

    def __init__(
        self, state: ServerState, body: ChatCompletionRequest, job: Job, answer_format: AnswerFormat
    ) -> None:
        super().__init__(state, body, [job])
        self._has_reasoning = answer_format.has_reasoning
        with_reasoning = self.scores_reasoning and body.include_reasoning is not False
        self.parsed = [Choice(answer_format, body, with_reasoning) for _ in range(job.params.n)]

    def shown_outputs(self) -> Sequence[RequestOutput]:
        """See `Answer`. A choice that was complete early counts up to that step."""
        return [choice.output for choice in self.parsed if choice.output is not None]

    @property
    def num_reasoning_tokens(self) -> int:
        """Number of tokens of all choices up to the end of their reasoning."""
        return sum(output.num_reasoning_tokens for output in self.shown_outputs())

    def usage(self) -> Usage:
        """See `Answer`. The reasoning counts if the answer format tells it apart, as in vLLM."""
        usage = super().usage()
        if self._has_reasoning:
            details = usage.setdefault("completion_tokens_details", {})
            details["reasoning_tokens"] = self.num_reasoning_tokens
        return usage

    def add(self, output: RequestOutput) -> list[Event]:
        """Return the events of a step, and end a choice that is complete."""
        choice = self.parsed[output.index]
        was_complete = choice.is_complete
        events = choice.add(output)
        if choice.is_complete and not (was_complete or output.finished):
            self.state.engine.end(self.jobs[0].request_id, output.index)
        return events

    def finish_reason(self, output: RequestOutput) -> ChatFinish | None:
        """Return the finish reason ("tool_calls" after a call), or None before the end."""
        choice = self.parsed[output.index]
        is_called = choice.has_calls and output.finish_reason == "stop"
        # a stop string inside a call leaves a call that no client can run
        is_called = is_called and not (choice.is_calling and isinstance(output.stop_reason, str))
        return "tool_calls" if is_called or choice.is_complete else output.finish_reason


class Choice:
    """The parser state of one choice.

    Args:
        with_reasoning: True if the tokens and scores of the reasoning are shown too.

    Attributes:
        is_complete: the answer is complete, later output is dropped.
        has_calls: a call has begun.
        is_calling: the last event belongs to a call without an end.
        new_token_ids, new_scores: shown tokens of the last step and their scores.
        events, token_ids, scores: everything shown so far, for a whole answer.
    """

    def __init__(
        self, answer: AnswerFormat, body: ChatCompletionRequest, with_reasoning: bool
    ) -> None:
        self.is_complete = self.has_calls = self.is_calling = False
        self.output: RequestOutput | None = None
        self.new_token_ids: list[int] = []
        self.new_scores: list[TokenLogprobs] = []
        self.events: list[Event] = []
        self.token_ids: list[int] = []
        self.scores: list[TokenLogprobs] = []
        self._parser = OutputParser(answer)
        self._call_ends = () if answer.tool_format is None else answer.tool_format.ends
        self._one_call = body.one_call
        self._shows_reasoning = body.include_reasoning is not False
        self._with_reasoning = with_reasoning
        # indices of the first token and the first score that are not shown yet
        self._next_token = self._next_score = 0

    def add(self, output: RequestOutput, *, is_whole: bool = False) -> list[Event]:
        """Return the events of one step, or of a whole output."""
        self.new_token_ids, self.new_scores = [], []
        # with one call the tokens after it do not count, also those of the same step
        parts = output.by_token() if self._one_call and not is_whole else (output,)
        return [e for part in parts if not self.is_complete for e in self._add(part, is_whole)]

    def _add(self, output: RequestOutput, is_whole: bool) -> list[Event]:
        self.output = output
        text = output.text if is_whole else output.new_text
        if output.finished:
            events = self._parser.finish(text, is_cut=self._is_cut(output))
        else:
            events = self._parser.feed(text)
        self._show_tokens(output)
        return list(self._shown(events))

    def _show_tokens(self, output: RequestOutput) -> None:
        """Set the new tokens and scores, from the engine's start of the answer on if necessary."""
        start = 0 if self._with_reasoning else output.answer_start
        if start is None:
            return
        begin, self._next_token = max(start, self._next_token), output.num_tokens
        self.new_token_ids += output.token_ids_from(begin)
        begin = max(start, self._next_score)
        new_scores = output.logprobs_from(begin)
        self.new_scores += new_scores
        self._next_score = begin + len(new_scores)

    def _is_cut(self, output: RequestOutput) -> bool:
        """Return True if the output was cut off before its own end.

        A stop string that is or contains the end marker of a call counts as the model's own end.
        """
        stop = output.stop_reason
        return output.finish_reason != "stop" or (
            isinstance(stop, str) and not any(end in stop for end in self._call_ends)
        )

    def keep(self, events: list[Event]) -> None:
        """Store the last additions for a whole answer."""
        self.events += events
        self.token_ids += self.new_token_ids
        self.scores += self.new_scores

    def _shown(self, events: Iterable[Event]) -> Iterator[Event]:
        for event in events:
            self.has_calls = self.has_calls or event.kind == "call"
            self.is_calling = event.kind in ("call", "arguments")
            if self._shows_reasoning or event.kind != "reasoning":
                yield event
            if self._one_call and event.kind == "call_end":
                self.is_complete = True
                return
