"""State of one output of a caller's request inside the engine."""

from __future__ import annotations

import time
from dataclasses import InitVar, dataclass, field

import numpy as np

from fd_dsa.engine.block_keys import BlockKeys
from fd_dsa.engine.detokenizer import Detokenizer, StopChecker, new_detokenizer
from fd_dsa.engine.draft_state import DraftState
from fd_dsa.engine.draws import derive_seed
from fd_dsa.engine.grammar import GrammarCompiler, form_of
from fd_dsa.engine.grammar_matcher import GrammarMatcher
from fd_dsa.engine.logit_rules import BadWords, LogitRules
from fd_dsa.engine.logprobs import OutputLogprobs, PromptLogprobs, TokenScore
from fd_dsa.engine.metrics import EngineMetrics
from fd_dsa.engine.output import (
    ConstraintError,
    FinishReason,
    OutputState,
    RequestOutput,
    TopkPositions,
)
from fd_dsa.engine.reasoning import AnswerStart, is_too_short
from fd_dsa.engine.sampling_params import SamplingParams
from fd_dsa.engine.tokenizer import Tokenizer
from fd_dsa.ops.sampling.parameters import GREEDY_BELOW
from fd_dsa.ops.sampling.token_buffer import NOT_FINITE


@dataclass(slots=True, eq=False)
class Request:
    """State of an output from its arrival to its end.

    A caller's request with n > 1 is a group of n such objects with consecutive numbers. No part of
    an object refers back to it or to the group, so its memory is free when it is dropped. Garbage
    in a cycle would be freed in a collection, which delays a step.

    Attributes:
        state: the part of the output that callers see.
        seq_id: number of the object in order of arrival, from 0. It is the order of service, and
            names the owner in the block manager.
        max_tokens: maximum number of output tokens, already resolved against the context.
        end_token_ids: tokens that end the output.
        block_size, tokenizer, grammars, bad_words, prompt_bytes: block size of the cache, tokenizer
            of the texts, compiler of the grammar, tokens of `params.bad_words`, and the prompt as
            int64; only arguments.
        output_token_ids: the list in `state`.
        token_ids: known tokens of prompt and output.
        num_computed_tokens: number of leading tokens whose keys are in the cache.
        num_scheduled_tokens: number of tokens in the step that is being scheduled.
        pending_row: index of its pending token among the samples of the step in flight; -1 = it has
            no pending token.
        num_pending_drafts: number of drafts in flight, which may be rejected. All counts of tokens
            include them, so they are upper bounds then.
        block_keys: names of the full blocks of `token_ids` in the prefix cache.
        batch_row: row in the input batch; -1 while waiting.
        scheduled_time, preempted_time: when it first got a row, and last lost one; seconds of
            time.monotonic(), None before.
        logprobs: scores of the output; None if not asked for.
        prompt_logprobs: scores of the prompt, which the group shares and its first running object
            computes; None if not asked for.
        topk_positions: selected keys of the newest step that sampled; None if not asked for.
        grammar: position of the output in its grammar; None without one.
        answer: beginning of the answer after the reasoning; None without reasoning.
        rules: changes to the logits before sampling, or None.
        drafts: acceptance statistics, or None if drafting is disabled.
    """

    state: OutputState
    params: SamplingParams
    max_tokens: int
    end_token_ids: frozenset[int]
    seq_id: int
    seed: int
    prompt_logprobs: PromptLogprobs | None
    block_size: InitVar[int]
    tokenizer: InitVar[Tokenizer]
    grammars: InitVar[GrammarCompiler]
    bad_words: InitVar[BadWords | None]
    prompt_bytes: InitVar[bytes]
    detokenizer: Detokenizer = field(init=False)
    stop_checker: StopChecker | None = None
    token_ids: list[int] = field(init=False)
    output_token_ids: list[int] = field(init=False)
    num_computed_tokens: int = 0
    num_scheduled_tokens: int = 0
    pending_row: int = -1
    num_pending_drafts: int = 0
    block_keys: BlockKeys = field(init=False)
    logprobs: OutputLogprobs | None = None
    topk_positions: TopkPositions | None = None
    grammar: GrammarMatcher | None = None
    answer: AnswerStart | None = None
    rules: LogitRules | None = None
    drafts: DraftState | None = None
    batch_row: int = -1
    scheduled_time: float | None = None
    preempted_time: float | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    # numbers of tokens, pieces of text and scores in the outputs so far
    _shown: tuple[int, int, int] = (0, 0, 0)
    # the last two after each token since then, with drafts
    _ends: list[tuple[int, int]] = field(default_factory=list)

    def __post_init__(
        self,
        block_size: int,
        tokenizer: Tokenizer,
        grammars: GrammarCompiler,
        bad_words: BadWords | None,
        prompt_bytes: bytes,
    ) -> None:
        """Start with the prompt as the tokens to compute.

        A grammar that cannot be compiled ends the output with an error later.
        """
        params, state, prompt = self.params, self.state, self.state.prompt_token_ids
        self.token_ids, self.output_token_ids = list(prompt), state.token_ids
        salt = params.cache_salt
        self.block_keys = BlockKeys(self.token_ids, block_size, salt, prompt_bytes)
        skips, kept = params.skip_special_tokens, params.kept_ids(tokenizer)
        self.detokenizer = new_detokenizer(tokenizer, skips, prompt, kept)
        if stops := params.stop_strings:
            self.stop_checker = StopChecker(stops, params.include_stop_str_in_output)
        if params.structured_outputs is not None:
            self.grammar = GrammarMatcher(grammars, params)
        output, ends = self.output_token_ids, self.end_token_ids
        if params.reasoning is not None:
            self.answer = AnswerStart(params.reasoning, self.detokenizer)
            state.answer_start = None
        if params.has_rules:
            parts = bad_words, ends, self.grammar, self._ruled
            self.rules = LogitRules(params, prompt, output, *parts)
        if params.logprobs is not None:
            self.logprobs = OutputLogprobs()
            state.logprobs = self.logprobs.shown

    @property
    def num_tokens(self) -> int:
        """Number of tokens of prompt and output, with pending ones."""
        return len(self.token_ids) + (self.pending_row >= 0) + self.num_pending_drafts

    @property
    def num_output_tokens(self) -> int:
        """Number of tokens of the output, with pending ones."""
        return len(self.output_token_ids) + (self.pending_row >= 0) + self.num_pending_drafts

    @property
    def is_decode(self) -> bool:
        """True if only the token sampled last is missing in the cache."""
        # without an output, the one missing token belongs to the prompt
        return self.num_computed_tokens == self.num_tokens - 1 and self.num_output_tokens > 0

    @property
    def is_unsettled(self) -> bool:
        """True after the last allowed token, until it is known if the form is complete."""
        return self.grammar is not None and len(self.output_token_ids) >= self.max_tokens

    @property
    def wants_prompt_logits(self) -> bool:
        """True while prompt tokens need scores, so that they may not come from the cache."""
        scores = self.prompt_logprobs
        return scores is not None and not scores.is_complete

    def append_token(self, token_id: int, now: float, score: TokenScore | None = None) -> None:
        """Append a sampled token, and end the request if the token does.

        Args:
            token_id: sampled token.
            now: seconds of time.monotonic().
            score: score of the token, if scores are asked for.
        """
        if self.state.first_token_time is None:
            self.state.first_token_time = now
        self.token_ids.append(token_id)
        self.output_token_ids.append(token_id)
        if token_id in self.end_token_ids and not self._must_continue:
            self.finish("stop", now, token_id)
            is_shown = self.params.include_stop_str_in_output
            text = self.detokenizer.append(token_id) if is_shown else ""
        else:
            text = self.detokenizer.append(token_id)
            is_complete = False if self.grammar is None else self.grammar.accept(token_id)
            if is_complete:
                self.finish("stop", now)
            elif len(self.output_token_ids) >= self.max_tokens and is_complete is not None:
                self.finish("length", now)
        if self.logprobs is not None and score is not None:
            self.logprobs.append(token_id, score, len(text))
        self.append_text(text, now)
        if self.drafts is not None:
            self._ends.append((len(self.state.pieces), len(self.state.logprobs or ())))

    def forget_pending(self) -> None:
        """Drop the pending token, so that a later step computes it again."""
        self.pending_row, self.num_pending_drafts = -1, 0
        self.num_computed_tokens = min(self.num_computed_tokens, len(self.token_ids) - 1)

    @property
    def _ruled(self) -> AnswerStart | None:
        """Beginning of the answer if rules begin there, or None if they begin with the output."""
        return None if self.params.constrain_reasoning else self.answer

    @property
    def _must_continue(self) -> bool:
        """True if the newest token belongs to the first `min_tokens` of the answer."""
        num_before = len(self.output_token_ids) - 1
        return is_too_short(num_before, self.params.min_tokens, self._ruled)

    def finish(
        self, reason: FinishReason, now: float, stop_reason: str | int | None = None
    ) -> None:
        """Mark the request as ended."""
        self.finish_reason = reason
        self.stop_reason = stop_reason
        self.state.finish_time = now

    def record_end(self, metrics: EngineMetrics) -> None:
        """Record the lengths and times of the ended request."""
        state, arrival, end = self.state, self.state.arrival_time, self.state.finish_time
        assert self.finish_reason is not None and end is not None, "the request has ended"
        started = end if self.scheduled_time is None else self.scheduled_time
        metrics.finished[self.finish_reason] += 1
        metrics.e2e_request_latency.observe(end - arrival)
        metrics.request_queue_time.observe(started - arrival)
        metrics.request_prompt_tokens.observe(len(state.prompt_token_ids))
        metrics.request_generation_tokens.observe(len(state.token_ids))
        if state.first_token_time is not None:
            metrics.request_prefill_time.observe(state.first_token_time - started)
            metrics.request_decode_time.observe(end - state.first_token_time)

    def end(self, reason: FinishReason) -> None:
        """End the output without a further token, and show the text that was held back."""
        now = time.monotonic()
        self.finish(reason, now)
        self.append_text("", now)

    def append_text(self, text: str, now: float) -> None:
        """Add decoded text to the output, except for text that may belong to a stop string.

        An ended request shows all of its text. A stop string that the text completes turns any end
        into "stop".
        """
        if self.finish_reason is not None:
            text += self.detokenizer.flush()
        is_cut, shown = False, ""
        if self.answer is not None:
            before, after = self.answer.append(text, len(self.output_token_ids))
            if self.finish_reason is not None:
                after += self.answer.flush()
            # stop strings ignore the reasoning
            if self._ruled is not None and self.stop_checker is not None:
                shown, text = before, after
        if self.stop_checker is not None and not self._must_continue:
            text, matched = self.stop_checker.append(text)
            if matched is not None:
                self.finish("stop", now, matched)
                is_cut = True
            elif self.finish_reason is not None:
                text += self.stop_checker.flush()
        if self.answer is not None and (self.answer.is_found or self.finish_reason is not None):
            self.state.answer_start = self.answer.index
        text = shown + text
        if text:
            self.state.pieces.append(text)
        if self.logprobs is not None:
            is_finished = self.finish_reason is not None
            self.logprobs.show(len(text), is_finished, is_cut)

    def failure(self, code: int) -> RuntimeError:
        """Return the error of a request that cannot have a next token.

        Args:
            code: NOT_FINITE, or NO_TOKEN if the constraints of the request exclude every token.
        """
        what = f"output token {len(self.output_token_ids)}"
        if code == NOT_FINITE:
            return RuntimeError(
                f"{what}: the logits are not finite; the model or its weights are at fault"
            )
        reason = "the constraints (bad_words, min_tokens, ...) exclude every token; relax them"
        if self.grammar is not None:
            field = form_of(self.params).source
            reason = f"{self.grammar.error or reason}; so {field} cannot be followed"
        return ConstraintError(f"{what}: {reason}")

    def output(self, error: RuntimeError | None = None) -> RequestOutput:
        """Return the output after a step, with the new parts since the call before."""
        state, scores = self.state, self.state.logprobs or ()
        num_tokens, num_pieces, num_scores = self._shown
        self._shown = len(state.token_ids), len(state.pieces), len(scores)
        ends, self._ends = self._ends, []
        brings_prompt_logprobs = False
        if self.prompt_logprobs is not None and self.prompt_logprobs.is_complete:
            state.prompt_logprobs = self.prompt_logprobs.entries
            brings_prompt_logprobs = not self.prompt_logprobs.is_shown
            self.prompt_logprobs.is_shown = True
        return RequestOutput(
            state,
            state.token_ids[num_tokens:],
            "".join(state.pieces[num_pieces:]),
            scores[num_scores:],
            self.finish_reason,
            self.stop_reason,
            error,
            self.topk_positions if self.finish_reason is not None else None,
            [
                (sum(map(len, state.pieces[num_pieces:pieces])), shown - num_scores)
                for pieces, shown in ends
            ],
            brings_prompt_logprobs,
        )


def new_group(
    request_id: str,
    prompt: np.ndarray,
    params: SamplingParams,
    *,
    max_tokens: int,
    eos_token_ids: frozenset[int],
    first_seq_id: int,
    seed: int,
    block_size: int,
    tokenizer: Tokenizer,
    grammars: GrammarCompiler,
) -> list[Request]:
    """Return the `params.n` requests of a caller's request.

    Args:
        request_id: name of the caller's request.
        prompt: int64 [num_tokens]; token ids.
        params: parameters of all of them.
        max_tokens: number of output tokens allowed, see Request.
        eos_token_ids: tokens that end an output, unless `params` ignores them.
        first_seq_id: `seq_id` of the first request; the others follow it.
        seed: seed of the engine, used if `params` has none.
        block_size, tokenizer, grammars: see Request.
    """
    end_token_ids, now = frozenset(params.stop_token_ids or ()), time.monotonic()
    if not params.ignore_eos:
        end_token_ids |= eos_token_ids
    bad_words = BadWords.of(params.bad_words, tokenizer) if params.bad_words else None
    prompt_ids, prompt_bytes, prompt_logprobs = prompt.tolist(), prompt.tobytes(), None
    if params.prompt_logprobs is not None:
        skips, kept = params.skip_special_tokens, params.kept_ids(tokenizer)
        reader = new_detokenizer(tokenizer, skips, kept_token_ids=kept)
        prompt_logprobs = PromptLogprobs(prompt_ids, params.prompt_logprobs, reader)
    return [
        Request(
            state=OutputState(request_id, index, prompt_ids, arrival_time=now),
            params=params,
            max_tokens=max_tokens,
            end_token_ids=end_token_ids,
            seq_id=first_seq_id + index,
            seed=seed_of_output,
            prompt_logprobs=prompt_logprobs,
            block_size=block_size,
            tokenizer=tokenizer,
            grammars=grammars,
            bad_words=bad_words,
            prompt_bytes=prompt_bytes,
        )
        for index, seed_of_output in enumerate(_seeds(params, seed, first_seq_id))
    ]


def _seeds(params: SamplingParams, engine_seed: int, first_seq_id: int) -> list[int]:
    """Return the seed of each output of a request. Greedy outputs use no random numbers."""
    if params.temperature < GREEDY_BELOW:
        return [0] * params.n
    seed = derive_seed(engine_seed, first_seq_id) if params.seed is None else params.seed
    return [seed, *(derive_seed(seed, index) for index in range(1, params.n))]
