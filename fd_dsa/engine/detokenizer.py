"""Incremental decoding: from token ids to whole characters, up to a stop string."""

from __future__ import annotations

import codecs
import copy
from bisect import bisect_left
from collections.abc import Sequence
from functools import partial

from fd_dsa.engine.tokenizer import Tokenizer

REPLACEMENT = "\ufffd"
# prompt tokens decoded before the first output token, because the text of a token may depend on
# its left neighbours
_CONTEXT_TOKENS = 5
# a character has at most four bytes, so this number of held tokens forms no character
_MAX_HELD_TOKENS = 16


class ByteDecoder:
    """Decodes the concatenated bytes of the tokens as UTF-8."""

    __slots__ = ("_holds_bytes", "_table", "_utf8")

    def __init__(self, table: list[bytes], context: list[int]) -> None:
        self._table = table
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._holds_bytes = False
        for token_id in context:
            self.append(token_id)

    def append(self, token_id: int) -> str:
        """Return new whole characters, which may be none."""
        table = self._table
        new = table[token_id] if token_id < len(table) else b""
        if not self._holds_bytes:
            # nearly every token consists of whole characters, and the incremental decoder takes
            # three times as long
            try:
                return new.decode()
            except UnicodeDecodeError:
                pass
        text = self._utf8.decode(new)
        self._holds_bytes = bool(self._utf8.getstate()[0])
        return text

    def flush(self) -> str:
        """Return the held bytes as U+FFFD. Call it once, at the end."""
        return self._utf8.decode(b"", final=True)

    def copy(self) -> ByteDecoder:
        """Return a copy in the same state."""
        other = ByteDecoder(self._table, [])
        other._utf8.setstate(self._utf8.getstate())
        other._holds_bytes = self._holds_bytes
        return other


class WindowDecoder:
    """Decodes the last tokens twice, without and with the new ones, and returns the difference.

    The last shown tokens are decoded again, because the text of a new token may depend on its left
    neighbours (spaces, runs of byte tokens).
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
        # a context that starts inside a character would damage the bytes after it
        while context and REPLACEMENT in self._decode(context):
            context.pop(0)
        self._ids = context
        self._num_read = len(context)
        self._prefix_text = self._decode(context)

    def append(self, token_id: int) -> str:
        """Return new whole characters, which may be none."""
        self._ids.append(token_id)
        text = self._decode(self._ids)
        held = len(self._ids) - self._num_read
        if text.endswith(REPLACEMENT) and held <= _MAX_HELD_TOKENS:
            return ""
        return self._show(text)

    def flush(self) -> str:
        """Return the text of the held tokens."""
        return self._show(self._decode(self._ids))

    def copy(self) -> WindowDecoder:
        """Return a copy in the same state."""
        other = copy.copy(self)
        other._ids = self._ids.copy()
        return other

    def _show(self, text: str) -> str:
        """Return the new text, and move the window past its tokens."""
        new_text = text[len(self._prefix_text) :]
        if new_text:
            del self._ids[: self._num_read]
            self._num_read = len(self._ids)
            self._prefix_text = self._decode(self._ids)
        elif len(self._ids) - self._num_read > _MAX_HELD_TOKENS:
            # tokens without text, such as skipped special tokens, must not accumulate
            del self._ids[self._num_read :]
        return new_text


Detokenizer = ByteDecoder | WindowDecoder


def new_detokenizer(
    tokenizer: Tokenizer,
    skip_special_tokens: bool = True,
    prompt_token_ids: Sequence[int] = (),
    kept_token_ids: frozenset[int] = frozenset(),
) -> Detokenizer:
    """Return the decoder of one output: by bytes if the tokenizer is byte-level, else by windows.

    Args:
        tokenizer: tokenizer of the model.
        skip_special_tokens: True = leave special tokens out of the text.
        prompt_token_ids: tokens before the first token. Only the last ones are decoded.
        kept_token_ids: special tokens that stay in the text in any case.

    Cost of a token: independent of the length of the text.
    """
    table = tokenizer.token_bytes
    if skip_special_tokens:
        table = tokenizer.text_token_bytes(kept_token_ids)
    context = list(prompt_token_ids[-_CONTEXT_TOKENS:])
    if table is None:
        return WindowDecoder(tokenizer, skip_special_tokens, context, kept_token_ids)
    return ByteDecoder(table, context)


class StopChecker:
    """Holds back text that may become a stop string, and cuts at the first complete one.

    The stop string that ends first counts, and the longest of several that end together. So the
    result does not depend on the pieces of the text.

    Args:
        stop_strings: non-empty strings, at least one.
        include_stop: True = show the complete stop string too.

    Cost: new text is compared with each stop string once. The checkers of a request share the
    strings.
    """

    def __init__(self, stop_strings: Sequence[str], include_stop: bool = False) -> None:
        self._include_stop = include_stop
        # strings with a common beginning are neighbours
        self._stops = sorted(stop_strings)
        self._max_held = max(map(len, stop_strings)) - 1
        self._held = ""

    def append(self, text: str) -> tuple[str, str | None]:
        """Return text to show, and the stop string if one is complete.

        A match releases all text, and ends the calls.
        """
        if not text:
            return "", None
        num_held = len(self._held)
        text = self._held + text
        self._held = ""
        stops = self._stops
        ends = []
        for stop in stops:
            # held text has no complete stop string
            first = num_held - len(stop) + 1
            start = text.find(stop, first) if first > 0 else text.find(stop)
            if start >= 0:
                ends.append((start + len(stop), start, stop))
        if ends:
            end, start, stop = min(ends)
            return text[: end if self._include_stop else start], stop
        # longer ends of the text cannot become a stop string later, so each length is tried once
        for length in range(min(self._max_held, len(text)), 0, -1):
            held = text[-length:]
            place = bisect_left(stops, held)
            if place < len(stops) and stops[place].startswith(held):
                self._held = held
                return text[:-length], None
        return text, None

    def flush(self) -> str:
        """Return the held text. Call it once, at the end."""
        held, self._held = self._held, ""
        return held
