"""One output that is to be generated, inside the engine."""

from __future__ import annotations

import time
from dataclasses import InitVar, dataclass, field
from functools import partial

from fd_dsa.engine.block_manager import BlockKeys
from fd_dsa.engine.detokenizer import Detokenizer, StopChecker, new_detokenizer
from fd_dsa.engine.draft_state import DraftState
from fd_dsa.engine.grammar import GrammarCompiler
from fd_dsa.engine.grammar_matcher import GrammarMatcher
from fd_dsa.engine.logit_rules import BadWords, LogitRules
from fd_dsa.engine.logprobs import OutputLogprobs, PromptLogprobs, TokenScore
from fd_dsa.engine.output import FinishReason, OutputState, RequestOutput, TopkPositions
from fd_dsa.engine.reasoning import AnswerStart, is_too_short
from fd_dsa.engine.sampling_params import SamplingParams
from fd_dsa.engine.tokenizer import Tokenizer


@dataclass(slots=True, eq=False)
class Request:
    """A request from its arrival to its end; one with n > 1 is a group of n such objects.

    Attributes:
        state: what callers see of the output.
        group: all of the group in order, this one included.
        arrival: number of the object, counted from 0: the order of service, and its name in the
            block manager.
        max_tokens: output tokens allowed, already resolved against the context.
        end_token_ids: tokens that end the output.
        block_size, tokenizer, grammars, bad_words: of the cache, for the texts, for the form, and
            what `params.bad_words` forbids; arguments alone.
        output_token_ids: the list of the state.
        token_ids: prompt and output so far; what must be in the cache before the next token.
        num_computed_tokens: leading tokens of `token_ids` whose keys are in the cache.
        num_scheduled_tokens: tokens of the step being prepared.
        pending_row: place of its pending token among the samples of the step in flight; -1 = it has
            no pending token.
        num_unverified: drafts in flight, which may be rejected. All counts of tokens include them,
            so the counts are upper bounds then.
        block_keys: names of the full blocks of `token_ids` in the prefix cache.
        slot: row of the input batch; -1 while waiting.
        scheduled_time, preempted_time: when it first got a row, and last lost one; seconds of
            time.monotonic(), None before.
        logprobs: scores of the output; None = not asked for.
        prompt_logprobs: scores of the prompt; None = not asked for.
        topk_positions: what the indexer chose in the latest step that sampled; likewise.
        grammar: how far the output is in its form; None = it may have any.
        answer: beginning of the answer after the reasoning; None = no rule of the request depends
            on it.
        rules: what happens to the logits before a token is drawn; None = nothing.
        drafts: how many pay; None = it has no drafts.
    """

    state: OutputState
    params: SamplingParams
    max_tokens: int
    end_token_ids: frozenset[int]
    arrival: int
    seed: int
    group: list[Request]
    block_size: InitVar[int]
    tokenizer: InitVar[Tokenizer]
    grammars: InitVar[GrammarCompiler]
    bad_words: InitVar[BadWords | None]
    detokenizer: Detokenizer = field(init=False)
    stop_checker: StopChecker | None = None
    token_ids: list[int] = field(init=False)
    output_token_ids: list[int] = field(init=False)
    num_computed_tokens: int = 0
    num_scheduled_tokens: int = 0
    pending_row: int = -1
    num_unverified: int = 0
    block_keys: BlockKeys = field(init=False)
    logprobs: OutputLogprobs | None = None
    prompt_logprobs: PromptLogprobs | None = None
    topk_positions: TopkPositions | None = None
    grammar: GrammarMatcher | None = None
    answer: AnswerStart | None = None
    rules: LogitRules | None = None
    drafts: DraftState | None = None
    slot: int = -1
    scheduled_time: float | None = None
    preempted_time: float | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    # tokens, pieces of text and scores that its outputs have had
    _shown: tuple[int, int, int] = (0, 0, 0)

    def __post_init__(
        self,
        block_size: int,
        tokenizer: Tokenizer,
        grammars: GrammarCompiler,
        bad_words: BadWords | None,
    ) -> None:
        """Start with the prompt as the tokens to compute.

        A grammar that cannot be compiled ends the output with an error later.
        """
        params, state, prompt = self.params, self.state, self.state.prompt_token_ids
        self.token_ids, self.output_token_ids = list(prompt), state.token_ids
        self.block_keys = BlockKeys(self.token_ids, block_size, params.cache_salt)
        kept = params.kept_ids(tokenizer)
        detokenizer = partial(new_detokenizer, tokenizer, params.skip_special_tokens)
        self.detokenizer = detokenizer(prompt, kept)
        if stops := params.stop_strings:
            self.stop_checker = StopChecker(stops, params.include_stop_str_in_output)
        if params.structured_outputs is not None:
            self.grammar = GrammarMatcher(grammars, params)
        output, ends = self.output_token_ids, self.end_token_ids
        begins_later = stops or params.min_tokens or bad_words or params.bad_words_token_ids
        if params.reasoning is not None and begins_later and not params.constrain_reasoning:
            self.answer = AnswerStart(params.reasoning, self.detokenizer)
        rules = LogitRules(params, prompt, output, bad_words, ends, self.grammar, self.answer)
        self.rules = None if rules.is_empty else rules
        if params.logprobs is not None:
            self.logprobs = OutputLogprobs()
            state.logprobs = self.logprobs.shown
        # the first of a group reads the prompt's scores for all
        if params.prompt_logprobs is not None and state.index == 0:
            reader = detokenizer(kept_token_ids=kept)
            self.prompt_logprobs = PromptLogprobs(prompt, params.prompt_logprobs, reader)

    @property
    def num_tokens(self) -> int:
        """Tokens of prompt and output, those that are on their way included."""
        return len(self.token_ids) + (self.pending_row >= 0) + self.num_unverified

    @property
    def num_output_tokens(self) -> int:
        """Tokens of the output, those that are on their way included."""
        return len(self.output_token_ids) + (self.pending_row >= 0) + self.num_unverified

    @property
    def is_decode(self) -> bool:
        """True when only the token sampled last is missing in the cache."""
        # an output comes after the prompt: with one token missing there is one or the prompt is
        return self.num_computed_tokens == self.num_tokens - 1 and self.num_output_tokens > 0

    @property
    def is_unsettled(self) -> bool:
        """True after the last allowed token, until it is known if the form is complete."""
        return self.grammar is not None and len(self.output_token_ids) >= self.max_tokens

    @property
    def wants_prompt_logits(self) -> bool:
        """True while prompt tokens are to be scored, so that none may come from the cache."""
        return self.prompt_logprobs is not None and not self.prompt_logprobs.is_complete

    def append_token(self, token_id: int, now: float, score: TokenScore | None = None) -> None:
        """Take a sampled token and decide whether it ends the request.

        `score` is of the token, where scores are asked for.
        """
        if self.state.first_token_time is None:
            self.state.first_token_time = now
        self.token_ids.append(token_id)
        self.output_token_ids.append(token_id)
        if token_id in self.end_token_ids and not self._must_go_on:
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
        self.take_text(text, now)

    def forget_draw(self) -> None:
        """The token on its way will not come; it is to be computed again."""
        self.pending_row, self.num_unverified = -1, 0
        self.num_computed_tokens = min(self.num_computed_tokens, len(self.token_ids) - 1)

    @property
    def _must_go_on(self) -> bool:
        """True if the token just taken belongs to the first `min_tokens` of the answer."""
        num_before = len(self.output_token_ids) - 1
        return is_too_short(num_before, self.params.min_tokens, self.answer)

    def finish(
        self, reason: FinishReason, now: float, stop_reason: str | int | None = None
    ) -> None:
        """Mark the request as ended."""
        self.finish_reason = reason
        self.stop_reason = stop_reason
        self.state.finish_time = now

    def end(self, reason: FinishReason) -> None:
        """End the output without a further token, and show the text that was held back."""
        now = time.monotonic()
        self.finish(reason, now)
        self.take_text("", now)

    def take_text(self, text: str, now: float) -> None:
        """Show what of the decoded text may be now; all that is held back once it has ended.

        A stop string that is completed by the text turns any end into "stop".
        """
        if self.finish_reason is not None:
            text += self.detokenizer.flush()
        is_cut, shown = False, ""
        if self.answer is not None:
            shown, text = self.answer.append(text, len(self.output_token_ids))
            if self.finish_reason is not None:
                text += self.answer.flush()
        if self.stop_checker is not None and not self._must_go_on:
            text, matched = self.stop_checker.append(text)
            if matched is not None:
                self.finish("stop", now, matched)
                is_cut = True
            elif self.finish_reason is not None:
                text += self.stop_checker.flush()
        text = shown + text
        if text:
            self.state.pieces.append(text)
        if self.logprobs is not None:
            is_finished = self.finish_reason is not None
            self.logprobs.show(len(text), is_finished, is_cut)

    def output(self, error: RuntimeError | None = None) -> RequestOutput:
        """What the caller sees after a step; new in it is what the one before did not have."""
        state, scores = self.state, self.state.logprobs or ()
        num_tokens, num_pieces, num_scores = self._shown
        self._shown = len(state.token_ids), len(state.pieces), len(scores)
        prompt_scores = self.group[0].prompt_logprobs
        if prompt_scores is not None and prompt_scores.is_complete:
            state.prompt_logprobs = prompt_scores.entries
        return RequestOutput(
            state,
            state.token_ids[num_tokens:],
            "".join(state.pieces[num_pieces:]),
            scores[num_scores:],
            self.finish_reason,
            self.stop_reason,
            error,
            self.topk_positions if self.finish_reason is not None else None,
        )
