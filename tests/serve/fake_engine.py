"""A stand-in for AsyncEngine: bytes are tokens, the reply is scripted, nothing is computed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from typing import Any

from fd_dsa.engine.output import FinishReason, RequestOutput
from fd_dsa.engine.sampling_params import SamplingParams

WORDS = ("Hello", " wörld", " 🙂", " of", " sparse", " attention", ".")


class FakeTokenizer:
    """One token per byte; the template refuses a conversation that ends with the assistant."""

    def __init__(self, has_chat_template: bool = True) -> None:
        self.has_chat_template = has_chat_template

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """UTF-8 bytes, after a 256 for a special token; nothing for an empty text."""
        return [256] * (add_special_tokens and text != "") + list(text.encode())

    def apply_chat_template(
        self, messages: Sequence[dict[str, Any]], add_generation_prompt: bool = True
    ) -> list[int]:
        """`role:content` of every message, a line each."""
        if messages[-1]["role"] == "assistant":
            raise ValueError("chat template: the last message must be the user's")
        text = "".join(f"{m['role']}:{m['content']}\n" for m in messages)
        return self.encode(text + ">" * add_generation_prompt, add_special_tokens=False)


class FakeEngine:
    """Replies WORDS, one a step of `step_s` seconds, then ends with "stop".

    With `ignore_eos` the words go round until max_tokens. Every request is kept in `requests`
    (id -> prompt and parameters); ids whose generator was closed early are in `closed`.
    `nan_after` and `fail_after` are numbers of words after which a request ends with an error, or
    the engine fails (with `fails_alone`: raises an exception nobody expects, and goes on).
    """

    def __init__(self, *, max_model_len: int = 256, step_s: float = 0.0, chat: bool = True) -> None:
        self.tokenizer = FakeTokenizer(chat)
        self.max_model_len = max_model_len
        self.sampling_defaults: dict[str, float] = {}
        self.step_s = step_s
        self.is_running = False
        self.errored: BaseException | None = None
        self.fail_after: int | None = None
        self.fails_alone = False
        self.nan_after: int | None = None
        self.stopped = False
        self.requests: dict[str, tuple[list[int], SamplingParams]] = {}
        self.closed: list[str] = []
        self._aborted: set[str] = set()

    def start(self) -> None:
        """Begin to serve."""
        self.is_running = True

    def stop(self) -> None:
        """End; nothing runs afterwards."""
        self.is_running = False
        self.stopped = True

    def abort(self, request_id: str) -> None:
        """Let the request end with finish_reason "abort" at its next step."""
        self._aborted.add(request_id)

    def validate(self, prompt_token_ids: Sequence[int], params: SamplingParams) -> None:
        """Refuse token ids that the vocabulary of 257 lacks."""
        for token in prompt_token_ids:
            if not 0 <= token <= 256:
                raise ValueError(f"prompt has the token id {token}; the vocabulary has 257")

    async def generate(
        self, prompt_token_ids: list[int], params: SamplingParams, request_id: str
    ) -> AsyncGenerator[RequestOutput, None]:
        """The outputs of one request."""
        self.requests[request_id] = (prompt_token_ids, params)
        tokens: list[int] = []
        pieces: list[str] = []
        reason: FinishReason | None = None
        try:
            while reason is None:
                await asyncio.sleep(self.step_s)
                if self.fail_after is not None and len(tokens) >= self.fail_after:
                    error = RuntimeError("secret detail of the failure")
                    self.errored = None if self.fails_alone else error
                    raise error
                reason = self._next(tokens, pieces, params, request_id)
                yield self._output(prompt_token_ids, request_id, tokens, pieces, reason)
        finally:
            if reason is None:
                self.closed.append(request_id)

    def _next(
        self, tokens: list[int], pieces: list[str], params: SamplingParams, request_id: str
    ) -> FinishReason | None:
        """Add one word, unless the request was aborted; why it ends, if it does."""
        if request_id in self._aborted:
            return "abort"
        if self.nan_after is not None and len(tokens) >= self.nan_after:
            return "error"
        word = WORDS[len(tokens) % len(WORDS)]
        if params.stop_strings and word.strip() in params.stop_strings:
            return "stop"
        tokens.append(len(tokens))
        pieces.append(word)
        if len(tokens) == params.max_tokens:
            return "length"
        return "stop" if len(tokens) == len(WORDS) and not params.ignore_eos else None

    def _output(
        self,
        prompt: list[int],
        request_id: str,
        tokens: list[int],
        pieces: list[str],
        reason: FinishReason | None,
    ) -> RequestOutput:
        """The request as it stands."""
        grew = bool(tokens) and reason not in ("abort", "error")
        return RequestOutput(
            request_id,
            prompt,
            token_ids=tokens,
            text=pieces,
            new_token_ids=tokens[-1:] if grew else [],
            new_text=pieces[-1] if grew else "",
            finish_reason=reason,
            error=RuntimeError("logits of the request are NaN") if reason == "error" else None,
        )
