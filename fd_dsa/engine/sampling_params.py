"""Sampling parameters of a request, checked when they are made, and the limits of an engine."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np

from fd_dsa.chat.parser import AnswerFormat
from fd_dsa.engine.argument_hints import SAMPLING_HINTS
from fd_dsa.engine.arguments import (
    LARGEST,
    MAX_TEXT_CHARS,
    check_number,
    check_texts,
    check_token_ids,
    explain_fields,
    list_entries,
)
from fd_dsa.engine.reasoning import Reasoning
from fd_dsa.engine.structured_outputs import StructuredOutputsParams
from fd_dsa.engine.tokenizer import Tokenizer
from fd_dsa.errors import ArgumentError, argument_error, shorten

SEED_MIN = -(2**63)
SEED_MAX = 2**64 - 1
LOGIT_BIAS_MAX = 100
# limits of the work that one request may cause in every step
MAX_BAD_WORDS = 1024
MAX_STOP_STRINGS = 64
MAX_STOP_CHARS = 8192
MAX_BAD_WORD_CHARS = 32_768
MAX_LOGPROBS = 20
MAX_CHOICES = 128
# smallest and largest value of each number
_RANGES = {
    "n": (1, MAX_CHOICES),
    "temperature": (0, LARGEST),
    "top_p": (0, 1),
    "top_k": (-1, math.inf),
    "min_p": (0, 1),
    "presence_penalty": (-2, 2),
    "frequency_penalty": (-2, 2),
    "repetition_penalty": (0, LARGEST),
    "min_tokens": (0, math.inf),
    "max_tokens": (1, math.inf),
    "logprobs": (0, MAX_LOGPROBS),
    "prompt_logprobs": (0, MAX_LOGPROBS),
    "seed": (SEED_MIN, SEED_MAX),
}


@explain_fields(SAMPLING_HINTS)
@dataclass(frozen=True)
class SamplingParams:
    """Sampling of one request, and conditions for its end.

    The sampler applies penalties, then `logit_bias`, bad words and the end tokens that `min_tokens`
    forbids. Temperature, `min_p` and `top_k` follow, and `top_p` over the tokens that they keep. A
    sampled token depends only on the logits, the seed and the position in the output. Names and
    meanings are vLLM's.

    Args:
        n: number of outputs for the prompt, 1 to 128, which share its cache blocks. The seeds of
            all but the first are derived from `seed` and their index.
        temperature: >= 0; greedy below 1e-5, with ties to the lowest id.
        top_p: in [0, 1]; the smallest set of most likely tokens with this mass. 1 = off.
        top_k: number of most likely tokens kept; -1 or 0 = off.
        min_p: in [0, 1]; drops tokens less likely than this share of the likeliest. 0 = off.
        presence_penalty: in [-2, 2]; subtracted from the logit of every token in the output.
        frequency_penalty: in [-2, 2]; the same, times the number of its occurrences in the output.
        repetition_penalty: > 0; divides positive logits of every token in prompt or output, and
            multiplies negative ones. 1 = off.
        logit_bias: token id -> number in [-100, 100] that is added to its logit.
        bad_words: texts whose tokens never follow each other, with or without a space in front.
        bad_words_token_ids: token ids that are never sampled.
        min_tokens: output tokens before the output may end: end-of-sequence and `stop_token_ids`
            cannot be sampled, and stop strings are searched only after these tokens.
        max_tokens: maximum number of output tokens, >= 1; None = the rest of the context.
        stop: a string or several; the output ends before the first one that is completed.
        reasoning: texts around the reasoning at the beginning of the output. Structured output,
            `stop`, `bad_words`, `bad_words_token_ids` and `min_tokens` then begin with the answer
            after it. In the reasoning, structured output or min_tokens > 0 forbids every end.
            Special tokens that are these texts stay in the text. None = all begin with the output.
        constrain_reasoning: True = `stop`, `bad_words`, `bad_words_token_ids` and `min_tokens`
            begin with the output. Structured output still begins with the answer.
        stop_token_ids: tokens that end the output.
        include_stop_str_in_output: True = keep the stop string, or the text of the stop token.
        ignore_eos: True = an end-of-sequence token does not end the output.
        skip_special_tokens: True = the text has no special tokens.
        logprobs: number of likeliest tokens that are scored with each output token, 0 to 20. The
            scores are those of the model, before rules and temperature. None = no scores.
        prompt_logprobs: the same for the prompt, whose prefix is then not read from the cache.
        structured_outputs: form that the output must have; the output ends when it is complete.
        seed: random numbers of the request depend only on the seed and on the position in the
            output. None = derived from the engine's seed and the arrival number of the request.
        cache_salt: non-empty text. The request shares cache blocks only with requests of the same
            salt. None = with requests without a salt.
        skip_reading_prefix_cache: True = compute the whole prompt; later requests can read it from
            the cache.
        kept_special_token_ids: special tokens that stay in the text for a parser of the caller.
        return_topk_positions: True = report the positions that the indexer selected for the last
            token; only on a CPU.
        speculative: False = the request has no drafts; its tokens are the same.

    Raises:
        ArgumentError: an argument has an unknown name, is out of range or of another type; the
            message names argument and value. The error is a ValueError and a TypeError.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] | None = None
    bad_words: Sequence[str] | None = None
    bad_words_token_ids: Sequence[int] | None = None
    min_tokens: int = 0
    max_tokens: int | None = 16
    stop: str | Sequence[str] | None = None
    reasoning: Reasoning | None = None
    constrain_reasoning: bool = False
    stop_token_ids: Sequence[int] | None = None
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    structured_outputs: StructuredOutputsParams | None = None
    seed: int | None = None
    cache_salt: str | None = None
    skip_reading_prefix_cache: bool = False
    kept_special_token_ids: frozenset[int] = frozenset()
    return_topk_positions: bool = False
    speculative: bool = True

    def __post_init__(self) -> None:
        for name, kind, optional in _CHECKED:
            value = getattr(self, name)
            if kind is bool:
                if not isinstance(value, bool):
                    raise argument_error(name, value, "True or False")
            elif value is not None or not optional:
                check_number(name, value, *_RANGES[name], kind)
        if self.repetition_penalty == 0:
            raise argument_error("repetition_penalty", 0, "a number > 0", "write 1 for none")
        kept = self.kept_special_token_ids
        if not isinstance(kept, (set, frozenset)):
            raise argument_error("kept_special_token_ids", kept, "a frozenset of token ids")
        check_token_ids("kept_special_token_ids", list(kept))
        salt = self.cache_salt
        if salt is not None and (not isinstance(salt, str) or not salt):
            raise argument_error("cache_salt", salt, "a non-empty string")
        if salt is not None and len(salt) > MAX_TEXT_CHARS:
            raise ArgumentError(
                f"cache_salt: got {len(salt)} characters; must be at most {MAX_TEXT_CHARS}"
            )
        if self.reasoning is not None and not isinstance(self.reasoning, Reasoning):
            hint = "write fd_dsa.engine.reasoning.Reasoning(begin=..., end=...)"
            raise argument_error("reasoning", self.reasoning, "a Reasoning", hint)
        form = self.structured_outputs
        if form is not None and not isinstance(form, StructuredOutputsParams):
            hint = "write StructuredOutputsParams(json=SCHEMA), or regex, choice, grammar"
            raise argument_error("structured_outputs", form, "a StructuredOutputsParams", hint)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            rule = f"at most max_tokens, which is {self.max_tokens}"
            raise argument_error("min_tokens", self.min_tokens, rule)
        self._check_tokens()

    def _check_tokens(self) -> None:
        """Check the fields that name tokens or texts."""
        if self.stop is not None and not isinstance(self.stop, (str, Sequence)):
            raise argument_error("stop", self.stop, "a string or a list of strings")
        check_texts("stop", self.stop_strings, MAX_STOP_STRINGS, MAX_STOP_CHARS)
        for name in ("stop_token_ids", "bad_words_token_ids"):
            check_token_ids(name, getattr(self, name))
        if self.bad_words is not None:
            if isinstance(self.bad_words, str) or not isinstance(self.bad_words, Sequence):
                raise argument_error("bad_words", self.bad_words, "a list of strings")
            check_texts("bad_words", self.bad_words, MAX_BAD_WORDS, MAX_BAD_WORD_CHARS)
        if self.logit_bias is None:
            return
        if not isinstance(self.logit_bias, Mapping):
            rule = "a dict from token ids to numbers"
            raise argument_error("logit_bias", self.logit_bias, rule)
        check_token_ids("logit_bias", list(self.logit_bias))
        for token_id, bias in self.logit_bias.items():
            of = f" for token {token_id}"
            check_number("logit_bias", bias, -LOGIT_BIAS_MAX, LOGIT_BIAS_MAX, float, of)

    def kept_ids(self, tokenizer: Tokenizer) -> frozenset[int]:
        """Return special tokens that stay in the text, also those around the reasoning."""
        # a set is allowed too, and the result is a key of caches
        kept = frozenset(self.kept_special_token_ids)
        if self.reasoning is None:
            return kept
        texts = (self.reasoning.begin, self.reasoning.end)
        return kept.union(tokenizer.special_ids_of(texts).values())

    @property
    def has_rules(self) -> bool:
        """True if the parameters change logits before sampling, or exclude tokens."""
        penalties = self.repetition_penalty, self.frequency_penalty, self.presence_penalty
        excluded = self.bad_words or self.bad_words_token_ids or self.min_tokens
        has_form = self.structured_outputs is not None
        return penalties != (1, 0, 0) or has_form or bool(self.logit_bias or excluded)

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """Stop strings as a tuple, which may be empty."""
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)


SAMPLING_FIELDS = tuple(one.name for one in fields(SamplingParams))
"""Names of the arguments of SamplingParams."""
Params = SamplingParams | Sequence[SamplingParams] | None
# name, type, and whether None is allowed, of numbers and switches
_CHECKED = tuple(
    (one.name, kind, one.type == f"{kind.__name__} | None")
    for one in fields(SamplingParams)
    for kind in (bool, int, float)
    if one.type in (kind.__name__, f"{kind.__name__} | None")
)


@dataclass(frozen=True)
class RequestLimits:
    """Sizes of an engine that bound its requests.

    Attributes:
        vocab_size: columns of the logits.
        max_model_len: maximum length of prompt plus output, tokens.
        num_blocks: blocks of the caches.
        block_size: tokens per block.
        can_read_selections: True if the runner can return the keys that the indexer selected.
    """

    vocab_size: int
    max_model_len: int
    num_blocks: int
    block_size: int
    can_read_selections: bool = False

    def validate(
        self, prompt_token_ids: Sequence[int] | np.ndarray, params: SamplingParams
    ) -> tuple[int, np.ndarray]:
        """Return the max_tokens of a request, and its prompt as int64 ids. Thread-safe.

        Raises:
            ValueError: the prompt is empty or has invalid token ids, or the request can never fit
                into the context or the cache. Or a parameter names a token that the model lacks, or
                asks for selections that the runner cannot show. The message has the numbers, and
                begins with the name of the parameter.
        """
        max_tokens = self._room(len(prompt_token_ids), params)
        prompt = self._read_prompt(prompt_token_ids)
        self._check_token_ids("logit_bias", params.logit_bias)
        self._check_token_ids("stop_token_ids", params.stop_token_ids)
        self._check_token_ids("bad_words_token_ids", params.bad_words_token_ids)
        if params.return_topk_positions and not self.can_read_selections:
            raise ValueError(
                "return_topk_positions is true; a device keeps the selected keys to itself; leave "
                "it out or serve with --device cpu"
            )
        return max_tokens, prompt

    def _room(self, num_prompt: int, params: SamplingParams) -> int:
        """Return the number of output tokens that fit after a prompt of this length."""
        if num_prompt == 0:
            raise ValueError("the prompt has no tokens; it must have at least 1")
        if num_prompt >= self.max_model_len:
            raise ValueError(
                f"the prompt has {num_prompt} tokens, max_model_len is {self.max_model_len} and "
                "the output needs at least 1; shorten the prompt or raise max_model_len"
            )
        room = self.max_model_len - num_prompt
        max_tokens = room if params.max_tokens is None else params.max_tokens
        if max_tokens > room:
            raise ValueError(
                f"the prompt has {num_prompt} tokens and max_tokens is {max_tokens}, together "
                f"{num_prompt + max_tokens}; max_model_len is {self.max_model_len}; lower "
                "max_tokens, shorten the prompt or raise max_model_len"
            )
        if params.min_tokens > max_tokens:
            raise ValueError(
                f"min_tokens is {params.min_tokens}; the prompt has {num_prompt} tokens and "
                f"max_model_len is {self.max_model_len}, so at most {max_tokens} follow; lower "
                "min_tokens, shorten the prompt or raise max_model_len"
            )
        # the last token is not computed, so it needs no slot of the cache
        needed = -(-(num_prompt + max_tokens - 1) // self.block_size)
        if needed > self.num_blocks:
            raise ValueError(
                f"the prompt has {num_prompt} tokens and up to {max_tokens} follow, which need "
                f"{needed} cache blocks of {self.block_size} tokens; there are "
                f"{self.num_blocks}; lower max_tokens or give the cache more memory"
            )
        return max_tokens

    def _read_prompt(self, token_ids: Sequence[int] | np.ndarray) -> np.ndarray:
        """Return int64 ids, or raise ValueError if some are no integers of the vocabulary."""
        ids = np.asarray(token_ids)
        if ids.ndim != 1 or ids.dtype.kind not in "iu":
            raise ValueError(
                f"the prompt has elements of type {ids.dtype}; it must be a flat list of integers"
            )
        outside = np.flatnonzero((ids < 0) | (ids >= self.vocab_size))
        if len(outside):
            raise ValueError(
                f"token {outside[0]} of the prompt is {ids[outside[0]]}; token ids of this model "
                f"are 0 to {self.vocab_size - 1}"
            )
        return ids.astype(np.int64, copy=False)

    def _check_token_ids(self, name: str, token_ids: Iterable[int] | None) -> None:
        """Raise ValueError unless the model has all of these tokens."""
        for token_id in token_ids or ():
            if token_id >= self.vocab_size:
                got = shorten(int(token_id))
                raise ValueError(
                    f"{name} has the token id {got}; token ids of this model are 0 to "
                    f"{self.vocab_size - 1}"
                )


def read_params(
    params: object, count: int, default: SamplingParams, counted: str
) -> list[SamplingParams]:
    """Give each of `count` prompts its SamplingParams.

    Args:
        counted: name of the argument that has the prompts.

    Raises:
        ArgumentError: the parameters have another type or number.
    """
    if params is None or isinstance(params, SamplingParams):
        return [params or default] * count
    rule = "a SamplingParams, or a list with one for each prompt"
    if isinstance(params, Mapping):
        given = ", ".join(f"{key}=..." for key in params if key in SAMPLING_FIELDS)
        raise argument_error("sampling_params", params, rule, f"write SamplingParams({given})")
    several = list_entries("sampling_params", params, rule, "write SamplingParams(NAME=VALUE)")
    for index, one in enumerate(several):
        if not isinstance(one, SamplingParams):
            name = f"sampling_params[{index}]"
            raise argument_error(name, one, "a SamplingParams", "write SamplingParams(NAME=VALUE)")
    if len(several) != count:
        raise ArgumentError(
            f"sampling_params: got {len(several)} entries for {count} {counted}; must be one for "
            "all, or a list with one for each; write a single SamplingParams"
        )
    return several


def fit_into_context(
    params: Sequence[SamplingParams], prompts: Sequence[Sequence[int]], max_model_len: int
) -> list[SamplingParams]:
    """Lower each `max_tokens` of a caller without parameters to the room after the prompt."""
    fitting = []
    for one, prompt in zip(params, prompts, strict=True):
        room = max(max_model_len - len(prompt), 1)
        is_long = one.max_tokens is not None and one.max_tokens > room
        fitting.append(replace(one, max_tokens=room) if is_long else one)
    return fitting


def for_answer(
    params: SamplingParams, tokenizer: Tokenizer, answer: AnswerFormat
) -> SamplingParams:
    """Add the markers of an answer's format, and its reasoning unless the caller has set one."""
    if not answer.has_reasoning and answer.tool_format is None:
        return params
    kept = frozenset(tokenizer.special_ids_of(answer.markers).values())
    return replace(
        params,
        kept_special_token_ids=params.kept_special_token_ids | kept,
        reasoning=Reasoning.of(answer) if params.reasoning is None else params.reasoning,
    )
