"""Progress of one output in its grammar."""

from __future__ import annotations

import copy
import time
import weakref
from collections import deque

import numpy as np
import numpy.typing as npt

from fd_dsa.engine.grammar import CompiledGrammar, GrammarCompiler, form_of
from fd_dsa.engine.grammar_process import Pending
from fd_dsa.engine.sampling_params import SamplingParams
from fd_dsa.grammars.messages import Done, Work

# a grammar that was worn out sooner by fewer tokens is too complex, and compiling it costs others
_RENEWED_AFTER_TOKENS = 1000
_RENEWED_AFTER_S = 60.0


class GrammarMatcher:
    """Follows one output through its grammar; for the thread that steps the engine.

    The work is done by a worker, whose answers a step awaits for a bounded time. Until the answer
    has come, the output gets no token.

    Args:
        compiler: has or makes the compiled grammar when the output is about to begin: requests
            that wait hold nothing.
        params: of the request, with a form.
    """

    def __init__(self, compiler: GrammarCompiler, params: SamplingParams) -> None:
        self._compiler = compiler
        self._params = params
        # text that the form begins after, and the last bytes of the output until it has come
        self._after = form_of(params).after_text
        self._tail = b""
        # tokens that complete that text, and the bytes that they add after it; None = not known
        self._completing: dict[int, bytes] | None = None
        self._compiled: CompiledGrammar | None = None
        self._worn_out: CompiledGrammar | None = None
        self._output = -1
        self._failure: str | None = None
        self._taken: list[int] = []
        self._has_offered = False
        # work whose answers are not known here, and the state after the latest answer
        self._asked: deque[Pending] = deque()
        self._done = Done()
        self._is_late = False

    @property
    def is_ready(self) -> bool:
        """True if the output can begin; False while another thread compiles the grammar.

        True also if that has failed: no token may come then, and `error` has the reason.
        """
        if self._compiled is None and self._failure is None:
            try:
                compiled = self._compiler.poll(self._params, self._worn_out)
            except ValueError as error:
                self._failure = str(error)
            else:
                if compiled is None:
                    return False
                self._begin(compiled)
        return True

    @property
    def is_late(self) -> bool:
        """True if a step did not get the mask in time, and the mask has not come since."""
        if self._is_late:
            self._is_late = not self._has_mask(may_wait=False)
        return self._is_late

    def await_mask(self) -> bool:
        """Wait for the mask of the next token as long as the step may; returns if it is there."""
        self._is_late = not self._has_mask(may_wait=True)
        return not self._is_late

    def copy(self) -> GrammarMatcher:
        """Return another matcher that has taken the same tokens."""
        other = copy.copy(self)
        other._taken, other._asked = self._taken.copy(), self._asked.copy()
        if self._compiled is not None:
            other._follow(self._compiled, self._output)
        return other

    @property
    def is_finished(self) -> bool:
        """True when nothing can follow, or the end of sequence was taken."""
        while not self._has_state(may_wait=True):
            self._compiler.wait()
        return self._failure is None and self._done.is_finished

    @property
    def error(self) -> str | None:
        """Why the grammar cannot be followed any more: it is too complex, or nothing may follow."""
        self._settle()
        return self._failure or self._done.error

    def fill_bitmask(self, bitmask: npt.NDArray[np.int32]) -> None:
        """Write bit i % 32 of int32 i // 32 for every token i: 1 = may come.

        The end of sequence may come only where the grammar is complete. After an error nothing
        may come.
        """
        self._settle()
        if self._failure is not None or self._done.error is not None:
            bitmask[:] = 0
        elif self._after is not None:
            self._fill_before_form(bitmask)
        elif self._done.mask is not None:
            bitmask[:] = np.frombuffer(self._done.mask, np.int32)[: len(bitmask)]

    def _fill_before_form(self, bitmask: npt.NDArray[np.int32]) -> None:
        """Allow all tokens but those that would begin the form with a text it does not allow."""
        assert self._compiled is not None and self._completing is not None
        bitmask[:] = self._compiler.free[: len(bitmask)]
        bits = bitmask.view(np.uint32)
        for token_id, rest in self._completing.items():
            if not self._compiled.may_follow[rest]:
                bits[token_id // 32] &= ~np.uint32(1 << token_id % 32)

    def offer(self, token_id: int) -> None:
        """Have the worker take a token, without waiting for what `accept` returns."""
        self._has_offered = True
        token_ids = [token_id]
        if self._after is not None:
            self._completing = None
            self._tail, begin = self._await(self._after, self._tail, token_id)
            token_ids = begin or []
            if begin is not None:
                self._after = None
        self._taken += token_ids
        if self._compiled is not None:
            self._compiled.num_tokens += len(token_ids)
            self._take(self._compiled, token_ids)

    def accept(self, token_id: int) -> bool | None:
        """Take a token of the output, unless `offer` has.

        Returns:
            `is_finished`; None if the worker does not answer in time.
        """
        if not self._has_offered:
            self.offer(token_id)
        self._has_offered = False
        return self.is_finished if self._has_state(may_wait=True) else None

    def count_allowed(self, token_ids: list[int]) -> int:
        """Return how many of these tokens, the first ones, may come; nothing is taken.

        The number is 0 if the worker does not answer in time.
        """
        if self._failure is not None or self._compiled is None:
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
        process = self._compiled.process
        counted = (*begin, *token_ids[num_free:])
        done = self._compiler.answer(process, process.ask(Work(self._output, counted=(counted,))))
        num_allowed = 0 if done is None else done.counts[0]
        if num_allowed < len(begin):
            return num_free - 1
        return num_free + num_allowed - len(begin)

    def _await(self, after: str, tail: bytes, token_id: int) -> tuple[bytes, list[int] | None]:
        """Read a token before the form.

        Returns:
            The new tail, and tokens that spell the beginning of the form; None before that.
        """
        while self._compiled is None:
            if not self.is_ready:
                self._compiler.wait()
        vocabulary = self._compiled.vocabulary
        tail, rest = vocabulary.awaited(after).read(tail, token_id)
        # the mask allows no token with a rest that cannot be spelled
        return tail, None if rest is None else vocabulary.spell(rest) or []

    def _begin(self, compiled: CompiledGrammar) -> None:
        """Begin the output, or begin it again with the tokens that it has taken."""
        self._follow(compiled, -1)
        self._done = Done()
        if self._taken:
            self._take(compiled, self._taken)

    def _follow(self, compiled: CompiledGrammar, source: int) -> None:
        """Have the worker follow this output too, as a copy of another one."""
        self._compiled, self._output = compiled, compiled.process.copy(source)
        weakref.finalize(self, compiled.process.drop, self._output).atexit = False

    def _take(self, compiled: CompiledGrammar, token_ids: list[int]) -> None:
        """Have the worker take tokens, then compute the next mask."""
        if token_ids:
            taken = Work(self._output, token_ids=tuple(token_ids))
            for work in (taken, Work(self._output, needs_mask=True)):
                self._asked.append(compiled.process.ask(work))

    def _settle(self) -> None:
        """Wait for the mask without a bound."""
        while not self._has_mask(may_wait=True):
            self._compiler.wait()

    def _has_mask(self, may_wait: bool) -> bool:
        """Read the mask of the next token; returns if it is there, or will never be."""
        while self._has_state(may_wait):
            if self._failure is not None or self._compiled is None:
                return True
            if not self._asked:
                if self._is_renewed(self._compiled):
                    continue
                if self._done.error is not None or self._done.is_finished:
                    return True
                if self._after is not None:
                    return self._knows_completing(self._compiled, self._after, may_wait)
                if self._done.mask is not None:
                    return True
                work = Work(self._output, needs_mask=True)
                self._asked.append(self._compiled.process.ask(work))
            if not self._read(may_wait):
                return False
        return False

    def _has_state(self, may_wait: bool) -> bool:
        """Read what the worker says of the tokens taken; returns if nothing is missing."""
        if not self.is_ready:
            return False
        while self._asked and not self._asked[0].work.needs_mask:
            if not self._read(may_wait):
                return False
        return True

    def _read(self, may_wait: bool) -> bool:
        """Read one answer; returns if it has come."""
        assert self._compiled is not None
        done = self._compiler.answer(self._compiled.process, self._asked[0], may_wait)
        if done is not None:
            self._asked.popleft()
            self._done = done
        return done is not None

    def _knows_completing(self, compiled: CompiledGrammar, after: str, may_wait: bool) -> bool:
        """Find the tokens that complete the awaited text, and which of them may come."""
        if self._completing is None:
            self._completing = compiled.vocabulary.awaited(after).completing(self._tail)
        unknown = {rest for rest in self._completing.values() if rest not in compiled.may_follow}
        spelled = {rest: tuple(compiled.vocabulary.spell(rest) or ()) for rest in unknown}
        if unknown:
            work = Work(-1, counted=tuple(spelled.values()))
            done = self._compiler.answer(compiled.process, compiled.process.ask(work), may_wait)
            if done is None:
                return False
            for (rest, token_ids), count in zip(spelled.items(), done.counts, strict=True):
                compiled.may_follow[rest] = 0 < len(token_ids) == count
        return True

    def _is_renewed(self, compiled: CompiledGrammar) -> bool:
        """Start over if the states that outputs of one grammar share have reached their limit.

        That says nothing of this output, which may have reached few of them itself.
        """
        if not self._done.is_worn_out:
            return False
        age_s = time.monotonic() - compiled.since
        if compiled.num_tokens < _RENEWED_AFTER_TOKENS and age_s < _RENEWED_AFTER_S:
            return False
        self._worn_out, self._compiled = compiled, None
        return True
