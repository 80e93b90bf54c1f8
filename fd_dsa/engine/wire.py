"""Outputs of an engine as plain tuples, for a receiver in another process.

A `RequestOutput` has all tokens and all text so far. The wire has what a step adds: the sender
drops the rest, the receiver keeps its own growing lists and puts the output together again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fd_dsa.engine.host import Abort, Add, Outputs
from fd_dsa.engine.logprobs import OutputLogprobs, TokenLogprobs, TokenScore
from fd_dsa.engine.output import RequestOutput

_Scores = list[tuple[int, int, float, int, tuple[tuple[int, float], ...]] | None]

Packed = list[tuple[Any, ...]]
"""Outputs of one step: (key, index, new_token_ids, new_text) of one that only goes on, and nine
fields more (see `_pack`) of a first or last one, or of one with log-probabilities."""


def pack_outputs(outputs: Outputs) -> Packed:
    """What the outputs of one step add to those of the steps before, as `Packed`."""
    return [_pack(key, output) for key, output in outputs]


def _pack(key: int, output: RequestOutput) -> tuple[Any, ...]:
    """The tuple of one output."""
    added = (key, output.index, output.new_token_ids, output.new_text)
    is_first = output.num_tokens <= len(output.new_token_ids)
    if not (is_first or output.finished or output.new_logprobs):
        return added
    # the choices of a request share the scores of its prompt, which the first of them reads
    prompt_scores = output.prompt_logprobs if is_first and output.index == 0 else None
    return (
        *added,
        output.finish_reason,
        output.stop_reason,
        (output.arrival_time, output.first_token_time, output.finish_time),
        output.error,
        output.num_cached_tokens,
        output.has_logprobs,
        _pack_scores(output.new_logprobs),
        None if prompt_scores is None else _pack_scores(prompt_scores),
        output.topk_positions,
    )


class OutputUnpacker:
    """Puts outputs together again, on the receiver's side."""

    def __init__(self) -> None:
        """No request is known."""
        self._requests: dict[int, _Request] = {}

    def add(self, command: Add) -> None:
        """Expect outputs of a request."""
        self._requests[command.key] = _Request(command)

    def abort(self, command: Abort) -> None:
        """Expect no more outputs of a request that nobody reads."""
        if command.is_silent:
            self.forget(command.key)

    def forget(self, key: int) -> None:
        """Expect no more outputs of a request."""
        self._requests.pop(key, None)

    def unpack(self, packed: Packed) -> Outputs:
        """The outputs of one step; those of forgotten requests are left out."""
        outputs: Outputs = []
        for key, index, *fields in packed:
            request = self._requests.get(key)
            if request is None:
                continue
            output = request.take(index, *fields)
            outputs.append((key, output))
            if output.finished:
                request.num_unfinished -= 1
                if not request.num_unfinished:
                    del self._requests[key]
        return outputs


class _Request:
    """A request whose outputs come."""

    def __init__(self, command: Add) -> None:
        self.request_id = command.request_id
        self.prompt_token_ids = list(command.prompt_token_ids)
        self.num_unfinished = command.params.n
        self.prompt_scores: list[TokenLogprobs | None] | None = None
        self._states = [_State() for _ in range(command.params.n)]

    def take(
        self,
        index: int,
        new_token_ids: list[int],
        new_text: str,
        finish_reason: Any = None,
        stop_reason: str | int | None = None,
        times: tuple[float, float | None, float | None] | None = None,
        error: RuntimeError | None = None,
        num_cached_tokens: int | None = None,
        has_logprobs: bool | None = None,
        new_scores: _Scores | None = None,
        prompt_scores: _Scores | None = None,
        topk_positions: Any = None,
    ) -> RequestOutput:
        """The output after one step."""
        state = self._states[index]
        state.token_ids += new_token_ids
        if new_text:
            state.pieces.append(new_text)
        if times is not None:
            state.times = times
        if num_cached_tokens is not None:
            state.num_cached_tokens = num_cached_tokens
        if has_logprobs and state.scores is None:
            state.scores = OutputLogprobs()
        added = [entry for entry in _unpack_scores(new_scores or []) if entry is not None]
        if state.scores is not None:
            state.scores.shown += added
        if prompt_scores is not None:
            self.prompt_scores = _unpack_scores(prompt_scores)
        return RequestOutput(
            self.request_id,
            self.prompt_token_ids,
            state.token_ids,
            state.pieces,
            new_token_ids,
            new_text,
            finish_reason,
            stop_reason,
            *state.times,
            error,
            state.num_cached_tokens,
            index,
            state.scores,
            added,
            self.prompt_scores,
            topk_positions,
        )


class _State:
    """One output of a request so far."""

    __slots__ = ("num_cached_tokens", "pieces", "scores", "times", "token_ids")

    def __init__(self) -> None:
        self.token_ids: list[int] = []
        self.pieces: list[str] = []
        self.times: tuple[float, float | None, float | None] = (0.0, None, None)
        self.num_cached_tokens = 0
        self.scores: OutputLogprobs | None = None


def _pack_scores(entries: Sequence[TokenLogprobs | None]) -> _Scores:
    """Log-probabilities as tuples, which pickle in a tenth of the time of their objects."""
    return [
        None
        if entry is None
        else (
            entry.token_id,
            entry.text_offset,
            entry.score.logprob,
            entry.score.rank,
            entry.score.top,
        )
        for entry in entries
    ]


def _unpack_scores(packed: _Scores) -> list[TokenLogprobs | None]:
    """The log-probabilities of `_pack_scores`."""
    return [
        None
        if entry is None
        else TokenLogprobs(entry[0], TokenScore(entry[2], entry[3], entry[4]), entry[1])
        for entry in packed
    ]
