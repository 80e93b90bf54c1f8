"""From what a caller asks for to a request that the engine can run, or a refusal."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence

import numpy as np

from fd_dsa.engine.bad_words import BadWords
from fd_dsa.engine.detokenizer import Detokenizer, StopChecker, new_detokenizer
from fd_dsa.engine.grammar import GrammarCompiler
from fd_dsa.engine.limits import RequestLimits
from fd_dsa.engine.logit_rules import LogitRules
from fd_dsa.engine.logprobs import OutputLogprobs, PromptLogprobs
from fd_dsa.engine.output import OutputState
from fd_dsa.engine.random_uniform import derive_seed
from fd_dsa.engine.request import Request
from fd_dsa.engine.sampling_params import SamplingParams
from fd_dsa.engine.structured_outputs import StructuredOutputsParams
from fd_dsa.engine.tokenizer import Tokenizer


class Admission:
    """Checks and makes the requests of one engine.

    Args:
        tokenizer: for texts of outputs and bad words.
        limits: of the engine.
        eos_token_ids: tokens that end an output.
        seed: of requests that bring none.

    Attributes:
        limits: of the engine.
        grammars: of all requests.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        limits: RequestLimits,
        eos_token_ids: Iterable[int],
        seed: int,
    ) -> None:
        """Keep the limits."""
        self.limits = limits
        self._tokenizer = tokenizer
        self._eos_token_ids = frozenset(eos_token_ids)
        self._seed = seed
        self.grammars = GrammarCompiler(tokenizer, limits.vocab_size, self._eos_token_ids)

    def validate(self, prompt_token_ids: Sequence[int], params: SamplingParams) -> int:
        """Output tokens that a request may have; safe to call from any thread.

        A grammar is compiled here, which may take 100 ms: not for the engine's thread.

        Raises:
            ValueError: see `RequestLimits.validate` and `check_form`.
        """
        max_tokens = self.limits.validate(prompt_token_ids, params)
        if params.structured_outputs is not None:
            self.check_form(params.structured_outputs)
        return max_tokens

    def check_form(self, form: StructuredOutputsParams) -> None:
        """Compile the form of an output unless it is known; safe to call from any thread.

        Raises:
            ValueError: it cannot be compiled; begins with the name of the field.
        """
        self.grammars.check(form)

    def make_requests(
        self, request_id: str, prompt_token_ids: Sequence[int], params: SamplingParams, arrival: int
    ) -> list[Request]:
        """The group of a request, of that arrival number and the next ones.

        A grammar that cannot be compiled is not refused here; the request ends with an error.

        Raises:
            ValueError: see `validate`.
        """
        max_tokens = self.limits.validate(prompt_token_ids, params)
        prompt: list[int] = np.asarray(prompt_token_ids).tolist()
        end_token_ids = frozenset(params.stop_token_ids or ())
        if not params.ignore_eos:
            end_token_ids |= self._eos_token_ids
        seed = derive_seed(self._seed, arrival) if params.seed is None else params.seed
        stops, keeps_stop = params.stop_strings, params.include_stop_str_in_output
        bad_words = BadWords.of(params.bad_words, self._tokenizer)
        now = time.monotonic()
        group: list[Request] = []
        for index in range(params.n):
            state = OutputState(request_id, index, prompt, arrival_time=now)
            request = Request(
                state=state,
                params=params,
                max_tokens=max_tokens,
                end_token_ids=end_token_ids,
                arrival=arrival + index,
                seed=derive_seed(seed, index) if index else seed,
                detokenizer=self._detokenizer(params, prompt),
                stop_checker=StopChecker(stops, keeps_stop) if stops else None,
                block_size=self.limits.block_size,
                group=group,
            )
            if params.structured_outputs is not None:
                request.grammar = self.grammars.new_matcher(params.structured_outputs)
            request.rules = self._rules_of(request, bad_words)
            if params.logprobs is not None:
                request.logprobs = OutputLogprobs()
                state.logprobs = request.logprobs.shown
            group.append(request)
        if params.prompt_logprobs is not None:
            detokenizer = self._detokenizer(params, ())
            group[0].prompt_logprobs = PromptLogprobs(prompt, params.prompt_logprobs, detokenizer)
        return group

    def _detokenizer(self, params: SamplingParams, before: Sequence[int]) -> Detokenizer:
        """A detokenizer of tokens that follow others."""
        return new_detokenizer(
            self._tokenizer, params.skip_special_tokens, before, params.kept_special_token_ids
        )

    def _rules_of(self, request: Request, bad_words: BadWords | None) -> LogitRules | None:
        """The rules for a request's logits; None when its parameters change none."""
        params = request.params
        penalties = (params.repetition_penalty, params.frequency_penalty, params.presence_penalty)
        bans = bad_words or params.bad_words_token_ids or params.min_tokens
        others = params.logit_bias or bans or params.structured_outputs
        if penalties == (1, 0, 0) and not others:
            return None
        return LogitRules(
            params,
            request.state.prompt_token_ids,
            request.output_token_ids,
            bad_words,
            request.end_token_ids,
            request.grammar,
        )
