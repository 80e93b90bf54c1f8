"""A stand-in for AsyncEngine: bytes are tokens, the reply is scripted, nothing is computed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterable, Iterator, Mapping, Sequence
from typing import Any

from fd_dsa.chat.renderers import NO_TEMPLATE
from fd_dsa.chat.template import ChatTemplate
from fd_dsa.engine.detokenizer import ByteDecoder
from fd_dsa.engine.encoding import TooManyTokens
from fd_dsa.engine.metrics import EngineMetrics, EngineStats
from fd_dsa.engine.output import FinishReason, OutputState, RequestOutput
from fd_dsa.engine.reasoning import AnswerStart
from fd_dsa.engine.sampling_params import SamplingParams

WORDS = ("Hello", " wörld", " 🙂", " of", " sparse", " attention", ".")


# `role:content` of every message, a line each; refuses to end with the assistant
PLAIN = ChatTemplate(
    """\
{% if messages[-1].role == "assistant" %}
{{ raise_exception("the last message must be the user's") }}
{% endif %}
{% for message in messages %}
{{ message.role }}:{{ message.content }}
{% endfor %}
{% if add_generation_prompt %}>{% endif %}""",
    {},
    "a script",
)


class NoControlTokens:
    """Control tokens of a tokenizer that makes none from a text."""

    def find(self, text: str) -> Iterator[tuple[int, int]]:
        """None."""
        return iter(())

    def texts_in(self, text: str) -> set[str]:
        """None."""
        return set()


class FakeTokenizer:
    """One token per byte, and 256 for a special one.

    Args:
        chat_renderer: of conversations; None: there is no chat.
        special_ids: special tokens and their ids.
    """

    highest_token_id = 256
    control_tokens = NoControlTokens()

    def __init__(
        self,
        chat_renderer: ChatTemplate | None,
        special_ids: Mapping[str, int] | None = None,
    ) -> None:
        self.chat_renderer = chat_renderer
        self.has_chat_template = chat_renderer is not None
        self.why_no_chat = NO_TEMPLATE
        self.special_tokens = {"bos_token": "<bos>"}
        self._special_ids = dict(special_ids or {})

    def encode(
        self,
        text: str,
        add_special_tokens: bool = True,
        max_tokens: int | None = None,
        masked: str | None = None,
    ) -> list[int]:
        """UTF-8 bytes, after a 256 for a special token; nothing for an empty text."""
        ids = [256] * (add_special_tokens and text != "") + list(text.encode())
        if max_tokens is not None and len(ids) > max_tokens:
            raise TooManyTokens(len(ids), is_exact=True)
        return ids

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The bytes as a text; 256 is `<s>`."""
        special = b"" if skip_special_tokens else b"<s>"
        raw = b"".join(special if token == 256 else bytes([token]) for token in token_ids)
        return raw.decode("utf-8", "replace")

    def encode_all(self, texts: Sequence[str]) -> list[list[int]]:
        """UTF-8 bytes of each."""
        return [self.encode(text, add_special_tokens=False) for text in texts]

    def decode_each(self, token_ids: Sequence[int]) -> list[str]:
        """Each token alone, special ones included."""
        return [self.decode([token_id], skip_special_tokens=False) for token_id in token_ids]

    def special_ids_of(self, texts: Iterable[str]) -> dict[str, int]:
        """Those of the texts that are special tokens."""
        return {text: self._special_ids[text] for text in texts if text in self._special_ids}


class FakeEngine:
    """Replies `words`, one a step of `step_s` seconds, then ends with "stop".

    With `ignore_eos` the words go round until max_tokens. Every request is kept in `requests`
    (id -> prompt and parameters); ids whose generator was closed early are in `closed`, outputs
    that were to end in `finished`. While `is_held` nobody gets a word. `nan_after` and
    `fail_after` are numbers of words after which a request ends with an error, or the engine fails
    (with `fails_alone`: raises an exception nobody expects, and goes on).
    """

    def __init__(
        self,
        *,
        max_model_len: int = 256,
        step_s: float = 0.0,
        chat: bool = True,
        words: Sequence[str] = WORDS,
        renderer: ChatTemplate | None = PLAIN,
        special_ids: Mapping[str, int] | None = None,
    ) -> None:
        self.tokenizer = FakeTokenizer(renderer if chat else None, special_ids)
        self.words = tuple(words)
        self.max_model_len = max_model_len
        self.sampling_defaults: dict[str, float] = {}
        self.metrics = EngineMetrics(max_model_len)
        self.captured_sizes: tuple[int, ...] = ()
        self.pid: int | None = None
        self.step_s = step_s
        self.is_running = self.is_held = False
        self.errored: BaseException | None = None
        self.silent_s = 0.0
        self.fail_after: int | None = None
        self.fails_alone = False
        self.nan_after: int | None = None
        self.stopped = False
        self.requests: dict[str, tuple[list[int], SamplingParams]] = {}
        self.closed: list[str] = []
        self.finished: list[tuple[str, int]] = []
        self._aborted: set[str] = set()

    def start(self) -> None:
        """Begin to serve."""
        self.is_running = True

    def stop(self) -> None:
        """End; nothing runs afterwards."""
        self.is_running = False
        self.stopped = True

    async def snapshot(self) -> tuple[EngineStats, EngineMetrics]:
        """Nothing is counted."""
        return EngineStats(), self.metrics

    async def ask(self, question: str, argument: Any = None) -> Any:
        """There is nothing to tell."""
        return {}

    async def check_form(self, params: SamplingParams) -> None:
        """Every form is fine."""

    def end(self, request_id: str, index: int | None = None) -> None:
        """Let the request end with "abort" at its next step, or an output with "stop"."""
        if index is None:
            self._aborted.add(request_id)
        else:
            self.finished.append((request_id, index))

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
        start = None
        if params.reasoning is not None:
            start = AnswerStart(params.reasoning, ByteDecoder([], []))
        running = set(range(params.n))
        try:
            while running:
                await asyncio.sleep(self.step_s)
                while self.is_held:
                    await asyncio.sleep(0.005)
                if self.fail_after is not None and len(tokens) >= self.fail_after:
                    error = RuntimeError("secret detail of the failure")
                    self.errored = None if self.fails_alone else error
                    raise error
                num_before = len(tokens)
                reason = self._next(tokens, pieces, params, request_id)
                if start is not None and len(tokens) > num_before:
                    start.append(pieces[-1], len(tokens))
                # all choices say the same, in step
                for choice in sorted(running):
                    is_ended = (request_id, choice) in self.finished
                    why = reason or ("stop" if is_ended else None)
                    output = self.make_output(prompt_token_ids, request_id, tokens, pieces, why)
                    output.index = choice
                    if start is not None:
                        is_known = start.is_found or output.finished
                        output.answer_start = start.index if is_known else None
                    if len(tokens) == num_before:
                        output.new_token_ids, output.new_text = [], ""
                        # the stop string that has come
                        output.stop_reason = self._word(num_before) if reason == "stop" else None
                    running -= {choice} if output.finished else set()
                    yield output
        finally:
            if running:
                self.closed.append(request_id)

    def _next(
        self, tokens: list[int], pieces: list[str], params: SamplingParams, request_id: str
    ) -> FinishReason | None:
        """Add one word, unless the request was aborted; why it ends, if it does."""
        if request_id in self._aborted:
            return "abort"
        if self.nan_after is not None and len(tokens) >= self.nan_after:
            return "error"
        word = self.words[len(tokens) % len(self.words)]
        if params.stop_strings and self._word(len(tokens)) in params.stop_strings:
            return "stop"
        tokens.append(len(tokens))
        pieces.append(word)
        if len(tokens) == params.max_tokens:
            return "length"
        return "stop" if len(tokens) == len(self.words) and not params.ignore_eos else None

    def _word(self, num_before: int) -> str:
        """The next word, without white space, as stop strings are given."""
        return self.words[num_before % len(self.words)].strip()

    def make_output(
        self,
        prompt: list[int],
        request_id: str,
        tokens: list[int],
        pieces: list[str],
        reason: FinishReason | None,
    ) -> RequestOutput:
        """The current state of the request."""
        grew = bool(tokens) and reason not in ("abort", "error")
        return RequestOutput(
            OutputState(request_id, 0, prompt, tokens, pieces),
            new_token_ids=tokens[-1:] if grew else [],
            new_text=pieces[-1] if grew else "",
            finish_reason=reason,
            error=RuntimeError("logits of the request are NaN") if reason == "error" else None,
        )
