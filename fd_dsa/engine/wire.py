"""Outputs of an engine as plain tuples, for a receiver in another process.

A `RequestOutput` has all tokens and all text so far. The wire has what a step adds: the sender
drops the rest, the receiver keeps its own growing lists and puts the output together again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fd_dsa.engine.host import Abort, Add, Outputs
from fd_dsa.engine.logprobs import TokenLogprobs, TokenScore
from fd_dsa.engine.output import OutputState, RequestOutput

_Scores = list[tuple[int, int, float, int, tuple[tuple[int, float], ...]] | None]

Packed = list[tuple[Any, ...]]
"""Outputs of one step: (key, index, new_token_ids, new_text) of one that only goes on, and the
further fields of `_pack` of a first or last one, or of one with log-probabilities."""


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
        _pack_scores(output.new_logprobs),
        None if prompt_scores is None else _pack_scores(prompt_scores),
        output.topk_positions,
    )


class OutputUnpacker:
    """Puts outputs together again, on the receiver's side."""

    def __init__(self) -> None:
        """No request is known."""
        # the n outputs of each request that is expected
        self._states: dict[int, list[OutputState]] = {}

    def add(self, command: Add) -> None:
        """Expect outputs of a request."""
        prompt, params = list(command.prompt_token_ids), command.params
        states = [OutputState(command.request_id, index, prompt) for index in range(params.n)]
        if params.logprobs is not None:
            for state in states:
                state.logprobs = []
        self._states[command.key] = states

    def abort(self, command: Abort) -> None:
        """Expect no more outputs of a request that nobody reads."""
        if command.is_silent:
            self.forget(command.key)

    def forget(self, key: int) -> None:
        """Expect no more outputs of a request."""
        self._states.pop(key, None)

    def unpack(self, packed: Packed) -> Outputs:
        """The outputs of one step; those of forgotten requests are left out."""
        outputs: Outputs = []
        for key, index, *fields in packed:
            states = self._states.get(key)
            if states is None:
                continue
            output = _unpack(states, index, *fields)
            outputs.append((key, output))
            if output.finished and all(state.finish_time is not None for state in states):
                self.forget(key)
        return outputs


def _unpack(
    states: list[OutputState],
    index: int,
    new_token_ids: list[int],
    new_text: str,
    finish_reason: Any = None,
    stop_reason: str | int | None = None,
    times: tuple[float, float | None, float | None] | None = None,
    error: RuntimeError | None = None,
    num_cached_tokens: int = 0,
    new_scores: _Scores | None = None,
    prompt_scores: _Scores | None = None,
    topk_positions: Any = None,
) -> RequestOutput:
    """One of a request's outputs, with what a step has added to its state."""
    state = states[index]
    state.token_ids += new_token_ids
    if new_text:
        state.pieces.append(new_text)
    new_logprobs: list[Any] = _unpack_scores(new_scores or [])
    if state.logprobs is not None:
        state.logprobs += new_logprobs
    if times is not None:
        state.arrival_time, state.first_token_time, state.finish_time = times
        state.num_cached_tokens = num_cached_tokens
    if prompt_scores is not None:
        entries = _unpack_scores(prompt_scores)
        for each in states:
            each.prompt_logprobs = entries
    return RequestOutput(
        state,
        new_token_ids,
        new_text,
        new_logprobs,
        finish_reason,
        stop_reason,
        error,
        topk_positions,
    )


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
