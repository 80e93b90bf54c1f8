"""Control tokens of a tokenizer: where a text has their markers, and the markers as text."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterator, Mapping

import tokenizers
from tokenizers.models import WordLevel

from fd_dsa.cancellation import check_cancelled
from fd_dsa.chat.control import SEPARATOR, unused_characters
from fd_dsa.engine.text_windows import TooManyTokens, encode_text

WINDOW_CHARS = 1 << 16
"""Characters that one call searches; the call takes 70 bytes of memory for each byte."""
_NO_MARKER = "\ue000"
_SURROGATE = re.compile("[\ud800-\udfff]")


class ControlTokens:
    """Added tokens of a tokenizer that control a model.

    An added token is one unless it is not special and has neither a punctuation character nor a
    symbol: such tokens are words or runs of white space.

    Args:
        backend: the tokenizer, without truncation and padding.
    """

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        self._backend = backend
        self._added = backend.get_added_tokens_decoder()
        self._texts = {i: token.content for i, token in self._added.items() if _is_control(token)}
        self._ordinary = [token for i, token in self._added.items() if i not in self._texts]
        # the rules of added tokens without any other work: all else is one unknown word
        self._scanner = tokenizers.Tokenizer(WordLevel({_NO_MARKER: 0}, unk_token=_NO_MARKER))
        if backend.normalizer is not None:
            self._scanner.normalizer = backend.normalizer
        self._scanner.add_tokens(
            [
                *(token for _, token in sorted(self._added.items())),
                tokenizers.AddedToken(SEPARATOR, normalized=False),
            ]
        )
        # id of the scanner -> id of the tokenizer
        self._ids = {_id_of(self._scanner, text): i for i, text in self._texts.items()}
        self.longest = max(map(len, self._texts.values()), default=0)
        self._window_chars = max(WINDOW_CHARS, 8 * self.longest)

    def find(self, text: str) -> Iterator[tuple[int, int]]:
        """Places of the markers, without the white space that their flags take along."""
        return ((begin, end) for begin, end, _ in self._find(text))

    def texts_in(self, text: str) -> set[str]:
        """Distinct markers that the text has; takes less time than `find`."""
        found: set[int] = set()
        step = self._window_chars - self.longest
        for begin in range(0, max(len(text) - self.longest, 1), step):
            window = text[begin : begin + self._window_chars]
            found.update(_encode(self._scanner.encode_batch_fast, window).ids)
        return {self._texts[self._ids[i]] for i in found if i in self._ids}

    def encode(self, text: str, masked: str, max_tokens: int | None = None) -> list[int]:
        """Token ids of a text in which some markers are text.

        Args:
            text: of a prompt.
            masked: of the same length; only markers in it become control tokens.
            max_tokens: max number of ids; None = any number.

        Raises:
            TooManyTokens: there are more ids; the rest of the text is not read.
            ValueError: the text uses too many private characters, or holds a lone surrogate.
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
            # the vocabulary has the marker as a word, so that no word may be the whole marker
            quoted = [s for s in self.find(text) if masked[slice(*s)] != text[slice(*s)]]
            cuts = [(at, at, cut) for begin, end in quoted for at in range(begin, end + 1)]
            cut_id = _id_of(copy, cut)
            ids = [i for i in encode(controls + cuts, None) if i != cut_id]
            if max_tokens is not None and len(ids) > max_tokens:
                raise TooManyTokens(len(ids), is_exact=True)
        return [ids_of_copy.get(i, i) for i in ids]

    def _find(self, text: str) -> Iterator[tuple[int, int, int]]:
        """Places and ids of the markers, in order."""
        begin = 0
        while begin < len(text):
            window = text[begin : begin + self._window_chars]
            is_last = begin + len(window) == len(text)
            encoding = _encode(self._scanner.encode_batch, window)
            # a marker that begins later may be longer than the window shows
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
        """The tokenizer with other texts for control tokens, and its ids that differ.

        Args:
            names: id -> text for this control token; the other ones have none.
            cut: text of one more token.
        """
        # shares the model, which takes no time
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
        """An added token with the flags of another one."""
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
        # a batch of one gives up the GIL, encode() does not
        (encoding,) = encode_batch([text], add_special_tokens=False)
    except (TypeError, UnicodeEncodeError):
        # only the tokenizer of the whole prompt refuses half of a surrogate pair
        (encoding,) = encode_batch([_SURROGATE.sub("\ufffd", text)], add_special_tokens=False)
    return encoding


def _id_of(backend: tokenizers.Tokenizer, text: str) -> int:
    token_id = backend.token_to_id(text)
    assert token_id is not None, "an added token"
    return token_id


def _is_control(token: tokenizers.AddedToken) -> bool:
    # SentencePiece's mark of a space is a symbol by its category
    text = token.content.replace("\u2581", " ")
    return token.special or any(unicodedata.category(char)[0] in "PS" for char in text)
