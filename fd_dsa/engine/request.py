"""One request inside the engine."""

from __future__ import annotations

from dataclasses import InitVar, dataclass, field

from fd_dsa.engine.detokenizer import IncrementalDetokenizer, StopChecker
from fd_dsa.engine.output import FinishReason, RequestOutput
from fd_dsa.engine.prefix_cache import BlockKeys
from fd_dsa.engine.sampling_params import SamplingParams


@dataclass(slots=True, eq=False)
class Request:
    """A request from its arrival to its end.

    Attributes:
        arrival: number of the request, counted from 0; the order of service.
        max_tokens: output tokens allowed, already resolved against the context.
        token_ids: prompt and output so far; what must be in the cache before the next token.
        num_computed_tokens: leading tokens of `token_ids` whose keys are in the cache.
        num_scheduled_tokens: tokens of the step being prepared.
        num_cached_tokens: prompt tokens that others had computed when the request first ran;
            None before.
        block_keys: names of the full blocks of `token_ids` in the prefix cache.
        slot: row of the input batch; -1 while waiting.
        pieces: emitted text, one entry for each step that emitted some.
    """

    request_id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    max_tokens: int
    arrival: int
    arrival_time: float
    seed: int
    detokenizer: IncrementalDetokenizer
    stop_checker: StopChecker | None
    block_size: InitVar[int]
    token_ids: list[int] = field(default_factory=list)
    output_token_ids: list[int] = field(default_factory=list)
    pieces: list[str] = field(default_factory=list)
    num_computed_tokens: int = 0
    num_scheduled_tokens: int = 0
    num_cached_tokens: int | None = None
    block_keys: BlockKeys = field(init=False)
    slot: int = -1
    first_token_time: float | None = None
    finish_time: float | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None

    def __post_init__(self, block_size: int) -> None:
        """Start with the prompt as the tokens to compute."""
        self.token_ids = list(self.prompt_token_ids)
        self.block_keys = BlockKeys(self.token_ids, block_size, self.params.cache_salt)

    @property
    def is_decode(self) -> bool:
        """True when only the token sampled last is missing in the cache."""
        return bool(self.output_token_ids) and (self.num_computed_tokens == len(self.token_ids) - 1)

    @property
    def num_missing_tokens(self) -> int:
        """Known tokens whose keys are not in the cache yet."""
        return len(self.token_ids) - self.num_computed_tokens

    def append_token(self, token_id: int, eos_token_ids: frozenset[int], now: float) -> str:
        """Take a sampled token, decide whether it ends the request, return the new text."""
        if self.first_token_time is None:
            self.first_token_time = now
        self.token_ids.append(token_id)
        self.output_token_ids.append(token_id)
        if token_id in eos_token_ids and not self.params.ignore_eos:
            self.finish("stop", now, token_id)
            return self.take_text("", now)
        text = self.detokenizer.append(token_id)
        if len(self.output_token_ids) >= self.max_tokens:
            self.finish("length", now)
        return self.take_text(text, now)

    def finish(
        self, reason: FinishReason, now: float, stop_reason: str | int | None = None
    ) -> None:
        """Mark the request as ended."""
        self.finish_reason = reason
        self.stop_reason = stop_reason
        self.finish_time = now

    def take_text(self, text: str, now: float) -> str:
        """What of the decoded text may be shown now; all that is held back once it has ended.

        A stop string that is completed by the text turns any end into "stop".
        """
        if self.finish_reason is not None:
            text += self.detokenizer.flush()
        if self.stop_checker is not None:
            text, matched = self.stop_checker.append(text)
            if matched is not None:
                self.finish("stop", now, matched)
            elif self.finish_reason is not None:
                text += self.stop_checker.flush()
        if text:
            self.pieces.append(text)
        return text

    def output(
        self, new_token_ids: list[int], new_text: str, error: RuntimeError | None = None
    ) -> RequestOutput:
        """The state as the caller sees it."""
        return RequestOutput(
            self.request_id,
            self.prompt_token_ids,
            self.output_token_ids,
            self.pieces,
            new_token_ids,
            new_text,
            self.finish_reason,
            self.stop_reason,
            self.arrival_time,
            self.first_token_time,
            self.finish_time,
            error,
            self.num_cached_tokens or 0,
        )
