"""POST /tokenize and POST /detokenize: between text and the token ids of the model."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Request
from pydantic import FailFast, Field
from starlette.responses import Response

# pydantic reads only this TypedDict before Python 3.12
from typing_extensions import NotRequired, TypedDict

from fd_dsa.serve.body import BodyRoute
from fd_dsa.serve.chat_prompt import encode_conversation
from fd_dsa.serve.errors import FieldError, show
from fd_dsa.serve.generation import encode_prompt
from fd_dsa.serve.json_response import JsonResponse, packed, packed_list, slices
from fd_dsa.serve.protocol.answers import PackedIds, PackedTexts
from fd_dsa.serve.protocol.chat import ChatCompletionRequest, ChatMessage
from fd_dsa.serve.protocol.fields import MAX_ENTRIES, Body, at_most
from fd_dsa.serve.protocol.translation import TranslatedRequest
from fd_dsa.serve.state import ServerState, State


class TokenizeRequest(ChatCompletionRequest, json_schema_extra={"examples": [{"prompt": "Hello"}]}):
    """Body of POST /tokenize: a text, or a conversation with its prompt's options."""

    prompt: str | None = None
    messages: Annotated[list[ChatMessage], FailFast(), at_most(MAX_ENTRIES)] = Field(
        default_factory=list
    )
    add_special_tokens: bool | None = Field(
        None, description="Begin as a completion does; true for a prompt, never for messages."
    )
    return_token_strs: bool | None = Field(None, description="Add each token as a text.")

    def check_supported(self) -> None:
        """Raise ApiError 400 unless exactly one of `prompt` and `messages` is set."""
        if (self.prompt is None) == (not self.messages):
            got = "neither" if self.prompt is None else "both"
            raise FieldError(f"prompt: got {got} of prompt and messages; send one of them")
        super().check_supported()


class DetokenizeRequest(Body, json_schema_extra={"examples": [{"tokens": [72, 101]}]}):
    """Body of POST /detokenize."""

    model: str | None = Field(None, description="A served name; the first one by default.")
    tokens: Annotated[list[int], FailFast()]


class Tokenized(TypedDict):
    """Token ids of an input."""

    count: int
    max_model_len: int
    tokens: PackedIds
    token_strs: NotRequired[PackedTexts]


class Detokenized(TypedDict):
    """Text of token ids."""

    prompt: str


router = APIRouter(route_class=BodyRoute)


@router.post(
    "/tokenize",
    summary="Token ids of a text or of a conversation",
    response_model=Tokenized,
)
async def tokenize(body: TokenizeRequest, request: Request, state: State) -> Response:
    """Return the prompt's token ids for a completion or chat completion of this input."""
    state.resolve_model(body.model)
    return await state.prompt_workers.run(_tokenize, state, body, request=request)


async def count_prompt_tokens(body: TranslatedRequest, request: Request, state: ServerState) -> int:
    """Count the tokens of the prompt that a request of another API would have."""
    state.check_available()
    state.resolve_model(body.model)
    with body.own_names():
        run = state.prompt_workers.run
        return len(await run(encode_conversation, state, body.chat, request=request))


@router.post("/detokenize", summary="Text of token ids", response_model=Detokenized)
async def detokenize(body: DetokenizeRequest, request: Request, state: State) -> Response:
    """Return the text with special tokens. Bytes that form no character become U+FFFD."""
    state.resolve_model(body.model)
    return await state.prompt_workers.run(_detokenize, state, body.tokens, request=request)


def _tokenize(state: ServerState, body: TokenizeRequest) -> Response:
    """Return the answer to /tokenize. Slow for a long text, so it runs in a thread."""
    if body.prompt is None:
        tokens = encode_conversation(state, body)
    else:
        special = body.add_special_tokens is not False
        tokens = encode_prompt(state, body.prompt, "prompt", add_special_tokens=special)
    answer: Tokenized = {
        "count": len(tokens),
        "max_model_len": state.engine.max_model_len,
        "tokens": packed_list(packed(slices(tokens))),
    }
    if body.return_token_strs:
        texts = state.engine.tokenizer.decode_each(tokens)
        answer["token_strs"] = packed_list(packed(slices(texts)))
    return JsonResponse(answer)


def _detokenize(state: ServerState, tokens: list[int]) -> Response:
    limit = state.engine.max_model_len
    if len(tokens) > limit:
        raise FieldError(
            f"tokens: has {len(tokens)} entries; at most max_model_len, {limit}, are allowed"
        )
    tokenizer = state.engine.tokenizer
    highest = tokenizer.highest_token_id
    outside = next((token for token in tokens if not 0 <= token <= highest), None)
    if outside is not None:
        raise FieldError(f"tokens: got {show(outside)}; token ids of this model are 0 to {highest}")
    answer: Detokenized = {"prompt": tokenizer.decode(tokens, False)}
    return JsonResponse(answer)
