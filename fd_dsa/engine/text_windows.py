"""Token ids of a long text from overlapping windows: the same as of the whole, in little memory.

A tokenizer cuts a text into words by rules that look at the text from one word on, and makes the
tokens of a word from the word alone. So two windows that both begin a word at some character have
the same tokens from there on, but for words whose end the first window does not show. The ids of
one window are followed by those of the next from such a character, the seam.
"""

from __future__ import annotations

import threading
import unicodedata
from bisect import bisect_left
from contextlib import nullcontext

import tokenizers

from fd_dsa.cancellation import check_cancelled
from fd_dsa.environment import usable_cpus

WINDOW_CHARS = 32_768
"""Longest text that is tokenized in one call."""
# characters before the end of a window in which a word may be another one than in the whole text,
# with a few times the longest added token, which normalization may shorten
_MARGIN_CHARS = 64
_OVERLAP_MARGINS = 12
# words on which two windows must agree
_AGREED_WORDS = 4
# a window without a seam, as one without words, grows by this factor
_GROWTH = 8
# pieces of long texts that all threads tokenize at once; the engine needs processors too, and a
# text without a seam takes 200 bytes of memory a byte
_at_once = threading.BoundedSemaphore(max(1, min(4, usable_cpus() // 2)))


class TooManyTokens(ValueError):
    """A text has more tokens than it may.

    Args:
        num_tokens: counted so far.
        is_exact: whether the text was read to its end.

    Attributes:
        count: the number in words.
    """

    def __init__(self, num_tokens: int, is_exact: bool) -> None:
        self.num_tokens = num_tokens
        self.count = f"{num_tokens}{'' if is_exact else ' or more'}"
        super().__init__(f"the text has {self.count} tokens")


class Window:
    """Tokens of text[begin:end].

    Attributes:
        ids: token ids.
        before, after: the ids that the post-processor puts around them.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        text: str,
        begin: int,
        end: int,
        add_special_tokens: bool = False,
    ) -> None:
        self.begin = begin
        self.end = min(end, len(text))
        with _at_once:
            check_cancelled()
            # a batch of one gives up the GIL, encode() does not
            (encoding,) = backend.encode_batch(
                [text[begin:end]], add_special_tokens=add_special_tokens
            )
        ids = encoding.ids
        own = slice(0, len(ids))
        if add_special_tokens:
            places = [i for i, sequence in enumerate(encoding.sequence_ids) if sequence is not None]
            own = slice(places[0], places[-1] + 1) if places else slice(0, 0)
        self.before, self.ids, self.after = ids[: own.start], ids[own], ids[own.stop :]
        self._offsets = encoding.offsets[own]
        self._word_ids = encoding.word_ids[own]

    def words(self, low: int, high: int) -> list[tuple[int, int]]:
        """First character and first token of each word that begins in text[low:high]."""
        offsets, word_ids = self._offsets, self._word_ids
        first = bisect_left(offsets, (low - self.begin,))
        last = bisect_left(offsets, (high - self.begin,))
        return [
            (self.begin + offsets[i][0], i)
            for i in range(first, last)
            if i == 0 or word_ids[i] != word_ids[i - 1]
        ]


def encode_text(
    backend: tokenizers.Tokenizer,
    text: str,
    add_special_tokens: bool,
    max_tokens: int | None = None,
    *,
    longest_added_token: int = 0,
    window_chars: int = WINDOW_CHARS,
) -> list[int]:
    """Token ids of a text, equal to those of one call for all of it.

    Where windows find no seam, they grow, up to the whole text: a tokenizer without words, as
    SentencePiece's BPE, reads all of it at once.

    Args:
        backend: the tokenizer, without truncation and padding.
        text: any length.
        add_special_tokens: apply the post-processor.
        max_tokens: most ids; None = any number.
        longest_added_token: characters of the longest token beside the vocabulary.
        window_chars: characters of a window.

    Raises:
        Cancelled: the client has left; checked before each window.
        TooManyTokens: there are more; the rest of the text is not read.
        TypeError: the text holds a lone surrogate.
    """
    ids: list[int] | None = None
    is_long = len(text) > window_chars
    if is_long:
        margin = _MARGIN_CHARS + 4 * longest_added_token
        ids = _encode_windows(backend, text, add_special_tokens, max_tokens, window_chars, margin)
    if ids is None:
        with _at_once if is_long else nullcontext():
            check_cancelled()
            # a batch of one gives up the GIL, encode() does not; without offsets it is faster too
            (encoding,) = backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        ids = encoding.ids
    if max_tokens is not None and len(ids) > max_tokens:
        raise TooManyTokens(len(ids), is_exact=True)
    return ids


def _encode_windows(
    backend: tokenizers.Tokenizer,
    text: str,
    add_special_tokens: bool,
    max_tokens: int | None,
    window_chars: int,
    margin: int,
) -> list[int] | None:
    """Token ids by windows; None where only one of the whole text would do."""
    overlap = _OVERLAP_MARGINS * margin
    window_chars = max(window_chars, 2 * overlap)
    left = Window(backend, text, 0, window_chars, add_special_tokens)
    ids, after = left.before, left.after
    # the first token of the left window that no other has made
    begin = 0
    while left.ids and left.end < len(text):
        start = left.end - overlap
        right = Window(backend, text, start, start + window_chars)
        seam = _find_seam(text, left, right, margin)
        if seam is not None:
            ids += left.ids[begin : seam[0]]
            if max_tokens is not None and len(ids) > max_tokens:
                raise TooManyTokens(len(ids), is_exact=False)
            left, begin = right, seam[1]
            continue
        end = left.begin + _GROWTH * (left.end - left.begin)
        # the rest at once rather than the most of it twice
        end = len(text) if 2 * end > len(text) else end
        wider = Window(backend, text, left.begin, end) if left.begin or end < len(text) else None
        if wider is None or wider.ids[:begin] != left.ids[:begin]:
            return None
        left = wider
    return ids + left.ids[begin:] + after if left.ids else None


def _find_seam(text: str, left: Window, right: Window, margin: int) -> tuple[int, int] | None:
    """Where two windows agree from there to the margin of the left one.

    Returns:
        The tokens of both that begin the same word; None without a place that is beyond doubt:
        after it are several words, and not of one kind of character alone, as in a run of
        digits, whose groups may follow from where the run ends.
    """
    mine = left.words(right.begin, left.end - margin + 1)
    theirs = right.words(right.begin, left.end - margin + 1)
    i, j = len(mine) - 1, len(theirs) - 1
    if i < 0 or j < 1 or mine[i][0] != theirs[j][0]:
        return None
    # the first word of the right window may begin before it
    while i > 0 and j > 1 and mine[i - 1][0] == theirs[j - 1][0]:
        ids = left.ids[mine[i - 1][1] : mine[i][1]]
        if ids != right.ids[theirs[j - 1][1] : theirs[j][1]]:
            break
        i, j = i - 1, j - 1
    kinds = {unicodedata.category(char)[0] for char in text[mine[i][0] : left.end]}
    if len(mine) - 1 - i < _AGREED_WORDS or len(kinds) == 1:
        return None
    return mine[i][1], theirs[j][1]
