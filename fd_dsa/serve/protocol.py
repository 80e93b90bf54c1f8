"""Request bodies of the OpenAI API as this server reads them.

Unknown fields are ignored. Fields that other servers know and that would change the result are
listed in `NOT_YET` with the values that mean "off"; any other value is refused, never ignored.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, PlainValidator, WithJsonSchema
from pydantic_core import PydanticCustomError

from fd_dsa.engine.sampling_params import SamplingParams
from fd_dsa.serve.errors import CUSTOM_ERROR, ApiError, request_error, show

logger = logging.getLogger("fd_dsa.serve")

# field -> values which leave the result as it is; None is always one of them
NOT_YET: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "prompt_logprobs": (),
    "echo": (False,),
    "suffix": ("",),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "structured_outputs": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "repetition_penalty": (1,),
    "logit_bias": ({},),
    "bad_words": ([],),
    "min_p": (0,),
    "min_tokens": (0,),
    "stop_token_ids": ([],),
    "include_stop_str_in_output": (False,),
    "skip_special_tokens": (True,),
    "add_special_tokens": (),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "modalities": (["text"],),
    "audio": (),
}
_ROLES = ("system", "developer", "user", "assistant")
_SAMPLING_FIELDS = (
    "temperature",
    "top_p",
    "top_k",
    "seed",
    "stop",
    "max_tokens",
    "ignore_eos",
    "cache_salt",
)


def _refuse(message: str) -> PydanticCustomError:
    """An error of a validator; braces in the message are data, not placeholders."""
    return PydanticCustomError(CUSTOM_ERROR, "{message}", {"message": message})


def _same(value: Any, neutral: Any) -> bool:
    """Equality that tells false from 0: `logprobs: 0` asks for something."""
    return isinstance(value, bool) == isinstance(neutral, bool) and bool(value == neutral)


def _stop(value: Any) -> list[str] | None:
    """Stop strings as a list."""
    if value is None:
        return None
    strings = [value] if isinstance(value, str) else value
    if not isinstance(strings, list) or not all(isinstance(s, str) and s for s in strings):
        raise _refuse(f"got {show(value)}; allowed is a non-empty string or a list of them")
    return strings or None


def _is_token_ids(value: Any) -> bool:
    """True for a non-empty list of integers (a bool is none)."""
    return isinstance(value, list) and bool(value) and all(type(t) is int for t in value)


def _prompt(value: Any) -> list[str | list[int]]:
    """The prompts of a completion, one entry each: text or token ids."""
    if isinstance(value, str) or _is_token_ids(value):
        return [value]
    entries = value if isinstance(value, list) else []
    if entries and all(isinstance(entry, str) for entry in entries):
        return entries
    if entries and all(_is_token_ids(entry) for entry in entries):
        return entries
    raise _refuse(
        f"got {show(value)}; allowed is a string, a list of strings, a list of token ids or a "
        "list of lists of token ids, none of them empty"
    )


def _role(value: Any) -> str:
    """Role of a chat message; `developer` is the newer name of `system`."""
    if value == "tool":
        raise _refuse('got "tool"; tool calls are not supported yet')
    if value not in _ROLES:
        raise _refuse(f"got {show(value)}; allowed are {', '.join(_ROLES)}")
    return "system" if value == "developer" else str(value)


def _content(value: Any) -> str:
    """Text of a chat message; text parts are joined by line breaks."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not value:
        raise _refuse(f"got {show(value)}; allowed is a string or a list of text parts")
    texts = []
    for index, part in enumerate(value):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text":
            raise _refuse(f"part {index} has type {show(kind)}; this server reads text only")
        if not isinstance(part.get("text"), str):
            raise _refuse(f"part {index} has no text; give it as a string")
        texts.append(part["text"])
    return "\n".join(texts)


_TEXT = {"type": "string"}
_TEXTS = {"type": "array", "items": _TEXT}
_IDS = {"type": "array", "items": {"type": "integer"}}

_StopField = Annotated[
    list[str] | None, PlainValidator(_stop), WithJsonSchema({"anyOf": [_TEXT, _TEXTS]})
]
_PromptField = Annotated[
    list[str | list[int]],
    PlainValidator(_prompt),
    WithJsonSchema({"anyOf": [_TEXT, _TEXTS, _IDS, {"type": "array", "items": _IDS}]}),
]
_RoleField = Annotated[
    str, PlainValidator(_role), WithJsonSchema({"type": "string", "enum": list(_ROLES)})
]
_ContentField = Annotated[
    str,
    PlainValidator(_content),
    WithJsonSchema({"anyOf": [_TEXT, {"type": "array", "items": {"type": "object"}}]}),
]


class _Body(BaseModel):
    """Base of all bodies: no conversion of types, no NaN, unknown fields kept for a look."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)


class StreamOptions(_Body):
    """`stream_options`; with `include_usage` a last chunk without choices carries the usage."""

    include_usage: bool | None = None


class _GenerationRequest(_Body):
    """What completions and chat completions have in common."""

    model: str | None = Field(None, description="A served name; the first one by default.")
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(None, description="Most tokens to generate.")
    temperature: float | None = Field(
        None, description="0 is greedy; left out: what generation_config.json says, or 1."
    )
    top_p: float | None = None
    top_k: int | None = Field(None, description="-1 or 0 is off.")
    seed: int | None = None
    stop: _StopField = None
    ignore_eos: bool | None = Field(None, description="Go on after an end-of-sequence token.")
    cache_salt: str | None = Field(
        None, description="Share cached prefixes only with requests of the same salt."
    )

    @property
    def include_usage(self) -> bool:
        """True when the stream ends with a usage chunk."""
        return bool(self.stream_options and self.stream_options.include_usage)

    def check_supported(self) -> None:
        """Raise ApiError 400 for a field of `NOT_YET` that would change the result."""
        for name, value in (self.model_extra or {}).items():
            neutral = NOT_YET.get(name)
            if neutral is None:
                logger.debug("unknown field %s is ignored", show(name))
                continue
            if value is None or any(_same(value, v) for v in neutral):
                continue
            allowed = " or ".join(show(v) for v in (*neutral, None))
            raise ApiError(
                400, f"{name}: got {show(value)}; not supported yet, only {allowed}", param=name
            )
        if self.stream_options is not None and not self.stream:
            raise ApiError(
                400,
                'stream_options: given without streaming; set "stream": true or leave it out',
                param="stream_options",
            )

    def sampling_params(
        self, max_tokens: int, defaults: Mapping[str, float | int]
    ) -> SamplingParams:
        """Sampling parameters of this request.

        Args:
            max_tokens: already resolved.
            defaults: of fields that the request leaves out.

        Raises:
            ApiError: 400, a value is out of its range.
        """
        given = {name: getattr(self, name) for name in _SAMPLING_FIELDS}
        given["max_tokens"] = max_tokens
        said: dict[str, Any] = {k: v for k, v in given.items() if v is not None}
        try:
            return SamplingParams(**{**defaults, **said})
        except ValueError as error:
            raise request_error(error, _SAMPLING_FIELDS) from error


class CompletionRequest(_GenerationRequest):
    """Body of POST /v1/completions."""

    prompt: _PromptField


class ChatMessage(_Body):
    """One message; further fields (`name`, `reasoning_content`) reach the chat template."""

    role: _RoleField
    content: _ContentField

    def for_template(self) -> dict[str, Any]:
        """The message as the chat template sees it."""
        return self.model_dump(exclude_none=True)


class ChatCompletionRequest(_GenerationRequest):
    """Body of POST /v1/chat/completions."""

    messages: list[ChatMessage] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, description="Newer name of max_tokens.")
