"""Walks of outputs through grammars, token by token, as the engine takes them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from fd_dsa.engine.grammar import GrammarCompiler
from fd_dsa.engine.grammar_matcher import GrammarMatcher
from fd_dsa.engine.sampling_params import SamplingParams
from fd_dsa.engine.structured_outputs import StructuredOutputsParams
from fd_dsa.engine.tokenizer import Tokenizer


class Walks:
    """Outputs of one tokenizer under the masks of grammars.

    Attributes:
        compiler: of all grammars.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.size = tokenizer.highest_token_id + 1
        self.eos = tokenizer.eos_token_id
        ends = [] if self.eos is None else [self.eos]
        self.compiler = GrammarCompiler(tokenizer, self.size, ends)

    def begin(self, form: StructuredOutputsParams, **fields: Any) -> GrammarMatcher:
        """A matcher at the beginning of an output."""
        return GrammarMatcher(self.compiler, SamplingParams(structured_outputs=form, **fields))

    def allowed(self, matcher: GrammarMatcher) -> npt.NDArray[np.int64]:
        """Tokens that may come next, in order."""
        bits = np.unpackbits(self._mask(matcher).view(np.uint8), bitorder="little")
        return np.flatnonzero(bits[: self.size])

    def may_come(self, matcher: GrammarMatcher, token_id: int) -> bool:
        """Return True if a token may come next."""
        return bool(self._mask(matcher)[token_id // 32] >> token_id % 32 & 1)

    def _mask(self, matcher: GrammarMatcher) -> npt.NDArray[np.int32]:
        mask = np.zeros(-(-self.size // 32), np.int32)
        matcher.fill_bitmask(mask)
        return mask

    def take(self, matcher: GrammarMatcher, token_ids: Sequence[int]) -> int:
        """Let an output have tokens; returns how many of them the masks allow."""
        for number, token_id in enumerate(token_ids):
            if matcher.is_finished or not self.may_come(matcher, token_id):
                return number
            assert matcher.count_allowed([token_id]) == 1
            matcher.accept(token_id)
        return len(token_ids)

    def may_end(self, matcher: GrammarMatcher) -> bool:
        """Return True if the output is complete."""
        return matcher.is_finished or (self.eos is not None and self.may_come(matcher, self.eos))

    def accepts(self, form: StructuredOutputsParams, text: str, **fields: Any) -> tuple[bool, bool]:
        """Return whether the tokens of a text may come, and whether the output may end then."""
        matcher = self.begin(form, **fields)
        token_ids = self.tokenizer.encode(text, add_special_tokens=False)
        if self.take(matcher, token_ids) < len(token_ids):
            return False, False
        return True, self.may_end(matcher)

    def wander(
        self, matcher: GrammarMatcher, rng: np.random.Generator, num_tokens: int
    ) -> list[int]:
        """Random tokens of those allowed, until the output ends or is that long."""
        token_ids: list[int] = []
        while not matcher.is_finished and len(token_ids) < num_tokens:
            token_id = int(rng.choice(self.allowed(matcher)))
            assert matcher.count_allowed([token_id]) == 1
            token_ids.append(token_id)
            matcher.accept(token_id)
        return token_ids
