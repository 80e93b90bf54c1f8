"""What a caller may ask of sampler, stop rules and prefix cache, checked when it is made."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from fd_dsa.engine.reasoning import Reasoning
from fd_dsa.engine.structured_outputs import StructuredOutputsParams
from fd_dsa.engine.tokenizer import Tokenizer

SEED_MIN = -(2**63)
SEED_MAX = 2**64 - 1
LOGIT_BIAS_MAX = 100
# what one request may make the sampler look at in every step
MAX_BAD_WORDS = 1024
MAX_STOP_STRINGS = 64
MAX_TEXT_CHARS = 512
MAX_STOP_CHARS = 8192
MAX_BAD_WORD_CHARS = 32_768
MAX_LOGPROBS = 20
MAX_CHOICES = 128
MAX_TOKEN_ID = 2**31 - 1
_LARGEST = sys.float_info.max
# smallest and largest value of each number
_RANGES = {
    "n": (1, MAX_CHOICES),
    "temperature": (0, _LARGEST),
    "top_p": (0, 1),
    "top_k": (-1, math.inf),
    "min_p": (0, 1),
    "presence_penalty": (-2, 2),
    "frequency_penalty": (-2, 2),
    "repetition_penalty": (0, _LARGEST),
    "min_tokens": (0, math.inf),
    "max_tokens": (1, math.inf),
    "logprobs": (0, MAX_LOGPROBS),
    "prompt_logprobs": (0, MAX_LOGPROBS),
    "seed": (SEED_MIN, SEED_MAX),
}


@dataclass(frozen=True)
class SamplingParams:
    """How one request is sampled and when it ends.

    The order is: penalties, logit_bias, bad words and the end tokens that min_tokens forbids;
    then temperature, min_p, top_k, and top_p over what they left. A draw depends on the logits,
    the seed and the position in the output alone. Names and meanings are vLLM's.

    Args:
        n: outputs for the prompt, 1 to 128; they share its cache blocks, and all but the first
            have seeds derived from `seed` and their index.
        temperature: >= 0; 0 (and anything below 1e-5) is greedy, ties to the lowest id.
        top_p: in [0, 1]; the smallest set of most likely tokens with this mass. 1 = off.
        top_k: number of most likely tokens kept; -1 or 0 = off.
        min_p: in [0, 1]; drops tokens less likely than this share of the likeliest. 0 = off.
        presence_penalty: in [-2, 2]; taken off the logit of every token in the output.
        frequency_penalty: in [-2, 2]; the same, times how often the token is in the output.
        repetition_penalty: > 0; divides positive logits of every token in prompt or output, and
            multiplies negative ones. 1 = off.
        logit_bias: token id -> number in [-100, 100] that is added to its logit.
        bad_words: texts whose tokens, with and without a space in front, never come in a row.
        bad_words_token_ids: token ids that never come.
        min_tokens: number of output tokens before which nothing ends the output: end-of-sequence
            and stop_token_ids cannot be sampled, and stop strings are searched after them.
        max_tokens: output tokens, >= 1; None = whatever is left of the context.
        stop: a string or several; the output ends before the first one that is completed.
        reasoning: texts around the reasoning at the beginning of the output. The form, `stop`,
            `bad_words`, `bad_words_token_ids` and `min_tokens` then begin with the answer after
            it; while the output reasons, a form or min_tokens > 0 forbids every end. Special
            tokens that are these texts stay in the text. None = all begin with the output.
        constrain_reasoning: `stop`, `bad_words`, `bad_words_token_ids` and `min_tokens` begin with
            the output nevertheless; the form does not.
        stop_token_ids: tokens that end the output.
        include_stop_str_in_output: keep the stop string, or the text of the stop token.
        ignore_eos: go on after an end-of-sequence token.
        skip_special_tokens: leave special tokens out of the text.
        logprobs: score every output token, and so many of the likeliest ones beside it, 0 to 20;
            of the model's own distribution, before all of the above. None = off.
        prompt_logprobs: the same for the prompt, whose prefix is then not read from the cache.
        structured_outputs: the form that the output must have; it ends where that is complete.
        seed: draws of the request depend on it and the position in the output alone;
            None = derived from the engine's seed and the request's arrival number.
        cache_salt: a text, not empty; the request shares cache blocks only with requests of the
            same one. None = with all that have none.
        skip_reading_prefix_cache: compute the whole prompt, also where earlier requests have;
            what is computed can be found by later ones.
        kept_special_token_ids: special tokens that stay in the text, which leaves out the others:
            those that a parser of the caller looks for.
        return_topk_positions: report at the end which positions the indexer chose for the last
            token; on a CPU alone.
        speculative: whether it may have drafts where the engine makes some; they change no token.

    Raises:
        ValueError: a field is out of range or of another type; names field and value.
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
                    raise ValueError(f"{name} is {value!r}; it must be true or false")
            elif value is not None or not optional:
                _check_number(name, value, *_RANGES[name], kind)
        if self.repetition_penalty == 0:
            raise ValueError("repetition_penalty is 0; it must be a number > 0")
        for token_id in self.kept_special_token_ids:
            _check_number("kept_special_token_ids", token_id, 0, math.inf, int)
        salt = self.cache_salt
        if salt is not None and (not isinstance(salt, str) or not salt):
            raise ValueError(f"cache_salt is {salt!r}; it must be a non-empty string")
        if salt is not None and len(salt) > MAX_TEXT_CHARS:
            raise ValueError(
                f"cache_salt has {len(salt)} characters; at most {MAX_TEXT_CHARS} are allowed"
            )
        if self.reasoning is not None and not isinstance(self.reasoning, Reasoning):
            raise ValueError(f"reasoning is {self.reasoning!r}; it must be a Reasoning")
        form = self.structured_outputs
        if form is not None and not isinstance(form, StructuredOutputsParams):
            raise ValueError(
                f"structured_outputs is {form!r}; it must be a StructuredOutputsParams"
            )
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(
                f"min_tokens is {self.min_tokens}; it must be at most max_tokens, which is "
                f"{self.max_tokens}"
            )
        self._check_tokens()

    def _check_tokens(self) -> None:
        """Tokens and texts that are treated apart."""
        if self.stop is not None and not isinstance(self.stop, (str, Sequence)):
            raise ValueError(f"stop is {self.stop!r}; it must be a string or a list of strings")
        _check_texts("stop", self.stop_strings, MAX_STOP_STRINGS, MAX_STOP_CHARS)
        for name in ("stop_token_ids", "bad_words_token_ids"):
            _check_token_ids(name, getattr(self, name))
        if self.bad_words is not None:
            if isinstance(self.bad_words, str) or not isinstance(self.bad_words, Sequence):
                raise ValueError(f"bad_words is {self.bad_words!r}; it must be a list of strings")
            _check_texts("bad_words", self.bad_words, MAX_BAD_WORDS, MAX_BAD_WORD_CHARS)
        if self.logit_bias is None:
            return
        if not isinstance(self.logit_bias, Mapping):
            raise ValueError(f"logit_bias is {self.logit_bias!r}; it must map token ids to numbers")
        _check_token_ids("logit_bias", list(self.logit_bias))
        for token_id, bias in self.logit_bias.items():
            name = f"logit_bias of token {token_id}"
            _check_number(name, bias, -LOGIT_BIAS_MAX, LOGIT_BIAS_MAX, float)

    def kept_ids(self, tokenizer: Tokenizer) -> frozenset[int]:
        """Special tokens that stay in the text, the texts around the reasoning included."""
        if self.reasoning is None:
            return self.kept_special_token_ids
        texts = (self.reasoning.begin, self.reasoning.end)
        return self.kept_special_token_ids.union(tokenizer.special_ids_of(texts).values())

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """The stop strings as a tuple, empty when there are none."""
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)


# name, type, and whether None is allowed, of numbers and switches
_CHECKED = tuple(
    (one.name, kind, one.type == f"{kind.__name__} | None")
    for one in fields(SamplingParams)
    for kind in (bool, int, float)
    if one.type in (kind.__name__, f"{kind.__name__} | None")
)


def _check_number(name: str, value: Any, low: float, high: float, kind: type) -> None:
    """ValueError unless `value` is a number of this type, int or float, in [low, high]."""
    types, noun = (int, "an integer") if kind is int else ((int, float), "a number")
    is_number = isinstance(value, types) and not isinstance(value, bool)
    if not is_number or not low <= value <= high:
        allowed = f"{noun} in [{low}, {high}]"
        if high >= _LARGEST:
            allowed = f"{noun if kind is int else 'a finite number'} >= {low}"
        raise ValueError(f"{name} is {value!r}; it must be {allowed}")


def _check_texts(name: str, texts: Sequence[Any], most: int, most_chars: int) -> None:
    """ValueError unless these are at most so many non-empty strings, of so many characters."""
    if len(texts) > most:
        raise ValueError(f"{name} has {len(texts)} entries; at most {most} are allowed")
    num_chars = 0
    for text in texts:
        if not isinstance(text, str) or not text:
            raise ValueError(f"{name} has the entry {text!r}; it must be a non-empty string")
        if len(text) > MAX_TEXT_CHARS:
            raise ValueError(
                f"{name} has an entry of {len(text)} characters; at most {MAX_TEXT_CHARS} are "
                "allowed"
            )
        if not text.isascii() and any("\ud800" <= char <= "\udfff" for char in text):
            raise ValueError(f"{name} has the entry {text!r}; it must be valid Unicode")
        num_chars += len(text)
    if num_chars > most_chars:
        raise ValueError(
            f"{name} has {num_chars} characters in all; at most {most_chars} are allowed"
        )


def _check_token_ids(name: str, token_ids: Any) -> None:
    """ValueError unless this is None or a sequence of integers that may be token ids."""
    if token_ids is None:
        return
    if isinstance(token_ids, str) or not isinstance(token_ids, Sequence):
        raise ValueError(f"{name} is {token_ids!r}; it must be a list of token ids")
    for token_id in token_ids:
        integer = isinstance(token_id, int) and not isinstance(token_id, bool)
        if not integer or not 0 <= token_id <= MAX_TOKEN_ID:
            raise ValueError(f"{name} has the entry {token_id!r}; it must be a token id, >= 0")
