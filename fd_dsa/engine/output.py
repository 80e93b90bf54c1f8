"""What the engine reports about an output after a step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from fd_dsa.engine.logprobs import OutputLogprobs, TokenLogprobs

FinishReason = Literal["stop", "length", "abort", "error"]


class ConstraintError(RuntimeError):
    """What a request asks of its output excludes every token: the caller's mistake, not ours."""


@dataclass(frozen=True, slots=True)
class TopkPositions:
    """What the indexer chose for one token.

    Attributes:
        position: of the token in its sequence, from 0 on.
        layers: for each layer, int64 [n], ascending: positions that the token attends to, at most
            `index_topk` of 0 to `position`. A layer without an indexer has those of the layer
            that it shares them with.
    """

    position: int
    layers: Sequence[npt.NDArray[np.int64]]


class RequestOutput:
    """State of one output of a request after one step; stays valid after later steps.

    Attributes:
        request_id: name given by the caller.
        index: which of the request's n outputs.
        prompt_token_ids: the prompt; not to be changed.
        token_ids: all output tokens so far, an end-of-sequence token included.
        text: all output text so far; the concatenation of every `new_text`.
        new_token_ids: tokens added by this step.
        new_text: text added by this step; may be empty while a character or a possible stop
            string is incomplete.
        finish_reason: None while running; "stop" end-of-sequence or stop string, "length"
            max_tokens reached, "abort" ended from outside, "error" see `error`.
        stop_reason: the stop string or the token id which ended the request.
        error: what went wrong with this request alone: its logits were not finite, or
            `ConstraintError`.
        num_cached_tokens: leading prompt tokens that were not computed for this request, because
            the blocks of earlier ones hold them.
        logprobs: scores of the output tokens whose text is shown, None unless asked for.
        new_logprobs: those of them that this step has shown.
        prompt_logprobs: scores of the prompt's tokens, None for the first one; None until the
            prompt is read, and unless asked for.
        topk_positions: what the indexer chose for the token behind which the last one was drawn;
            in the last state alone, and None unless asked for.
        arrival_time, first_token_time, finish_time: seconds of time.monotonic(); None when
            not reached yet.

    Cost: constant in the length of the output. `token_ids` and a `text` given in pieces may be
    the request's own growing lists, and so are the entries of `logprobs`; only their length at
    this step is kept, and the properties cut them when they are read.
    """

    __slots__ = (
        "_logprobs",
        "_num_logprobs",
        "_num_pieces",
        "_num_tokens",
        "_pieces",
        "_token_ids",
        "arrival_time",
        "error",
        "finish_reason",
        "finish_time",
        "first_token_time",
        "index",
        "new_logprobs",
        "new_text",
        "new_token_ids",
        "num_cached_tokens",
        "prompt_logprobs",
        "prompt_token_ids",
        "request_id",
        "stop_reason",
        "topk_positions",
    )

    def __init__(
        self,
        request_id: str,
        prompt_token_ids: list[int],
        token_ids: list[int],
        text: str | list[str],
        new_token_ids: list[int],
        new_text: str,
        finish_reason: FinishReason | None = None,
        stop_reason: str | int | None = None,
        arrival_time: float = 0.0,
        first_token_time: float | None = None,
        finish_time: float | None = None,
        error: RuntimeError | None = None,
        num_cached_tokens: int = 0,
        index: int = 0,
        logprobs: OutputLogprobs | None = None,
        new_logprobs: Sequence[TokenLogprobs] = (),
        prompt_logprobs: list[TokenLogprobs | None] | None = None,
        topk_positions: TopkPositions | None = None,
    ) -> None:
        """Keep the values; lists are shared, not copied."""
        self.request_id = request_id
        self.index = index
        self.prompt_token_ids = prompt_token_ids
        self.new_token_ids = new_token_ids
        self.new_text = new_text
        self.finish_reason = finish_reason
        self.stop_reason = stop_reason
        self.arrival_time = arrival_time
        self.first_token_time = first_token_time
        self.finish_time = finish_time
        self.error = error
        self.num_cached_tokens = num_cached_tokens
        self.new_logprobs = new_logprobs
        self.prompt_logprobs = prompt_logprobs
        self.topk_positions = topk_positions
        self._logprobs = logprobs
        self._num_logprobs = 0 if logprobs is None else len(logprobs.shown)
        self._token_ids = token_ids
        self._num_tokens = len(token_ids)
        self._pieces = [text] if isinstance(text, str) else text
        self._num_pieces = len(self._pieces)

    @property
    def token_ids(self) -> list[int]:
        """All output tokens so far."""
        return self._token_ids[: self._num_tokens]

    @property
    def num_tokens(self) -> int:
        """Length of `token_ids`."""
        return self._num_tokens

    @property
    def text(self) -> str:
        """All output text so far."""
        return "".join(self._pieces[: self._num_pieces])

    @property
    def logprobs(self) -> list[TokenLogprobs] | None:
        """Scores of the output tokens whose text is shown."""
        return None if self._logprobs is None else self._logprobs.shown[: self._num_logprobs]

    @property
    def has_logprobs(self) -> bool:
        """True where scores of the output were asked for."""
        return self._logprobs is not None

    @property
    def finished(self) -> bool:
        """True in the last state of an output."""
        return self.finish_reason is not None

    def __repr__(self) -> str:
        """Short form for logs and the interactive prompt."""
        return (
            f"RequestOutput(request_id={self.request_id!r}, index={self.index}, "
            f"text={self.text!r}, num_tokens={self._num_tokens}, "
            f"finish_reason={self.finish_reason!r})"
        )
