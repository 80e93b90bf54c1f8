"""From text to token ids: long texts in overlapping windows, and markers of control tokens as text.

A tokenizer splits a text into words, and computes the tokens of a word from that word only. If two
windows both begin a word at some character, they have the same tokens from there on. Only words
that the first window cuts off differ. At such a character, the seam, the ids of a window are
followed by those of the next one. The result equals the tokens of the whole text, and takes little
memory.
"""

from __future__ import annotations

import re
import threading
import unicodedata
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext

import tokenizers
from tokenizers.models import WordLevel

from fd_dsa.cancellation import check_cancelled
from fd_dsa.chat.control import SEPARATOR, unused_characters
from fd_dsa.environment import usable_cpus

WINDOW_CHARS = 32_768
"""Maximum length of a text that is tokenized in one call."""
SEARCH_CHARS = 1 << 16
"""Characters that one call searches for markers. The call takes 70 bytes of memory a byte."""
_NO_MARKER = "\ue000"
_SURROGATE = re.compile("[\ud800-\udfff]")
# Characters before the end of a window in which words may differ from those of the whole text. A
# few times the longest added token are added, because normalization may shorten it.
_MARGIN_CHARS = 64
_OVERLAP_MARGINS = 12
# number of words that two windows must have in common
_AGREED_WORDS = 4
# a window without a seam grows by this factor
_GROWTH = 8
# Limits the pieces of long texts that all threads tokenize at the same time, because the engine
# needs processors too and a text without a seam takes 200 bytes of memory a byte.
_at_once = threading.BoundedSemaphore(max(1, min(4, usable_cpus() // 2)))


class TooManyTokens(ValueError):
    """A text has more tokens than allowed.

    Args:
        num_tokens: number of tokens counted so far.
        is_exact: True if the whole text was read.

    Attributes:
        count: the number as text, such as "9 or more".
    """

    def __init__(self, num_tokens: int, is_exact: bool) -> None:
        self.num_tokens = num_tokens
        self.count = f"{num_tokens}{'' if is_exact else ' or more'}"
        super().__init__(f"the text has {self.count} tokens")


class Window:
    """Tokens of text[begin:end].

    Attributes:
        begin, end: range of characters in the whole text.
        ids: token ids.
        before, after: ids that the post-processor adds around them.
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
            # unlike encode(), a batch of one releases the GIL
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
        """Return first character and first token of each word that begins in text[low:high]."""
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
    """Return the token ids of a text, as one call for the whole text would.

    Windows without a seam grow, up to the whole text. A tokenizer without words, such as
    SentencePiece's BPE, therefore reads the whole text in one call.

    Args:
        backend: tokenizer, without truncation and padding.
        text: text of any length.
        add_special_tokens: True = apply the post-processor.
        max_tokens: maximum number of ids; None = unlimited.
        longest_added_token: length of the longest added token, characters.
        window_chars: length of a window, characters.

    Raises:
        Cancelled: the client has disconnected, which is checked before each window.
        TooManyTokens: the text has more tokens. The rest of it is not read.
        TypeError: the text has a lone surrogate.
    """
    ids: list[int] | None = None
    is_long = len(text) > window_chars
    if is_long:
        margin = _MARGIN_CHARS + 4 * longest_added_token
        ids = _encode_windows(backend, text, add_special_tokens, max_tokens, window_chars, margin)
    if ids is None:
        with _at_once if is_long else nullcontext():
            check_cancelled()
            # unlike encode(), a batch of one releases the GIL; it is also faster without offsets
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
    """Return the token ids by windows, or None if only the whole text gives them."""
    overlap = _OVERLAP_MARGINS * margin
    window_chars = max(window_chars, 2 * overlap)
    left = Window(backend, text, 0, window_chars, add_special_tokens)
    ids, after = left.before, left.after
    # first token of the left window that is not in `ids` yet
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
        # read the rest in one call if most of it would be read twice
        end = len(text) if 2 * end > len(text) else end
        wider = Window(backend, text, left.begin, end) if left.begin or end < len(text) else None
        if wider is None or wider.ids[:begin] != left.ids[:begin]:
            return None
        left = wider
    return ids + left.ids[begin:] + after if left.ids else None


def _find_seam(text: str, left: Window, right: Window, margin: int) -> tuple[int, int] | None:
    """Find a word from which two windows agree up to the margin of the left one.

    Several words must follow, with characters of more than one kind. In a run of digits, for
    example, the words may depend on the end of the run.

    Returns:
        Index of the first token of the word in each window; None without such a word.
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


class ControlTokens:
    """Added tokens of a tokenizer that control a model.

    An added token is a control token if it is special, or has a punctuation character or symbol.
    The others are words or runs of white space.

    Args:
        backend: tokenizer, without truncation and padding.

    Attributes:
        longest: length of the longest marker, characters.
    """

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        self._backend = backend
        self._added = backend.get_added_tokens_decoder()
        self._texts = {i: token.content for i, token in self._added.items() if _is_control(token)}
        self._ordinary = [token for i, token in self._added.items() if i not in self._texts]
        # scan for added tokens only; the text between them is one unknown word
        self._scanner = tokenizers.Tokenizer(WordLevel({_NO_MARKER: 0}, unk_token=_NO_MARKER))
        if backend.normalizer is not None:
            self._scanner.normalizer = backend.normalizer
        self._scanner.add_tokens(
            [
                *(token for _, token in sorted(self._added.items())),
                tokenizers.AddedToken(SEPARATOR, normalized=False),
            ]
        )
        # id in the scanner -> id in the tokenizer
        self._ids = {_id_of(self._scanner, text): i for i, text in self._texts.items()}
        self.longest = max(map(len, self._texts.values()), default=0)
        self._window_chars = max(SEARCH_CHARS, 8 * self.longest)

    def find(self, text: str) -> Iterator[tuple[int, int]]:
        """Yield the ranges of the markers, without white space that their flags include."""
        return ((begin, end) for begin, end, _ in self._find(text))

    def texts_in(self, text: str) -> set[str]:
        """Return the distinct markers in a text. Faster than `find`."""
        found: set[int] = set()
        step = self._window_chars - self.longest
        for begin in range(0, max(len(text) - self.longest, 1), step):
            window = text[begin : begin + self._window_chars]
            found.update(_encode(self._scanner.encode_batch_fast, window).ids)
        return {self._texts[self._ids[i]] for i in found if i in self._ids}

    def encode(self, text: str, masked: str, max_tokens: int | None = None) -> list[int]:
        """Return the token ids of a prompt in which some markers are text.

        Args:
            text: text of the prompt.
            masked: text of the same length; only markers in it become control tokens.
            max_tokens: maximum number of ids; None = unlimited.

        Raises:
            TooManyTokens: the text has more tokens. The rest of it is not read.
            ValueError: the text uses too many private characters, or has a lone surrogate.
        """
        written = list(self._find(masked))
        control_ids = {i for _, _, i in written}
        *stand_ins, cut = unused_characters([text], len(control_ids) + 1)
        names = dict(zip(control_ids, stand_ins, strict=True))
        copy, ids_of_copy = self._without_markers(names, cut)

        def encode(spans: list[tuple[int, int, str]], max_tokens: int | None) -> list[int]:
            pieces, last = [], 0
            for begin, end, replacement in sorted(spans):
                pieces += [text[last:begin], replacement]
                last = end
            spelled = "".join([*pieces, text[last:]])
            return encode_text(copy, spelled, False, max_tokens, longest_added_token=self.longest)

        controls = [(begin, end, names[i]) for begin, end, i in written]
        ids = encode(controls, max_tokens)
        if not (set(ids) - ids_of_copy.keys()).isdisjoint(self._texts):
            # the vocabulary has the marker as a word, so cut the quoted markers into pieces
            quoted = [s for s in self.find(text) if masked[slice(*s)] != text[slice(*s)]]
            cuts = [(at, at, cut) for begin, end in quoted for at in range(begin, end + 1)]
            cut_id = _id_of(copy, cut)
            ids = [i for i in encode(controls + cuts, None) if i != cut_id]
            if max_tokens is not None and len(ids) > max_tokens:
                raise TooManyTokens(len(ids), is_exact=True)
        return [ids_of_copy.get(i, i) for i in ids]

    def _find(self, text: str) -> Iterator[tuple[int, int, int]]:
        """Yield begin, end and id of each marker, in order."""
        begin = 0
        while begin < len(text):
            window = text[begin : begin + self._window_chars]
            is_last = begin + len(window) == len(text)
            encoding = _encode(self._scanner.encode_batch, window)
            # a marker that begins later may continue after the window
            certain = len(window) if is_last else len(window) - self.longest
            following = certain
            for i, (first, end) in zip(encoding.ids, encoding.offsets, strict=True):
                if i in self._ids and first < certain:
                    following = max(following, end)
                    marker = window[first:end].strip() or window[first:end]
                    first = window.index(marker, first)
                    yield begin + first, begin + first + len(marker), self._ids[i]
            begin += following

    def _without_markers(
        self, names: Mapping[int, str], cut: str
    ) -> tuple[tokenizers.Tokenizer, dict[int, int]]:
        """Return a copy of the tokenizer with other texts for control tokens.

        Args:
            names: id of a control token -> its text in the copy. Others are left out.
            cut: text of one more token.

        Returns:
            The copy, and its ids that differ -> ids of the tokenizer.
        """
        # the copy shares the model, so it takes no time
        copy = tokenizers.Tokenizer(self._backend.model)
        if self._backend.normalizer is not None:
            copy.normalizer = self._backend.normalizer
        if self._backend.pre_tokenizer is not None:
            copy.pre_tokenizer = self._backend.pre_tokenizer
        copy.add_tokens(self._ordinary)
        marks = [self._stand_in(i, text) for i, text in names.items()]
        copy.add_tokens([*marks, tokenizers.AddedToken(cut, normalized=False)])
        ids = {_id_of(copy, text): i for i, text in names.items()}
        for token in self._ordinary:
            ids[_id_of(copy, token.content)] = _id_of(self._backend, token.content)
        return copy, ids

    def _stand_in(self, token_id: int, text: str) -> tokenizers.AddedToken:
        """Return an added token with the flags of a control token."""
        token, normalizer = self._added[token_id], self._backend.normalizer
        # some normalizers remove private characters
        is_kept = normalizer is None or text in normalizer.normalize_str(text)
        return tokenizers.AddedToken(
            text,
            lstrip=token.lstrip,
            rstrip=token.rstrip,
            normalized=token.normalized and is_kept,
        )


def _encode(
    encode_batch: Callable[..., list[tokenizers.Encoding]], text: str
) -> tokenizers.Encoding:
    check_cancelled()
    try:
        # unlike encode(), a batch of one releases the GIL
        (encoding,) = encode_batch([text], add_special_tokens=False)
    except (TypeError, UnicodeEncodeError):
        # replace lone surrogates, which only the encoding of the whole prompt refuses
        (encoding,) = encode_batch([_SURROGATE.sub("\ufffd", text)], add_special_tokens=False)
    return encoding


def _id_of(backend: tokenizers.Tokenizer, text: str) -> int:
    token_id = backend.token_to_id(text)
    assert token_id is not None, "an added token"
    return token_id


def _is_control(token: tokenizers.AddedToken) -> bool:
    # by its category, SentencePiece's mark of a space is a symbol
    text = token.content.replace("\u2581", " ")
    return token.special or any(unicodedata.category(char)[0] in "PS" for char in text)
