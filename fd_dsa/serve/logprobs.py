"""Log-probabilities in the shapes of the OpenAI API, and in vLLM's for prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import orjson

from fd_dsa.serve.json_response import packed, packed_list, slices
from fd_dsa.serve.protocol.answers import (
    ChatLogprobs,
    ChatToken,
    CompletionLogprobs,
    PromptScore,
    ScoredToken,
)

if TYPE_CHECKING:
    from fd_dsa.engine.logprobs import TokenLogprobs
    from fd_dsa.engine.tokenizer import Tokenizer

# JSON has no infinity; vLLM's number for a token with probability 0
_LOWEST = -9999.0


def chat_logprobs(tokenizer: Tokenizer, entries: Sequence[TokenLogprobs]) -> ChatLogprobs:
    """Return `logprobs` of a chat choice or chunk, with `content` as packed JSON."""
    content = packed(_chat_content(tokenizer, part) for part in slices(entries))
    return {"content": packed_list(content), "refusal": None}


def _chat_content(tokenizer: Tokenizer, entries: Sequence[TokenLogprobs]) -> list[ChatToken]:
    def one(token_id: int, logprob: float) -> ScoredToken:
        piece = tokenizer.piece_bytes(token_id)
        return {"token": _text(piece), "logprob": max(logprob, _LOWEST), "bytes": list(piece)}

    return [
        {
            **one(entry.token_id, entry.score.logprob),
            "top_logprobs": [one(*pair) for pair in entry.score.top],
        }
        for entry in entries
    ]


_COLUMNS = ("tokens", "token_logprobs", "top_logprobs", "text_offset")


def completion_logprobs(
    tokenizer: Tokenizer,
    entries: Sequence[TokenLogprobs],
    text_offset: int = 0,
    prompt: tuple[int, Sequence[TokenLogprobs | None]] | None = None,
) -> CompletionLogprobs:
    """Return `logprobs` of a completion choice or chunk.

    Args:
        text_offset: number of characters before the output's text.
        prompt: of an echoed prompt, its first token and the scores of all its tokens. The first
            token has no score (None).
    """
    columns: dict[str, list[bytes]] = {name: [] for name in _COLUMNS}
    scored = [(entries, text_offset)]
    if prompt is not None:
        first = token_text(tokenizer, prompt[0]), None, None, 0
        for name, value in zip(_COLUMNS, first, strict=True):
            columns[name].append(packed([[value]]))
        scored.insert(0, ([entry for entry in prompt[1] if entry is not None], 0))
    for all_of, offset in scored:
        for some in slices(all_of):
            rows = [_row(tokenizer, entry, offset) for entry in some]
            for name, values in zip(_COLUMNS, zip(*rows, strict=True), strict=True):
                columns[name].append(packed([values]))
    return {
        "tokens": packed_list(*columns["tokens"]),
        "token_logprobs": packed_list(*columns["token_logprobs"]),
        "top_logprobs": packed_list(*columns["top_logprobs"]),
        "text_offset": packed_list(*columns["text_offset"]),
    }


def _row(
    tokenizer: Tokenizer, entry: TokenLogprobs, text_offset: int
) -> tuple[str, float, dict[str, float], int]:
    top = dict[str, float]()
    # the sampled token is always included, as in vLLM and the OpenAI API
    for token_id, logprob in (*entry.score.top, (entry.token_id, entry.score.logprob)):
        text = token_text(tokenizer, token_id)
        top[text] = max(logprob, top.get(text, _LOWEST))
    text = token_text(tokenizer, entry.token_id)
    return text, max(entry.score.logprob, _LOWEST), top, text_offset + entry.text_offset


def prompt_logprobs(
    tokenizer: Tokenizer, entries: Sequence[TokenLogprobs | None]
) -> orjson.Fragment:
    """Return vLLM's `prompt_logprobs`: token id -> score per position, null at the first."""
    parts = ([entry and _by_id(tokenizer, entry) for entry in part] for part in slices(entries))
    return packed_list(packed(parts))


def token_text(tokenizer: Tokenizer, token_id: int) -> str:
    """Return the text of one token, in the OpenAI API's form if its bytes are not UTF-8."""
    return _text(tokenizer.piece_bytes(token_id))


def _text(piece: bytes) -> str:
    """Decode bytes as UTF-8. Other bytes become escapes such as `bytes:\\xf0\\x9f`."""
    try:
        return piece.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in piece)


def _by_id(tokenizer: Tokenizer, entry: TokenLogprobs) -> dict[str, PromptScore]:
    """Return the scores at one position of a prompt, its own token at the front."""
    score = entry.score
    ranked = [
        (entry.token_id, score.logprob, score.rank),
        *((token_id, logprob, rank) for rank, (token_id, logprob) in enumerate(score.top, 1)),
    ]
    by_id: dict[str, PromptScore] = {}
    for token_id, logprob, rank in ranked:
        shown: PromptScore = {
            "logprob": max(logprob, _LOWEST),
            "rank": rank,
            "decoded_token": token_text(tokenizer, token_id),
        }
        by_id.setdefault(str(token_id), shown)
    return by_id
