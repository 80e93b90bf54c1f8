"""Progress of one output in its grammar."""

from __future__ import annotations

import copy
import time
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from fd_dsa.engine.grammar import CompiledGrammar, GrammarCompiler, form_of
from fd_dsa.engine.grammar_source import one_line
from fd_dsa.engine.sampling_params import SamplingParams

if TYPE_CHECKING:
    from llguidance import LLMatcher

# what llguidance says of a lexer that has come to its limits
_WORN_OUT = ("LexerTooComplex", "InternalError")
# a grammar that was worn out sooner by fewer tokens is too complex, and compiling it costs others
_RENEWED_AFTER_TOKENS = 1000
_RENEWED_AFTER_S = 60.0


class GrammarMatcher:
    """Follows one output through its grammar; for the thread that steps the engine.

    Args:
        compiler: has or makes the compiled grammar, when the output is about to begin: requests
            that wait hold nothing.
        params: of the request, with a form.
    """

    def __init__(self, compiler: GrammarCompiler, params: SamplingParams) -> None:
        self._compiler = compiler
        self._params = params
        # text that the form begins after, and the last bytes of the output until it has come
        self._after = form_of(params).after_text
        self._tail = b""
        self._compiled: CompiledGrammar | None = None
        self._copy: LLMatcher | None = None
        self._failure: str | None = None
        self._taken: list[int] = []

    @property
    def is_ready(self) -> bool:
        """Whether the output can begin; False while another thread compiles the grammar.

        True also where that has failed: no token may come then, and `error` has the reason.
        """
        if self._copy is None and self._failure is None:
            try:
                compiled = self._compiler.poll(self._params)
            except ValueError as error:
                self._failure = str(error)
            else:
                if compiled is None:
                    return False
                self._begin(compiled)
        return True

    @property
    def _begun(self) -> tuple[CompiledGrammar, LLMatcher]:
        """The compiled grammar, and llguidance's matcher at the current output position."""
        if self._copy is None or self._compiled is None:
            return self._begin(self._compiler.find(self._params))
        return self._compiled, self._copy

    @property
    def _matcher(self) -> LLMatcher:
        """llguidance's matcher at the current output position."""
        return self._begun[1]

    def _begin(self, compiled: CompiledGrammar) -> tuple[CompiledGrammar, LLMatcher]:
        """A copy of the compiled grammar for this output alone."""
        self._compiled = compiled
        self._copy = compiled.matcher.deep_copy()
        return compiled, self._copy

    def copy(self) -> GrammarMatcher:
        """Another one, where this one stands."""
        other = copy.copy(self)
        other._taken = self._taken.copy()
        other._copy = self._copy and self._copy.deep_copy()
        return other

    @property
    def is_finished(self) -> bool:
        """True when nothing can follow, or the end of sequence was taken."""
        if self._failure is not None:
            return False
        return self._matcher.is_stopped() and not self._matcher.is_error()

    @property
    def error(self) -> str | None:
        """Why the grammar cannot be followed any more: it is too complex, or nothing may follow."""
        if self._failure is not None:
            return self._failure
        # a copy may have met it first
        self._compute_mask()
        return one_line(self._matcher.get_error()) if self._matcher.is_error() else None

    def fill_bitmask(self, bitmask: npt.NDArray[np.int32]) -> None:
        """Write bit i % 32 of int32 i // 32 for every token i: 1 = may come.

        The end of sequence may come only where the grammar is complete. After an error nothing
        may come.
        """
        if self._failure is not None:
            bitmask[:] = 0
            return
        if self._after is not None:
            self._fill_before_form(bitmask, self._after)
            return
        self._compute_mask()
        if self._matcher.is_error() and self._is_renewed():
            self._compute_mask()
        bitmask[:] = 0 if self._matcher.is_error() else self._compiler.buffer[: len(bitmask)]

    def _fill_before_form(self, bitmask: npt.NDArray[np.int32], after: str) -> None:
        """Allow all tokens but those that would begin the form with a text it does not allow."""
        bitmask[:] = self._compiler.free[: len(bitmask)]
        compiled, matcher = self._begun
        bits = bitmask.view(np.uint32)
        for token_id, rest in compiled.vocabulary.awaited(after).completing(self._tail).items():
            token_ids = compiled.vocabulary.spell(rest)
            if token_ids is None or matcher.validate_tokens(token_ids) < len(token_ids):
                bits[token_id // 32] &= ~np.uint32(1 << token_id % 32)

    def accept(self, token_id: int) -> bool:
        """Take a token of the output; returns `is_finished`."""
        token_ids = [token_id]
        if self._after is not None:
            self._tail, begin = self._await(self._after, self._tail, token_id)
            token_ids = begin or []
            if begin is not None:
                self._after = None
        for taken in token_ids:
            self._matcher.consume_token(taken)
        self._taken += token_ids
        if self._compiled is not None:
            self._compiled.num_tokens += len(token_ids)
        return self.is_finished

    def _await(self, after: str, tail: bytes, token_id: int) -> tuple[bytes, list[int] | None]:
        """Read a token before the form.

        Returns:
            The new tail, and tokens that spell the beginning of the form; None before that.
        """
        vocabulary = self._begun[0].vocabulary
        tail, rest = vocabulary.awaited(after).read(tail, token_id)
        # the mask allows no token with a rest that cannot be spelled
        return tail, None if rest is None else vocabulary.spell(rest) or []

    def count_allowed(self, token_ids: list[int]) -> int:
        """How many of these tokens, the first ones, may come; nothing is taken."""
        if self._failure is not None:
            return 0
        begin: list[int] | None = []
        tail, num_free = self._tail, 0
        if self._after is not None:
            begin = None
            while begin is None and num_free < len(token_ids):
                tail, begin = self._await(self._after, tail, token_ids[num_free])
                num_free += 1
        if begin is None:
            return num_free
        num_allowed = self._matcher.validate_tokens(begin + token_ids[num_free:])
        if num_allowed < len(begin):
            return num_free - 1
        return num_free + num_allowed - len(begin)

    def _compute_mask(self) -> None:
        """Let llguidance write the mask into the buffer."""
        buffer = self._compiler.buffer
        self._matcher.unsafe_compute_mask_ptr(buffer.ctypes.data, buffer.nbytes)

    def _is_renewed(self) -> bool:
        """Start over where the states that outputs of one grammar share have reached their limit.

        That says nothing of this output, which may have reached few of them itself. The step waits
        for it, seldom and within the limits of a grammar.
        """
        compiled = self._compiled
        if compiled is None or self._matcher.stop_reason() not in _WORN_OUT:
            return False
        age_s = time.monotonic() - compiled.since
        if compiled.num_tokens < _RENEWED_AFTER_TOKENS and age_s < _RENEWED_AFTER_S:
            return False
        _, matcher = self._begin(self._compiler.find(self._params, again=True))
        matcher.consume_tokens(self._taken)
        return True
