"""Token ids to text as they come: whole characters only, and nothing of a stop string."""

from __future__ import annotations

import codecs
import copy
from bisect import bisect_left
from collections.abc import Sequence
from functools import partial

from fd_dsa.engine.tokenizer import Tokenizer

REPLACEMENT = "\ufffd"
# prompt tokens read before the first output token, so that a space or a character that depends
# on its left neighbour is decoded as inside the whole text
_CONTEXT_TOKENS = 5
# a character has at most four bytes; more held tokens than this are no character to come
_MAX_HELD_TOKENS = 16


class ByteDecoder:
    """Concatenated bytes of the tokens, decoded as UTF-8."""

    __slots__ = ("_holds_bytes", "_table", "_utf8")

    def __init__(self, table: list[bytes], context: list[int]) -> None:
        self._table = table
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._holds_bytes = False
        for token_id in context:
            self.append(token_id)

    def append(self, token_id: int) -> str:
        """New whole characters; empty while one is incomplete."""
        table = self._table
        new = table[token_id] if token_id < len(table) else b""
        if not self._holds_bytes:
            # nearly every token is whole characters; the incremental decoder takes three times
            # as long
            try:
                return new.decode()
            except UnicodeDecodeError:
                pass
        text = self._utf8.decode(new)
        self._holds_bytes = bool(self._utf8.getstate()[0])
        return text

    def flush(self) -> str:
        """Held bytes as U+FFFD; call it once, at the end."""
        return self._utf8.decode(b"", final=True)

    def copy(self) -> ByteDecoder:
        """A copy in the same state."""
        other = ByteDecoder(self._table, [])
        other._utf8.setstate(self._utf8.getstate())
        other._holds_bytes = self._holds_bytes
        return other


class WindowDecoder:
    """Difference between two decodings of the last tokens.

    tokens[:read] have been shown; tokens[prefix:read] are decoded again in front of the new ones,
    because a token's text may depend on its left neighbours (spaces, runs of byte tokens).
    """

    __slots__ = ("_decode", "_ids", "_num_read", "_prefix_text")

    def __init__(
        self,
        tokenizer: Tokenizer,
        skip_special: bool,
        context: list[int],
        kept: frozenset[int],
    ) -> None:
        self._decode = partial(tokenizer.decode, skip_special_tokens=skip_special, kept=kept)
        # a context that starts inside a character would spoil the run of bytes after it
        while context and REPLACEMENT in self._decode(context):
            context.pop(0)
        self._ids = context
        self._num_read = len(context)
        self._prefix_text = self._decode(context)

    def append(self, token_id: int) -> str:
        """New whole characters."""
        self._ids.append(token_id)
        text = self._decode(self._ids)
        held = len(self._ids) - self._num_read
        if text.endswith(REPLACEMENT) and held <= _MAX_HELD_TOKENS:
            return ""
        return self._show(text)

    def flush(self) -> str:
        """Held tokens as they decode now."""
        return self._show(self._decode(self._ids))

    def copy(self) -> WindowDecoder:
        """A copy in the same state."""
        other = copy.copy(self)
        other._ids = self._ids.copy()
        return other

    def _show(self, text: str) -> str:
        """Move the window past the shown tokens, unless they have no text yet."""
        new_text = text[len(self._prefix_text) :]
        if new_text:
            del self._ids[: self._num_read]
            self._num_read = len(self._ids)
            self._prefix_text = self._decode(self._ids)
        elif len(self._ids) - self._num_read > _MAX_HELD_TOKENS:
            # tokens without text, such as skipped special ones, must not pile up
            del self._ids[self._num_read :]
        return new_text


Detokenizer = ByteDecoder | WindowDecoder


def new_detokenizer(
    tokenizer: Tokenizer,
    skip_special_tokens: bool = True,
    prompt_token_ids: Sequence[int] = (),
    kept_token_ids: frozenset[int] = frozenset(),
) -> Detokenizer:
    """What makes text of an output token by token, without ever showing half a character.

    Byte-level tokenizers take a direct way through the tokens' bytes; others decode a small
    window of tokens twice and show the difference.

    Args:
        skip_special_tokens: leave special tokens out of the text.
        prompt_token_ids: what comes before the first token; only its end is read.
        kept_token_ids: special tokens that stay in the text nevertheless.

    Cost: one token costs the same however long the text is.
    """
    table = tokenizer.token_bytes
    if skip_special_tokens:
        table = tokenizer.text_token_bytes(kept_token_ids)
    context = list(prompt_token_ids[-_CONTEXT_TOKENS:])
    if table is None:
        return WindowDecoder(tokenizer, skip_special_tokens, context, kept_token_ids)
    return ByteDecoder(table, context)


class StopChecker:
    """Holds back text that may become a stop string and cuts at the first one completed.

    Of several stop strings the one whose end comes first wins, and of those that end together
    the longest: so the result does not depend on how the text is cut into pieces.

    Args:
        stop_strings: non-empty strings, at least one.
        include_stop: show the completed stop string too.

    Cost: new text is compared with each stop string once, whatever is held back; memory is that
    of the strings, which all checkers share.
    """

    def __init__(self, stop_strings: Sequence[str], include_stop: bool = False) -> None:
        """Sort the strings, so that those with a common beginning are neighbours."""
        self._include_stop = include_stop
        self._stops = sorted(stop_strings)
        self._max_held = max(map(len, stop_strings)) - 1
        self._held = ""

    def append(self, text: str) -> tuple[str, str | None]:
        """Text that may be shown, and the stop string when one is complete.

        After a match nothing is held back and nothing must be appended any more.
        """
        if not text:
            return "", None
        num_held = len(self._held)
        text = self._held + text
        self._held = ""
        stops = self._stops
        ends = []
        for stop in stops:
            # what was held back holds no whole stop string in it
            first = num_held - len(stop) + 1
            start = text.find(stop, first) if first > 0 else text.find(stop)
            if start >= 0:
                ends.append((start + len(stop), start, stop))
        if ends:
            end, start, stop = min(ends)
            return text[: end if self._include_stop else start], stop
        # all lengths that fail here are never tried again, as nothing held back can grow longer
        for length in range(min(self._max_held, len(text)), 0, -1):
            held = text[-length:]
            place = bisect_left(stops, held)
            if place < len(stops) and stops[place].startswith(held):
                self._held = held
                return text[:-length], None
        return text, None

    def flush(self) -> str:
        """The text held back; call it once, at the end."""
        held, self._held = self._held, ""
        return held
