"""Texts that never come, as the tokens that an output is compared with in every step."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from fd_dsa.engine.tokenizer import Tokenizer


class BadWords(list[str]):
    """`SamplingParams.bad_words` with their tokens; shared by all outputs of a request.

    The server makes it of what a client sends, so that the engine's thread tokenizes nothing.

    Args:
        words: the texts.
        sequences: token ids that never come in a row, each not empty.

    Attributes:
        single: int64, tokens that are a sequence alone.
    """

    def __init__(self, words: Iterable[str], sequences: Iterable[Sequence[int]]) -> None:
        """Sort the sequences by the last token but one."""
        super().__init__(words)
        distinct = {tuple(sequence) for sequence in sequences}
        self.single = np.array([s[0] for s in distinct if len(s) == 1], np.int64)
        self._by_token: dict[int, list[tuple[int, ...]]] = {}
        for sequence in distinct:
            if len(sequence) > 1:
                self._by_token.setdefault(sequence[-2], []).append(sequence)

    @classmethod
    def of(cls, words: Sequence[str] | None, tokenizer: Tokenizer) -> BadWords | None:
        """The words with their tokens, as at the start of a text and as after a space.

        Returns:
            None without words; `words` itself where it has its tokens.

        Raises:
            ValueError: a word is not valid Unicode.
        """
        if not words:
            return None
        if isinstance(words, BadWords):
            return words
        texts = [*words, *(" " + word.lstrip() for word in words)]
        return cls(words, filter(None, tokenizer.encode_all(texts)))

    def completing(self, output: list[int]) -> list[int]:
        """Tokens that would complete a sequence of several after an output."""
        if not output:
            return []
        return [
            sequence[-1]
            for sequence in self._by_token.get(output[-1], ())
            if tuple(output[1 - len(sequence) :]) == sequence[:-1]
        ]
