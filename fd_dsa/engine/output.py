"""What the engine reports about a request after a step."""

from __future__ import annotations

from typing import Literal

FinishReason = Literal["stop", "length", "abort", "error"]


class RequestOutput:
    """State of one request after one step; stays valid after later steps.

    Attributes:
        request_id: name given by the caller.
        prompt_token_ids: the prompt; not to be changed.
        token_ids: all output tokens so far, an end-of-sequence token included.
        text: all output text so far; the concatenation of every `new_text`.
        new_token_ids: tokens added by this step.
        new_text: text added by this step; may be empty while a character or a possible stop
            string is incomplete.
        finish_reason: None while running; "stop" end-of-sequence or stop string, "length"
            max_tokens reached, "abort" ended from outside, "error" see `error`.
        stop_reason: the stop string or the end-of-sequence token id which ended the request.
        error: what went wrong with this request alone (its logits were not finite).
        num_cached_tokens: leading prompt tokens that were not computed for this request, because
            the blocks of earlier ones hold them.
        arrival_time, first_token_time, finish_time: seconds of time.monotonic(); None when
            not reached yet.

    Cost: constant in the length of the output. `token_ids` and a `text` given in pieces may be
    the request's own growing lists; only their length at this step is kept, and the properties
    cut them when they are read.
    """

    __slots__ = (
        "_num_pieces",
        "_num_tokens",
        "_pieces",
        "_token_ids",
        "arrival_time",
        "error",
        "finish_reason",
        "finish_time",
        "first_token_time",
        "new_text",
        "new_token_ids",
        "num_cached_tokens",
        "prompt_token_ids",
        "request_id",
        "stop_reason",
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
    ) -> None:
        """Keep the values; lists are shared, not copied."""
        self.request_id = request_id
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
        self._token_ids = token_ids
        self._num_tokens = len(token_ids)
        self._pieces = [text] if isinstance(text, str) else text
        self._num_pieces = len(self._pieces)

    @property
    def token_ids(self) -> list[int]:
        """All output tokens so far."""
        return self._token_ids[: self._num_tokens]

    @property
    def text(self) -> str:
        """All output text so far."""
        return "".join(self._pieces[: self._num_pieces])

    @property
    def finished(self) -> bool:
        """True in the last output of a request."""
        return self.finish_reason is not None

    def __repr__(self) -> str:
        """Short form for logs and the interactive prompt."""
        return (
            f"RequestOutput(request_id={self.request_id!r}, text={self.text!r}, "
            f"num_tokens={self._num_tokens}, finish_reason={self.finish_reason!r})"
        )
