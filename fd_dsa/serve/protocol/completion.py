"""Body of POST /v1/completions."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, PlainValidator, WithJsonSchema

from fd_dsa.serve.errors import show
from fd_dsa.serve.protocol.fields import IDS, TEXT, TEXTS, is_token_ids, refuse
from fd_dsa.serve.protocol.generation import GenerationRequest
from fd_dsa.serve.protocol.unsupported import IN_COMPLETIONS


def _prompt(value: Any) -> list[str | list[int]]:
    """The prompts of a completion, one entry each: text or token ids."""
    if isinstance(value, str) or is_token_ids(value):
        return [value]
    entries = value if isinstance(value, list) else []
    if entries and all(isinstance(entry, str) for entry in entries):
        return entries
    if entries and all(is_token_ids(entry) for entry in entries):
        return entries
    raise refuse(
        f"got {show(value)}; allowed is a string, a list of strings, a list of token ids or a "
        "list of lists of token ids, none of them empty"
    )


_PromptField = Annotated[
    list[str | list[int]],
    PlainValidator(_prompt),
    WithJsonSchema({"anyOf": [TEXT, TEXTS, IDS, {"type": "array", "items": IDS}]}),
]


class CompletionRequest(GenerationRequest):
    """Body of POST /v1/completions."""

    unsupported_fields = IN_COMPLETIONS

    prompt: _PromptField
    echo: bool | None = Field(None, description="Put the prompt in front of its answer.")
    logprobs: int | None = Field(
        None, description="Likeliest tokens scored beside each token of the text, 0 to 20."
    )

    @property
    def only_echo(self) -> bool:
        """True when the prompt itself is the whole answer."""
        return bool(self.echo) and self.max_tokens == 0

    def score_fields(self) -> dict[str, int | None]:
        """With echo the prompt is scored as the output is."""
        of_prompt = self.prompt_logprobs
        if self.echo and self.logprobs is not None:
            of_prompt = max(self.logprobs, of_prompt or 0)
        return {"logprobs": self.logprobs, "prompt_logprobs": of_prompt}
