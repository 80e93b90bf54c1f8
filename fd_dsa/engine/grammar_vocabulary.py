"""Vocabularies of grammars: each token as the bytes that it adds to an answer's text.

A grammar describes the decoded text. Any tokens that spell the text satisfy it: the one token of a
marker as well as several ordinary tokens.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, cast

from fd_dsa.engine.reasoning import Reasoning
from fd_dsa.engine.reasoning_tokens import ReasoningTokens
from fd_dsa.engine.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLTokenizer, TokenizerWrapper


class GrammarVocabulary:
    """Tokenizer in the form that llguidance reads, for answers that show the same special tokens.

    Args:
        tokenizer: of the model.
        size: number of token ids that the model has; others never come.
        eos_token_ids: tokens that end an output and are never part of its text.
        shown: special tokens that the text of an answer contains.

    Attributes:
        texts: bytes that each token id adds to the text; empty for hidden special tokens, ends of
            sequence and ids without a token.
        names: texts of the form <...>, which a grammar may use as names of tokens.
        ll_tokenizer: the same for llguidance, a trie of the bytes.

    Raises:
        ValueError: the tokens of this tokenizer have no bytes of their own, or llguidance refuses
            them.
    """

    # llguidance reads these
    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(
        self, tokenizer: Tokenizer, size: int, eos_token_ids: Iterable[int], shown: frozenset[int]
    ) -> None:
        from llguidance import LLTokenizer

        ends = [token_id for token_id in eos_token_ids if token_id < size]
        self.texts = tokenizer.pieces(shown)[:size]
        self.texts += [b""] * (size - len(self.texts))
        for token_id in ends:
            self.texts[token_id] = b""
        # hidden tokens keep their names, so that a grammar can ask for them as <name>
        self.special_token_ids = [
            i for i, text in enumerate(self.texts) if not text and tokenizer.piece_bytes(i)
        ]
        self.names = frozenset(
            text for text in self.texts if text[:1] == b"<" and text[-1:] == b">"
        )
        self.tokens = self.texts.copy()
        for token_id in self.special_token_ids:
            self.tokens[token_id] = tokenizer.piece_bytes(token_id)
        self.eos_token_id = ends[0] if ends else None
        self.ll_tokenizer: LLTokenizer = LLTokenizer(
            cast("TokenizerWrapper", self), eos_token=ends or None
        )
        # only the constructor reads it
        del self.tokens
        self._reasoning: dict[Reasoning, ReasoningTokens] = {}

    def __call__(self, text: str) -> list[int]:
        """Token ids that spell a text, the longest first; llguidance calls it."""
        return self.ll_tokenizer.greedy_tokenize(text)

    def spell(self, text: bytes) -> list[int] | None:
        """Token ids of a text; None if it is cut inside a character or no tokens spell it."""
        try:
            token_ids = self(text.decode())
        except UnicodeDecodeError:
            return None
        return token_ids if b"".join([self.texts[i] for i in token_ids]) == text else None

    def reasoning(self, texts: Reasoning) -> ReasoningTokens:
        """Search for the end of a reasoning; made once, in 0.1 s for a large vocabulary."""
        if texts not in self._reasoning:
            self._reasoning[texts] = ReasoningTokens(texts, self.texts)
        return self._reasoning[texts]
