"""From what a caller asks for to a request that the engine can run, or a refusal."""

from __future__ import annotations

import operator
import time
from collections.abc import Iterable, Sequence

import numpy as np

from fd_dsa.engine.bad_words import BadSequences, BadWords
from fd_dsa.engine.block_manager import BlockManager
from fd_dsa.engine.detokenizer import IncrementalDetokenizer, StopChecker
from fd_dsa.engine.grammar import GrammarCompiler
from fd_dsa.engine.logit_rules import LogitRules
from fd_dsa.engine.logprobs import OutputLogprobs, PromptLogprobs
from fd_dsa.engine.random_uniform import derive_seed
from fd_dsa.engine.request import Request
from fd_dsa.engine.sampling_params import SamplingParams
from fd_dsa.engine.tokenizer import Tokenizer


class Admission:
    """Checks and makes the requests of one engine.

    Args:
        tokenizer: for texts of outputs and bad words.
        blocks: of the caches; only its sizes are read.
        vocab_size: columns of the logits.
        max_model_len: longest prompt plus output, tokens.
        eos_token_ids: tokens that end an output.
        seed: of requests that bring none.
        shows_selections: whether the runner can tell what the indexer chose.

    Attributes:
        grammars: of all requests.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        blocks: BlockManager,
        vocab_size: int,
        max_model_len: int,
        eos_token_ids: Iterable[int],
        seed: int,
        *,
        shows_selections: bool = False,
    ) -> None:
        """Keep the limits."""
        self._tokenizer = tokenizer
        self._num_blocks = blocks.num_blocks
        self._block_size = blocks.block_size
        self._vocab_size = vocab_size
        self._max_model_len = max_model_len
        self._eos_token_ids = frozenset(eos_token_ids)
        self._seed = seed
        self._shows_selections = shows_selections
        self.grammars = GrammarCompiler(tokenizer, vocab_size, self._eos_token_ids)

    def validate(self, prompt_token_ids: Sequence[int], params: SamplingParams) -> int:
        """Output tokens that a request may have; safe to call from any thread.

        A grammar is compiled here, which may take 100 ms: not for the engine's thread.

        Raises:
            ValueError: the prompt is empty or holds no valid token ids, the request can never
                fit into the context or the cache, a parameter names a token that the model
                lacks or asks for what the runner cannot tell, or the form of the output cannot be
                compiled; names the numbers, and the
                parameter in front.
        """
        max_tokens = self._check(prompt_token_ids, params)
        if params.structured_outputs is not None:
            self.grammars.check(params.structured_outputs)
        return max_tokens

    def _check(self, prompt_token_ids: Sequence[int], params: SamplingParams) -> int:
        """Output tokens that a request may have; all of `validate` but the grammar."""
        max_tokens = self._room(len(prompt_token_ids), params)
        self._check_prompt(prompt_token_ids)
        self._check_token_ids("logit_bias", params.logit_bias)
        self._check_token_ids("stop_token_ids", params.stop_token_ids)
        self._check_token_ids("bad_words_token_ids", params.bad_words_token_ids)
        if params.return_topk_positions and not self._shows_selections:
            raise ValueError(
                "return_topk_positions is true; what the indexer chose stays in the memory of this "
                "device, only a CPU shows it; leave it out or serve with --device cpu"
            )
        form = params.structured_outputs
        if form is not None:
            after = () if form.after_token_id is None else (form.after_token_id,)
            self._check_token_ids(form.source, after)
        return max_tokens

    def make_requests(
        self, request_id: str, prompt_token_ids: Sequence[int], params: SamplingParams, arrival: int
    ) -> list[Request]:
        """The group of a request, of that arrival number and those behind it.

        A grammar that cannot be compiled is not refused here; the request ends with an error.

        Raises:
            ValueError: see `validate`.
        """
        max_tokens = self._check(prompt_token_ids, params)
        prompt = [operator.index(token_id) for token_id in prompt_token_ids]
        end_token_ids = frozenset(params.stop_token_ids or ())
        if not params.ignore_eos:
            end_token_ids |= self._eos_token_ids
        seed = derive_seed(self._seed, arrival) if params.seed is None else params.seed
        stops, keeps_stop = params.stop_strings, params.include_stop_str_in_output
        bad_words = BadWords.of(params.bad_words, self._tokenizer)
        bad = None if bad_words is None else bad_words.sequences
        now = time.monotonic()
        group: list[Request] = []
        for index in range(params.n):
            request = Request(
                request_id=request_id,
                prompt_token_ids=prompt,
                params=params,
                max_tokens=max_tokens,
                end_token_ids=end_token_ids,
                arrival=arrival + index,
                arrival_time=now,
                seed=derive_seed(seed, index) if index else seed,
                detokenizer=self._detokenizer(params, prompt),
                stop_checker=StopChecker(stops, keeps_stop) if stops else None,
                block_size=self._block_size,
                index=index,
                group=group,
            )
            if params.structured_outputs is not None:
                request.grammar = self.grammars.new_matcher(params.structured_outputs)
            request.rules = self._rules_of(request, bad)
            if params.logprobs is not None:
                request.logprobs = OutputLogprobs()
            group.append(request)
        if params.prompt_logprobs is not None:
            detokenizer = self._detokenizer(params, ())
            group[0].prompt_logprobs = PromptLogprobs(prompt, params.prompt_logprobs, detokenizer)
        return group

    def _detokenizer(self, params: SamplingParams, before: Sequence[int]) -> IncrementalDetokenizer:
        """Text of tokens that stand behind others."""
        return IncrementalDetokenizer(
            self._tokenizer, params.skip_special_tokens, before, params.kept_special_token_ids
        )

    def _rules_of(self, request: Request, bad: BadSequences | None) -> LogitRules | None:
        """The rules for a request's logits; None when its parameters change none."""
        params = request.params
        penalties = (params.repetition_penalty, params.frequency_penalty, params.presence_penalty)
        bans = bad or params.bad_words_token_ids or params.min_tokens
        others = params.logit_bias or bans or params.structured_outputs
        if penalties == (1, 0, 0) and not others:
            return None
        return LogitRules(
            params,
            request.prompt_token_ids,
            request.output_token_ids,
            bad,
            request.end_token_ids,
            request.grammar,
        )

    def _room(self, num_prompt: int, params: SamplingParams) -> int:
        """Output tokens that fit behind a prompt of that length."""
        if num_prompt == 0:
            raise ValueError("the prompt has no tokens; it must have at least 1")
        if num_prompt >= self._max_model_len:
            raise ValueError(
                f"the prompt has {num_prompt} tokens, max_model_len is {self._max_model_len} and "
                "the output needs at least 1; shorten the prompt or raise max_model_len"
            )
        room = self._max_model_len - num_prompt
        max_tokens = room if params.max_tokens is None else params.max_tokens
        if max_tokens > room:
            raise ValueError(
                f"the prompt has {num_prompt} tokens and max_tokens is {max_tokens}, together "
                f"{num_prompt + max_tokens}; max_model_len is {self._max_model_len}; lower "
                "max_tokens, shorten the prompt or raise max_model_len"
            )
        # the last token is never fed back, so it needs no place in the cache
        needed = -(-(num_prompt + max_tokens - 1) // self._block_size)
        if needed > self._num_blocks:
            raise ValueError(
                f"the prompt has {num_prompt} tokens and up to {max_tokens} follow, which need "
                f"{needed} cache blocks of {self._block_size} tokens; there are "
                f"{self._num_blocks}; lower max_tokens or give the cache more memory"
            )
        return max_tokens

    def _check_prompt(self, token_ids: Sequence[int]) -> None:
        """ValueError unless all are integers inside the vocabulary."""
        ids = np.asarray(token_ids)
        if ids.ndim != 1 or ids.dtype.kind not in "iu":
            raise ValueError(
                f"the prompt has elements of type {ids.dtype}; it must be a flat list of integers"
            )
        outside = np.flatnonzero((ids < 0) | (ids >= self._vocab_size))
        if len(outside):
            raise ValueError(
                f"token {outside[0]} of the prompt is {ids[outside[0]]}; token ids of this model "
                f"are 0 to {self._vocab_size - 1}"
            )

    def _check_token_ids(self, name: str, token_ids: Iterable[int] | None) -> None:
        """ValueError unless the model has all of these tokens."""
        for token_id in token_ids or ():
            if token_id >= self._vocab_size:
                raise ValueError(
                    f"{name} has the token id {token_id}; token ids of this model are 0 to "
                    f"{self._vocab_size - 1}"
                )
