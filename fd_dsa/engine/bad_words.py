"""Texts that never come, as the tokens that an output is held against in every step."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from fd_dsa.engine.tokenizer import Tokenizer


class BadSequences:
    """Token ids that never come in a row; shared by all outputs of a request.

    Args:
        sequences: each not empty.

    Attributes:
        single: int64, tokens that are a sequence alone.
    """

    def __init__(self, sequences: Iterable[Sequence[int]] = ()) -> None:
        """Sort the sequences by the last token but one."""
        distinct = {tuple(sequence) for sequence in sequences}
        self.single = np.array([s[0] for s in distinct if len(s) == 1], np.int64)
        self._by_token: dict[int, list[tuple[int, ...]]] = {}
        for sequence in distinct:
            if len(sequence) > 1:
                self._by_token.setdefault(sequence[-2], []).append(sequence)

    def completing(self, output: list[int]) -> list[int]:
        """Tokens that would complete a sequence of several after an output."""
        if not output:
            return []
        return [
            sequence[-1]
            for sequence in self._by_token.get(output[-1], ())
            if tuple(output[1 - len(sequence) :]) == sequence[:-1]
        ]


class BadWords(list[str]):
    """`SamplingParams.bad_words` with their tokens, so that the engine's thread finds none.

    Args:
        words: the texts.
        tokenizer: of the model.

    Attributes:
        sequences: tokens of every word, as at the start of a text and as after a space.

    Raises:
        ValueError: a word is no valid Unicode.
    """

    def __init__(self, words: Sequence[str], tokenizer: Tokenizer) -> None:
        super().__init__(words)
        texts = [*words, *(" " + word.lstrip() for word in words)]
        self.sequences = BadSequences(filter(None, tokenizer.encode_all(texts)))

    @classmethod
    def of(cls, words: Sequence[str] | None, tokenizer: Tokenizer) -> BadWords | None:
        """The words, tokenized unless they are; None without any."""
        if not words:
            return None
        return words if isinstance(words, BadWords) else cls(words, tokenizer)
