"""Vocabularies of grammars: each token as the bytes that it adds to an answer's text.

A grammar describes the decoded text. Any tokens that spell the text satisfy it: the one token of a
marker as well as several ordinary tokens.
"""

from __future__ import annotations

from collections.abc import Iterable

from fd_dsa.engine.reasoning import Reasoning
from fd_dsa.engine.reasoning_tokens import ReasoningTokens
from fd_dsa.engine.tokenizer import Tokenizer


class GrammarVocabulary:
    """Tokens of a model, for answers with the same special tokens in their text.

    Args:
        tokenizer: tokenizer of the model.
        size: number of token ids of the model.
        eos_token_ids: tokens that end an output and are never part of its text.
        shown: special tokens that stay in the text of an answer.

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
        self._reasoning: dict[Reasoning, ReasoningTokens] = {}

    def spell(self, text: bytes) -> list[int] | None:
        """Return token ids that spell a text, or None if no tokens do.

        Each token is the longest one that fits.
        """
        if not self._by_text:
            self._by_text = {text: token_id for token_id, text in enumerate(self.texts) if text}
        token_ids = []
        while text:
            # only a few short texts are spelled: ends of tokens
            length = next((n for n in range(len(text), 0, -1) if text[:n] in self._by_text), 0)
            if not length:
                return None
            token_ids.append(self._by_text[text[:length]])
            text = text[length:]
        return token_ids

    def reasoning(self, texts: Reasoning) -> ReasoningTokens:
        """Return the search for the end of a reasoning.

        The first call for a large vocabulary takes 0.1 s.
        """
        if texts not in self._reasoning:
            self._reasoning[texts] = ReasoningTokens(texts, self.texts)
        return self._reasoning[texts]
