"""Bodies of POST /tokenize and POST /detokenize, as vLLM has them."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import FailFast, Field, PlainValidator, WithJsonSchema

from fd_dsa.serve.errors import FieldError, show
from fd_dsa.serve.protocol.chat import ChatCompletionRequest, ChatMessage
from fd_dsa.serve.protocol.fields import IDS, MAX_ENTRIES, Body, at_most, refuse


class TokenizeRequest(ChatCompletionRequest):
    """Body of POST /tokenize: a text, or a conversation with all that its prompt depends on."""

    prompt: str | None = None
    messages: Annotated[list[ChatMessage], FailFast(), at_most(MAX_ENTRIES)] = Field(
        default_factory=list
    )
    add_special_tokens: bool | None = Field(
        None, description="Begin as a completion does; true for a prompt, never for messages."
    )
    return_token_strs: bool | None = Field(None, description="Add each token as a text.")

    def check_supported(self) -> None:
        """Raise ApiError 400 unless there is a prompt or there are messages, and not both."""
        if (self.prompt is None) == (not self.messages):
            got = "neither" if self.prompt is None else "both"
            raise FieldError(f"prompt: got {got} of prompt and messages; send one of them")
        super().check_supported()


def _tokens(value: Any) -> list[int]:
    """A list of integers, which may be empty."""
    if isinstance(value, list) and all(type(token) is int for token in value):
        return value
    raise refuse(f"got {show(value)}; allowed is a list of token ids")


class DetokenizeRequest(Body):
    """Body of POST /detokenize."""

    model: str | None = Field(None, description="A served name; the first one by default.")
    tokens: Annotated[list[int], PlainValidator(_tokens), WithJsonSchema(IDS)]
