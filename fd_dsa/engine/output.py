"""Outputs of requests, as the engine reports them after each step."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from fd_dsa.engine.logprobs import TokenLogprobs

FinishReason = Literal["stop", "length", "abort", "error"]
Additions = tuple[Any, ...]
"""Additions of a step to an output: request id, and arguments of `apply_additions`.

`RequestOutput.additions` makes it, and `apply_additions` reads it. Unchanged entries at the end are
left out.
"""


class ConstraintError(RuntimeError):
    """The constraints of a request exclude every token, which is an error of the caller."""


@dataclass(frozen=True, slots=True)
class TopkPositions:
    """Positions that the indexer selected for one token, by layer.

    Attributes:
        position: position of the token in its sequence, from 0.
        layers: for each layer int64 [n], ascending; positions that the token attends to, at most
            `index_topk` of those up to `position`. A layer without an indexer has the array of the
            layer whose selection it shares.
    """

    position: int
    layers: Sequence[npt.NDArray[np.int64]]


@dataclass(slots=True, eq=False)
class OutputState:
    """State of one output of a request, which grows with each step.

    Attributes:
        request_id: name of the request.
        index: number of the output among the n outputs of its request, from 0.
        prompt_token_ids: token ids of the prompt; callers must not change the list.
        token_ids: token ids of the output, including an end-of-sequence token.
        pieces: text of the output, one entry for each step that added some.
        logprobs: scores of the output tokens whose text is shown; None if not asked for.
        prompt_logprobs: scores of the prompt tokens, with None for the first one; None before the
            whole prompt is computed, or if not asked for.
        answer_start: index of the first token after the reasoning, 0 without reasoning; None inside
            the reasoning, and while the output may still begin with it.
        num_cached_tokens: number of leading prompt tokens that came from the prefix cache.
        num_host_cached_tokens: of these, tokens whose blocks were copied from host memory.
        num_draft_tokens: number of verified drafts.
        num_accepted_tokens: number of accepted drafts.
        arrival_time: when the request arrived, seconds of time.monotonic().
        first_token_time: when it got its first token, or None.
        finish_time: when it ended, or None.
    """

    request_id: str
    index: int
    prompt_token_ids: list[int]
    token_ids: list[int] = field(default_factory=list)
    pieces: list[str] = field(default_factory=list)
    logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    answer_start: int | None = 0
    num_cached_tokens: int = 0
    num_host_cached_tokens: int = 0
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    arrival_time: float = 0.0
    first_token_time: float | None = None
    finish_time: float | None = None


class RequestOutput:
    """Output of a request after a step, which stays valid after later steps.

    It also has the attributes of `OutputState`, except for `pieces`, as they were after the step.
    `outputs[0].text` and other names of vLLM's outputs work too, see `outputs`.

    Attributes:
        prompt: text of the prompt, as the chat template rendered it; None if the caller gave token
            ids.
        text: all text so far, property.
        token_ids: all output tokens so far, property.
        finished: True in the last state of an output, property.
        new_token_ids: tokens added by this step.
        new_text: text added by this step; empty while a character or a possible stop string is
            incomplete.
        new_logprobs: scores shown by this step.
        finish_reason: None while running; "stop" end-of-sequence or stop string, "length"
            max_tokens reached, "abort" ended by the caller, "error" see `error`.
        stop_reason: the stop string or the token id that ended the request.
        error: reason why this output failed: its logits were not finite, or a `ConstraintError`.
            Other requests continue.
        topk_positions: positions that the indexer selected for the token before the last one; None
            before the last state, or if not asked for.
        new_ends: with drafts, for each new token the number of characters of `new_text` and of
            scores in `new_logprobs` that are shown up to it.
        brings_prompt_logprobs: True in the first output of a request that has `prompt_logprobs`.
        num_tokens: length of `token_ids`.
        num_reasoning_tokens: number of leading output tokens up to the end of the reasoning, with
            its markers, property.

    Cost: independent of the length of the output. It keeps the growing lists of the state and their
    lengths after the step. The properties copy the lists up to these lengths.
    """

    def __init__(
        self,
        state: OutputState,
        new_token_ids: list[int],
        new_text: str,
        new_logprobs: Sequence[TokenLogprobs] = (),
        finish_reason: FinishReason | None = None,
        stop_reason: str | int | None = None,
        error: RuntimeError | None = None,
        topk_positions: TopkPositions | None = None,
        new_ends: Sequence[tuple[int, int]] = (),
        brings_prompt_logprobs: bool = False,
    ) -> None:
        self._state = state
        self._others: Sequence[RequestOutput] = ()
        self.prompt: str | None = None
        self.request_id = state.request_id
        self.index = state.index
        self.prompt_token_ids = state.prompt_token_ids
        self.prompt_logprobs = state.prompt_logprobs
        self.answer_start = state.answer_start
        self.num_cached_tokens = state.num_cached_tokens
        self.num_host_cached_tokens = state.num_host_cached_tokens
        self.num_draft_tokens = state.num_draft_tokens
        self.num_accepted_tokens = state.num_accepted_tokens
        self.arrival_time = state.arrival_time
        self.first_token_time = state.first_token_time
        self.finish_time = state.finish_time
        self.num_tokens = len(state.token_ids)
        self._num_pieces = len(state.pieces)
        self._num_logprobs = len(state.logprobs or ())
        self.new_token_ids = new_token_ids
        self.new_text = new_text
        self.new_logprobs = new_logprobs
        self.finish_reason = finish_reason
        self.stop_reason = stop_reason
        self.error = error
        self.topk_positions = topk_positions
        self.new_ends = new_ends
        self.brings_prompt_logprobs = brings_prompt_logprobs

    @staticmethod
    def of_prompt(outputs: Sequence[RequestOutput]) -> RequestOutput:
        """Return the first of the n finished outputs of a prompt, with all of them in `outputs`."""
        first = outputs[0]
        first._others = outputs[1:]
        return first

    @property
    def outputs(self) -> list[RequestOutput]:
        """Outputs of the prompt by `index`: this one, then the others of a finished call.

        `LLM.generate` and `LLM.chat` return the first of the n outputs of a prompt, with all n in
        `outputs`. So `out.text` is `out.outputs[0].text`. An output of a stream has only itself.
        """
        return [self, *self._others]

    @property
    def token_ids(self) -> list[int]:
        """Token ids of the output so far."""
        return self._state.token_ids[: self.num_tokens]

    @property
    def num_reasoning_tokens(self) -> int:
        """Number of leading output tokens that belong to the reasoning."""
        return self.num_tokens if self.answer_start is None else self.answer_start

    def token_ids_from(self, begin: int) -> list[int]:
        """Return the output tokens from an index on."""
        return self._state.token_ids[begin : self.num_tokens]

    def logprobs_from(self, begin: int) -> list[TokenLogprobs]:
        """Return the shown scores of the output tokens from an index on, none unless asked for."""
        return (self._state.logprobs or [])[begin : self._num_logprobs]

    def by_token(self) -> Iterator[RequestOutput]:
        """Yield one output for each token of the step, as without drafts.

        The attribute `text` is the text after the whole step.
        """
        first = self.num_tokens - len(self.new_token_ids) + 1
        return self._parts([(first + i, *end) for i, end in enumerate(self.new_ends[:-1])])

    def by_score(self, num_chars: int) -> Iterator[RequestOutput]:
        """Yield one output for each token whose score the step shows.

        A step shows several scores with drafts, and after text that was held back. The attribute
        `text` is the text after the whole step.

        Args:
            num_chars: number of characters that earlier steps have shown.
        """
        num_tokens = self.num_tokens - len(self.new_token_ids)
        num_scores = self._num_logprobs - len(self.new_logprobs)
        # the beginning of a token's text may be shown before its score
        return self._parts(
            [
                (max(num_tokens, num_scores + i), max(0, following.text_offset - num_chars), i)
                for i, following in enumerate(self.new_logprobs[1:], 1)
            ]
        )

    def _parts(self, ends: Sequence[tuple[int, int, int]]) -> Iterator[RequestOutput]:
        """Yield the parts of a step up to each end, then the rest.

        Args:
            ends: length of `token_ids`, and numbers of new characters and of new scores.
        """
        if not ends:
            yield self
            return
        begin, num_tokens = (0, 0), self.num_tokens - len(self.new_token_ids)
        num_scores = self._num_logprobs - len(self.new_logprobs)
        all_new = self.num_tokens, len(self.new_text), len(self.new_logprobs)
        for end in (*ends, all_new):
            part = copy.copy(self)
            part.num_tokens, chars, scores = end
            part._num_logprobs, part.new_ends = num_scores + scores, ()
            part.new_token_ids = self._state.token_ids[num_tokens : part.num_tokens]
            part.new_text = self.new_text[begin[0] : chars]
            part.new_logprobs = self.new_logprobs[begin[1] : scores]
            if end is not all_new:
                part.finish_reason = part.stop_reason = part.topk_positions = None
            yield part
            num_tokens, begin = part.num_tokens, (chars, scores)

    @property
    def text(self) -> str:
        """Text of the output so far."""
        return "".join(self._state.pieces[: self._num_pieces])

    @property
    def logprobs(self) -> list[TokenLogprobs] | None:
        """Scores of the output tokens whose text is shown, or None unless asked for."""
        shown = self._state.logprobs
        return None if shown is None else shown[: self._num_logprobs]

    @property
    def cumulative_logprob(self) -> float | None:
        """Sum of the log-probabilities in `logprobs`, or None unless asked for."""
        scores = self.logprobs
        return None if scores is None else sum((one.score.logprob for one in scores), 0.0)

    @property
    def finished(self) -> bool:
        """True in the last state of an output."""
        return self.finish_reason is not None

    def additions(self) -> Additions:
        """Return the additions of the step, for a process that has the state before it."""
        start = (self.new_token_ids, self.new_text)
        is_first = self.num_tokens <= len(self.new_token_ids)
        has_more = is_first or self.finished or self.brings_prompt_logprobs
        if not (has_more or self.new_logprobs or self.num_draft_tokens):
            return self.request_id, self.index, start, self.answer_start
        times = (self.arrival_time, self.first_token_time, self.finish_time)
        # the outputs of a request share the scores of its prompt
        prompt_logprobs = self.prompt_logprobs if self.brings_prompt_logprobs else None
        more = (self.new_logprobs, self.finish_reason, self.stop_reason, self.error)
        gained = (*start, *more, self.topk_positions, self.new_ends)
        cached = self.num_cached_tokens, self.num_host_cached_tokens
        counts = (*cached, self.num_draft_tokens, self.num_accepted_tokens)
        head = self.request_id, self.index, gained, self.answer_start
        return *head, times, counts, prompt_logprobs

    def __repr__(self) -> str:
        """Return a short form for logs and the interactive prompt."""
        return (
            f"RequestOutput(request_id={self.request_id!r}, index={self.index}, "
            f"text={self.text!r}, num_tokens={self.num_tokens}, "
            f"finish_reason={self.finish_reason!r})"
        )


def apply_additions(
    states: Sequence[OutputState],
    index: int,
    gained: tuple[Any, ...],
    answer_start: int | None,
    times: tuple[float, float | None, float | None] | None = None,
    counts: tuple[int, int, int, int] = (0, 0, 0, 0),
    prompt_logprobs: list[TokenLogprobs | None] | None = None,
) -> RequestOutput:
    """Return the output after a step from the state before it.

    Args:
        states: all outputs of the request before the step; the one with `index` grows.
        index, gained, ...: entries of `Additions` after the request id.
    """
    state = states[index]
    new_token_ids, new_text, *more = gained
    state.token_ids += new_token_ids
    state.answer_start = answer_start
    if new_text:
        state.pieces.append(new_text)
    if state.logprobs is not None and more:
        state.logprobs += more[0]
    if times is not None:
        state.arrival_time, state.first_token_time, state.finish_time = times
        state.num_cached_tokens, state.num_host_cached_tokens, *drafts = counts
        state.num_draft_tokens, state.num_accepted_tokens = drafts
    if prompt_logprobs is not None:
        for each in states:
            each.prompt_logprobs = prompt_logprobs
    return RequestOutput(state, *gained)
