"""Vocabularies of grammars: each token as the bytes that it adds to an answer's text.

A grammar describes the decoded text. Any tokens that spell the text satisfy it: the one token of a
marker as well as several ordinary tokens.
"""

from __future__ import annotations

from collections.abc import Iterable

from fd_dsa.engine.tokenizer import Tokenizer


class GrammarVocabulary:
    """Tokens of a model, for answers that show the same special tokens.

    Args:
        tokenizer: of the model.
        size: number of token ids that the model has; others never come.
        eos_token_ids: tokens that end an output and are never part of its text.
        shown: special tokens that the text of an answer contains.

    Attributes:
        texts: bytes that each token id adds to the text; empty for hidden special tokens, ends of
            sequence and ids without a token.
        tokens: the same, with the bytes of hidden special tokens.
        special_token_ids: hidden special tokens; a grammar can ask for them as <name>.
        end_token_ids: tokens that end an output.
        names: texts of the form <...>, which a grammar may use as names of tokens.

    Raises:
        ValueError: the tokens of this tokenizer have no bytes of their own.
    """

    def __init__(
        self, tokenizer: Tokenizer, size: int, eos_token_ids: Iterable[int], shown: frozenset[int]
    ) -> None:
        self._tokenizer = tokenizer
        self.end_token_ids = [token_id for token_id in eos_token_ids if token_id < size]
        self.texts = tokenizer.pieces(shown)[:size]
        self.texts += [b""] * (size - len(self.texts))
        for token_id in self.end_token_ids:
            self.texts[token_id] = b""
        self.special_token_ids = [
            i for i, text in enumerate(self.texts) if not text and tokenizer.piece_bytes(i)
        ]
        self.names = frozenset(
            text for text in self.texts if text[:1] == b"<" and text[-1:] == b">"
        )
        self.tokens = self.texts.copy()
        for token_id in self.special_token_ids:
            self.tokens[token_id] = tokenizer.piece_bytes(token_id)
        self._by_text: dict[bytes, int] = {}
        self._awaited: dict[str, AwaitedText] = {}

    def spell(self, text: bytes) -> list[int] | None:
        """Return token ids of a text, the longest first; None if no tokens spell it."""
        if not self._by_text:
            self._by_text = {text: token_id for token_id, text in enumerate(self.texts) if text}
        token_ids = []
        while text:
            # few texts are spelled, each the end of a token
            length = next((n for n in range(len(text), 0, -1) if text[:n] in self._by_text), 0)
            if not length:
                return None
            token_ids.append(self._by_text[text[:length]])
            text = text[length:]
        return token_ids

    def awaited(self, text: str) -> AwaitedText:
        """Search for a text; made once, which takes 50 ms for a large vocabulary."""
        if text not in self._awaited:
            self._awaited[text] = AwaitedText(text, self, self._tokenizer)
        return self._awaited[text]


class AwaitedText:
    """Text that an output must contain before its grammar begins, as the end of its reasoning.

    The search keeps a tail: the last bytes of the output, one fewer than the text has.

    Args:
        text: not empty.
        vocabulary: of the grammar.
        tokenizer: of the model; a hidden special token that is the text counts, too.
    """

    def __init__(self, text: str, vocabulary: GrammarVocabulary, tokenizer: Tokenizer) -> None:
        self._text = text.encode()
        self._texts = vocabulary.texts
        self._hidden = {
            i for i in vocabulary.special_token_ids if tokenizer.piece_bytes(i) == self._text
        }
        # tokens that may complete the text and have further bytes, by where in the text they begin
        self._longer: dict[int, list[int]] = {}
        ends = tuple(self._text[begin:] for begin in range(1, len(self._text)))
        for token_id, piece in enumerate(self._texts):
            if piece.startswith(ends):
                for begin, end in enumerate(ends, 1):
                    if piece.startswith(end) and piece != end:
                        self._longer.setdefault(begin, []).append(token_id)
            elif self._text in piece:
                self._longer.setdefault(0, []).append(token_id)

    def read(self, tail: bytes, token_id: int) -> tuple[bytes, bytes | None]:
        """Add a token to a tail.

        Returns:
            The new tail, and the bytes after the awaited text; None while the text is incomplete.
        """
        if token_id in self._hidden:
            return b"", b""
        text = tail + (self._texts[token_id] if token_id < len(self._texts) else b"")
        _, found, rest = text.partition(self._text)
        if found:
            return b"", rest
        return text[-len(self._text) + 1 :] if len(self._text) > 1 else b"", None

    def completing(self, tail: bytes) -> dict[int, bytes]:
        """Tokens that complete the text after a tail, and the bytes that they add after it.

        Tokens that end with the text are left out.
        """
        found = {}
        for begin, token_ids in self._longer.items():
            if tail.endswith(self._text[:begin]):
                for token_id in token_ids:
                    _, rest = self.read(tail, token_id)
                    if rest:
                        found[token_id] = rest
        return found
