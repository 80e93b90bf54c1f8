"""POST /tokenize and POST /detokenize: what the model sees of a text, and back."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import APIRouter

from fd_dsa.serve.chat_prompt import encode_conversation
from fd_dsa.serve.errors import ApiError, show
from fd_dsa.serve.prompt_text import encode_prompt
from fd_dsa.serve.protocol.tokenization import DetokenizeRequest, TokenizeRequest
from fd_dsa.serve.state import ServerState, State

router = APIRouter()


@router.post("/tokenize", summary="Token ids of a text or of a conversation")
async def tokenize(body: TokenizeRequest, state: State) -> dict[str, Any]:
    """The ids that a completion or a chat completion of the same input would begin with."""
    state.resolve_model(body.model)
    body.check_supported()
    tokens = await asyncio.to_thread(_encode, state, body)
    answer: dict[str, Any] = {
        "count": len(tokens),
        "max_model_len": state.engine.max_model_len,
        "tokens": tokens,
    }
    if body.return_token_strs:
        answer["token_strs"] = await asyncio.to_thread(state.engine.tokenizer.decode_each, tokens)
    return answer


@router.post("/detokenize", summary="Text of token ids")
async def detokenize(body: DetokenizeRequest, state: State) -> dict[str, str]:
    """The text, special tokens included; bytes that form no character become U+FFFD."""
    state.resolve_model(body.model)
    tokenizer = state.engine.tokenizer
    highest = tokenizer.vocab_size - 1
    outside = next((token for token in body.tokens if not 0 <= token <= highest), None)
    if outside is not None:
        message = f"tokens: got {show(outside)}; token ids of this model are 0 to {highest}"
        raise ApiError(400, message, param="tokens")
    return {"prompt": await asyncio.to_thread(tokenizer.decode, body.tokens, False)}


def _encode(state: ServerState, body: TokenizeRequest) -> list[int]:
    """Token ids; runs in a thread, since a long text takes a while."""
    if body.prompt is None:
        return encode_conversation(state, body)
    special = body.add_special_tokens is not False
    return encode_prompt(state, body.prompt, "prompt", add_special_tokens=special)
