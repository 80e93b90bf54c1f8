"""Texts of requests on their way to token ids: bounded in bytes and in tokens."""

from __future__ import annotations

from collections.abc import Iterable

from fd_dsa.engine.text_windows import TooManyTokens
from fd_dsa.serve.errors import ApiError, FieldError
from fd_dsa.serve.state import ServerState


def encode_prompt(
    state: ServerState, text: str, field: str, *, add_special_tokens: bool
) -> list[int]:
    """Token ids of a text, at most max_model_len; for a thread, since a long one takes a while.

    Args:
        state: tokenizer and limits.
        text: as the model sees it.
        field: of the request, that the text comes from.
        add_special_tokens: as in `Tokenizer.encode`.

    Raises:
        ApiError: 400, the text has too many bytes or tokens, or is no valid Unicode.
    """
    check_bytes(state, [text], field)
    try:
        return state.engine.tokenizer.encode(text, add_special_tokens, state.engine.max_model_len)
    except TooManyTokens as error:
        raise too_many_tokens(state, error.count, field) from error
    except ValueError as error:
        raise FieldError(f"{field}: {error}") from error


def check_bytes(state: ServerState, texts: Iterable[str], field: str) -> None:
    """Refuse texts that are together longer than --max-prompt-bytes.

    Raises:
        ApiError: 400, with both numbers.
    """
    # half of a surrogate pair has no UTF-8 form; the tokenizer refuses it
    num_bytes = sum(
        len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass"))
        for text in texts
    )
    limit = state.options.prompt_bytes(state.engine.max_model_len)
    if num_bytes > limit:
        raise FieldError(
            f"{field}: has {num_bytes} bytes of text; allowed are at most {limit}, the "
            "--max-prompt-bytes of this server; shorten the text",
            code="context_length_exceeded",
        )


def too_many_tokens(state: ServerState, num_tokens: int | str, field: str) -> ApiError:
    """The 400 of a prompt that leaves no room for an output; `num_tokens` is shown in it."""
    return ApiError(
        400,
        f"prompt has {num_tokens} tokens, max_model_len is {state.engine.max_model_len} and the "
        "output needs at least 1; shorten the prompt or start with a larger --max-model-len",
        param=field,
        code="context_length_exceeded",
    )
