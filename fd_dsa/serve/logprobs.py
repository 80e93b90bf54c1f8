"""Log-probabilities in the shapes of the OpenAI API, and in vLLM's for those of a prompt."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fd_dsa.engine.logprobs import TokenLogprobs
    from fd_dsa.engine.tokenizer import Tokenizer

# JSON has no infinity; vLLM's number for a token that the model excludes
_LOWEST = -9999.0


def chat_logprobs(tokenizer: Tokenizer, entries: Iterable[TokenLogprobs]) -> dict[str, Any]:
    """`logprobs` of a choice of a chat completion or of its chunk."""

    def one(token_id: int, logprob: float) -> dict[str, Any]:
        piece = tokenizer.piece_bytes(token_id)
        return {"token": _text(piece), "logprob": max(logprob, _LOWEST), "bytes": list(piece)}

    content = [
        {
            **one(entry.token_id, entry.score.logprob),
            "top_logprobs": [one(*pair) for pair in entry.score.top],
        }
        for entry in entries
    ]
    return {"content": content, "refusal": None}


def completion_logprobs(
    tokenizer: Tokenizer,
    entries: Iterable[TokenLogprobs],
    *,
    prompt: Sequence[TokenLogprobs | None] = (),
    first_token_id: int | None = None,
    text_offset: int = 0,
) -> dict[str, Any]:
    """`logprobs` of a choice of a completion or of its chunk.

    Args:
        tokenizer: for the texts of the tokens.
        entries: of the output.
        prompt: those of the prompt, where the answer repeats it.
        first_token_id: of the prompt, which has no score.
        text_offset: characters in front of the output's text.
    """
    tokens: list[str] = []
    logprobs: list[float | None] = []
    tops: list[dict[str, float] | None] = []
    offsets: list[int] = []
    if first_token_id is not None:
        tokens.append(token_text(tokenizer, first_token_id))
        logprobs.append(None)
        tops.append(None)
        offsets.append(0)
    placed = [(entry, 0) for entry in prompt if entry is not None]
    for entry, base in [*placed, *((entry, text_offset) for entry in entries)]:
        top = dict[str, float]()
        # the token itself is among them, in vLLM as in the OpenAI API
        for token_id, logprob in (*entry.score.top, (entry.token_id, entry.score.logprob)):
            text = token_text(tokenizer, token_id)
            top[text] = max(logprob, top.get(text, _LOWEST))
        tokens.append(token_text(tokenizer, entry.token_id))
        logprobs.append(max(entry.score.logprob, _LOWEST))
        tops.append(top)
        offsets.append(base + entry.text_offset)
    return {
        "tokens": tokens,
        "token_logprobs": logprobs,
        "top_logprobs": tops,
        "text_offset": offsets,
    }


def prompt_logprobs(
    tokenizer: Tokenizer, entries: Sequence[TokenLogprobs | None]
) -> list[dict[str, Any] | None]:
    """vLLM's `prompt_logprobs`: token id -> score for each position, null for the first."""
    return [None if entry is None else _by_id(tokenizer, entry) for entry in entries]


def token_text(tokenizer: Tokenizer, token_id: int) -> str:
    """The text of one token, as the OpenAI API writes it where its bytes are no text."""
    return _text(tokenizer.piece_bytes(token_id))


def _text(piece: bytes) -> str:
    """Bytes as text; those that are none as `bytes:\\xf0\\x9f`."""
    try:
        return piece.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in piece)


def _by_id(tokenizer: Tokenizer, entry: TokenLogprobs) -> dict[str, Any]:
    """The scores at one position of a prompt, the token itself first."""
    score = entry.score
    ranked = [
        (entry.token_id, score.logprob, score.rank),
        *((token_id, logprob, rank) for rank, (token_id, logprob) in enumerate(score.top, 1)),
    ]
    found: dict[str, Any] = {}
    for token_id, logprob, rank in ranked:
        shown = {
            "logprob": max(logprob, _LOWEST),
            "rank": rank,
            "decoded_token": token_text(tokenizer, token_id),
        }
        found.setdefault(str(token_id), shown)
    return found
