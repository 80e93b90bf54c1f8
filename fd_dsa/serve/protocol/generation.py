"""Fields shared by completions and chat completions: model, stream, sampling."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field, PlainValidator, WithJsonSchema

from fd_dsa.engine.sampling_params import MAX_BAD_WORDS, MAX_STOP_STRINGS, SamplingParams
from fd_dsa.serve.errors import FieldError, request_error, show
from fd_dsa.serve.protocol.fields import MAX_ENTRIES, TEXT, TEXTS, Body, at_most, refuse
from fd_dsa.serve.protocol.known_fields import IGNORED_STREAM_OPTIONS
from fd_dsa.serve.protocol.structured import StructuredFields

_MAX_ID_DIGITS = 10


def _stop(value: object) -> list[str] | None:
    strings = [value] if isinstance(value, str) else value
    if not isinstance(strings, list) or not all(isinstance(s, str) and s for s in strings):
        raise refuse(f"got {show(value)}; allowed is a non-empty string or a list of them")
    return strings or None


def _logit_bias(value: object) -> dict[int, float]:
    """Parse the bias by token id. JSON has the ids as strings."""
    if not isinstance(value, dict):
        raise refuse(f"got {show(value)}; allowed is an object of token ids and numbers")
    for key, bias in value.items():
        # parsing many digits is slow, and no token id has more
        if not (key.isascii() and key.isdecimal() and len(key) <= _MAX_ID_DIGITS):
            raise refuse(f"has the key {show(key)}; allowed are token ids, as texts")
        if isinstance(bias, bool) or not isinstance(bias, (int, float)):
            raise refuse(f"has {show(bias)} for token {key}; allowed is a number")
    biases = {int(key): bias for key, bias in value.items()}
    if len(biases) < len(value):
        twice = next(key for key in value if key != str(int(key)))
        raise refuse(f"has the key {show(twice)} and another one for token {int(twice)}; send one")
    return biases


_StopField = Annotated[
    list[str] | None,
    PlainValidator(_stop),
    at_most(MAX_STOP_STRINGS),
    WithJsonSchema({"anyOf": [TEXT, TEXTS]}),
]
_LogitBiasField = Annotated[
    dict[int, float],
    PlainValidator(_logit_bias),
    at_most(MAX_ENTRIES),
    WithJsonSchema({"type": "object", "additionalProperties": {"type": "number"}}),
]


_TokenIds = Annotated[list[int], at_most(MAX_ENTRIES)]


class StreamOptions(Body):
    """`stream_options`: the chunks that have a usage."""

    include_usage: bool | None = Field(None, description="A last chunk without choices.")
    continuous_usage_stats: bool | None = Field(
        None, description="With include_usage: every chunk, as in vLLM."
    )


class ModelFields(Body):
    """Fields with the same name and meaning in every API that generates text."""

    model: str | None = Field(None, description="A served name; the first one by default.")
    stream: bool | None = None
    temperature: float | None = Field(
        None, description="0 is greedy; left out: what generation_config.json says, or 1."
    )
    top_p: float | None = None


class GenerationRequest(ModelFields, StructuredFields):
    """Fields for model, stream, sampling and structured output."""

    stream_options: StreamOptions | None = None
    n: int | None = Field(None, description="Choices for each prompt, 1 to 128.")
    best_of: int | None = Field(None, description="1 or the same as n.")
    max_tokens: int | None = Field(None, description="Maximum number of tokens to generate.")
    min_tokens: int | None = Field(
        None, description="Minimum number of tokens before the output may end."
    )
    top_k: int | None = Field(None, description="-1 or 0 is off.")
    min_p: float | None = Field(
        None, description="Drops tokens less likely than this share of the likeliest; 0 is off."
    )
    presence_penalty: float | None = Field(None, description="-2 to 2; 0 is off.")
    frequency_penalty: float | None = Field(None, description="-2 to 2; 0 is off.")
    repetition_penalty: float | None = Field(
        None, description="Above 0, over prompt and output; 1 is off."
    )
    logit_bias: _LogitBiasField | None = Field(
        None, description="Token id to what is added to its logit, -100 to 100."
    )
    bad_words: Annotated[list[str], at_most(MAX_BAD_WORDS)] | None = Field(
        None, description="Texts that the output never contains."
    )
    bad_words_token_ids: _TokenIds | None = Field(
        None, description="Tokens that the output never contains."
    )
    seed: int | None = None
    stop: _StopField | None = None
    stop_token_ids: _TokenIds | None = Field(None, description="Tokens that end the output.")
    include_stop_str_in_output: bool | None = Field(
        None, description="Keep the stop string, or the text of the stop token."
    )
    ignore_eos: bool | None = Field(None, description="Continue after an end-of-sequence token.")
    skip_special_tokens: bool | None = Field(
        None, description="Leave special tokens out of the text; true by default."
    )
    prompt_logprobs: int | None = Field(
        None, description="Most likely tokens scored at each position of the prompt, 0 to 20."
    )
    return_token_ids: bool | None = Field(
        None, description="Put prompt_token_ids and token_ids into the answer."
    )
    cache_salt: str | None = Field(
        None, description="Share cached prefixes only with requests of the same salt."
    )
    speculative: bool | None = Field(
        None, description="false: no drafts; true (default): drafts if the server makes some."
    )
    return_topk_positions: bool | None = Field(
        None,
        description="Return the positions that the indexer selected for the last token, by layer.",
    )

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def usage_in_each_chunk(self) -> bool:
        """True if every chunk has the usage so far."""
        options = self.stream_options
        return bool(options and options.include_usage and options.continuous_usage_stats)

    def check_supported(self) -> None:
        """Raise ApiError 400 for unsupported or contradictory fields."""
        super().check_supported()
        if self.stream_options is not None:
            if not self.stream:
                raise FieldError(
                    'stream_options: given without streaming; set "stream": true or leave it out'
                )
            for name in (self.stream_options.model_extra or {}).keys() - IGNORED_STREAM_OPTIONS:
                raise FieldError(
                    f"stream_options.{name}: is unknown; allowed are "
                    f"{', '.join(StreamOptions.model_fields)}"
                )
        if self.prompt_logprobs is not None and self.stream:
            raise FieldError(
                "prompt_logprobs: cannot be streamed; leave out stream, or ask for echo with "
                "logprobs in /v1/completions"
            )

    def sampling_params(
        self, max_tokens: int, defaults: Mapping[str, float | int]
    ) -> SamplingParams:
        """Return the sampling parameters of this request.

        Raises:
            ApiError: 400 if a value is out of its range.
        """
        fields: dict[str, Any] = {name: getattr(self, name) for name in SAMPLING_FIELDS}
        fields.update(self.score_fields(), max_tokens=max_tokens)
        fields["structured_outputs"] = self.structured_params()
        if self.best_of not in (None, 1, self.n or 1):
            raise FieldError(
                f"best_of: got {self.best_of}; allowed is 1 or the same as n, all choices are "
                "returned"
            )
        set_fields = {name: value for name, value in fields.items() if value is not None}
        try:
            return SamplingParams(**{**defaults, **set_fields})
        except ValueError as error:
            raise request_error(error, (*SAMPLING_FIELDS, "logprobs")) from error

    def score_fields(self) -> dict[str, int | None]:
        """Return `logprobs` and `prompt_logprobs` for SamplingParams."""
        raise NotImplementedError


SAMPLING_FIELDS = tuple(
    field.name
    for field in dataclasses.fields(SamplingParams)
    if field.name in GenerationRequest.model_fields.keys() - StructuredFields.model_fields.keys()
)
"""Fields with the same name and meaning in SamplingParams."""
