"""Progress of one output in its grammar."""

from __future__ import annotations

import copy
import time
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from fd_dsa.engine.grammar import CompiledGrammar, GrammarCompiler
from fd_dsa.engine.grammar_source import one_line
from fd_dsa.engine.reasoning_tokens import Reading, ReasoningTokens
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
        # place in the reasoning before the form; None = the form has begun
        self._reading: Reading | None = None
        if params.reasoning is not None:
            self._reading = Reading("start" if params.reasoning.begin else "reasoning")
        # the output so far may also be the beginning of the form
        self._is_form = True
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
        if self._failure is not None or not self._may_be_form:
            return False
        return self._matcher.is_stopped() and not self._matcher.is_error()

    @property
    def _may_be_form(self) -> bool:
        """Return True if the output so far may be the form, or its beginning."""
        reading = self._reading
        return reading is None or (reading.state == "start" and self._is_form)

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
        bitmask[:] = 0
        if self._may_be_form:
            self._fill_form(bitmask)
        elif self._reading is not None and self._reading.state == "reasoning":
            bitmask[:] = self._compiler.free[: len(bitmask)]
        if self._reading is not None:
            self._correct_before_form(bitmask, self._reading)

    def _fill_form(self, bitmask: npt.NDArray[np.int32]) -> None:
        """Allow the tokens that the form allows."""
        self._compute_mask()
        if self._matcher.is_error() and self._is_renewed():
            self._compute_mask()
        if not self._matcher.is_error():
            bitmask[:] = self._compiler.buffer[: len(bitmask)]

    def _correct_before_form(self, bitmask: npt.NDArray[np.int32], reading: Reading) -> None:
        """Allow tokens that begin the reasoning, and none that begins another form after it."""
        bits = bitmask.view(np.uint32)
        for token_id, after in self._reasoning.to_check(reading).items():
            if after.state == "answer" and after.rest is None:
                # for the form to decide
                continue
            bit = np.uint32(1 << token_id % 32)
            if not after.rest or self._may_begin_with(after.rest):
                bits[token_id // 32] |= bit
            else:
                bits[token_id // 32] &= ~bit

    def _may_begin_with(self, text: bytes) -> bool:
        """Return True if a form may begin with a text."""
        compiled, _ = self._begun
        token_ids = compiled.vocabulary.spell(text)
        return token_ids is not None and (
            compiled.matcher.validate_tokens(token_ids) == len(token_ids)
        )

    @property
    def _reasoning(self) -> ReasoningTokens:
        """Search for the end of the reasoning."""
        assert self._params.reasoning is not None, "asked before the form only"
        return self._begun[0].vocabulary.reasoning(self._params.reasoning)

    def accept(self, token_id: int) -> bool:
        """Take a token of the output; returns `is_finished`."""
        before = self._reading
        if before is None:
            self._take([token_id])
            return self.is_finished
        after = self._reasoning.read(before, token_id)
        self._reading = None if after.state == "answer" else after
        if before.state == "start" and after.state != "reasoning" and after.rest is None:
            # no reasoning has begun
            if self._is_form and after.state == "start":
                self._is_form = self._matcher.validate_tokens([token_id]) == 1
            if self._is_form:
                self._take([token_id])
        else:
            if before.state == "start" and self._taken:
                self._begin(self._begun[0])
                self._taken = []
            if after.rest is not None:
                self._take(self._begun[0].vocabulary.spell(after.rest) or [])
        return self.is_finished

    def _take(self, token_ids: list[int]) -> None:
        """Take tokens of the form."""
        for token_id in token_ids:
            self._matcher.consume_token(token_id)
        self._taken += token_ids
        if self._compiled is not None:
            self._compiled.num_tokens += len(token_ids)

    def count_allowed(self, token_ids: list[int]) -> int:
        """How many of these tokens, the first ones, may come; nothing is taken."""
        if self._failure is not None:
            return 0
        if self._reading is None:
            return self._matcher.validate_tokens(token_ids)
        ahead, bitmask = self.copy(), np.zeros_like(self._compiler.free)
        for count, token_id in enumerate(token_ids):
            if ahead._reading is None:
                return count + ahead.count_allowed(token_ids[count:])
            ahead.fill_bitmask(bitmask)
            if not bitmask[token_id // 32] >> token_id % 32 & 1:
                return count
            if ahead.accept(token_id):
                return count + 1
        return len(token_ids)

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
