"""Position of one output in its grammar."""

from __future__ import annotations

import copy
import time
import weakref

import numpy as np
import numpy.typing as npt

from fd_dsa.engine.grammar import CompiledGrammar, GrammarCompiler
from fd_dsa.engine.grammar_process import GrammarProcess, Pending
from fd_dsa.engine.reasoning_tokens import Reading
from fd_dsa.engine.sampling_params import SamplingParams
from fd_dsa.grammars.messages import Done, Work

RENEWED_AFTER_TOKENS = 1000
RENEWED_AFTER_S = 60.0
"""A grammar that reaches its limit of states earlier than both is too complex.

A grammar that reaches it later is compiled again.
"""


class GrammarMatcher:
    """Follows one output through its grammar, in the thread that steps the engine.

    A worker does the work, and a step waits for its answers for a bounded time. The output gets no
    token before the answer.

    Args:
        compiler: compiles the grammar when the output is about to begin. Waiting requests keep no
            compiled grammar.
        params: parameters of the request, with a form.
    """

    def __init__(self, compiler: GrammarCompiler, params: SamplingParams) -> None:
        self._compiler = compiler
        self._params = params
        # position in the reasoning before the form; None = the form has begun
        self._reading: Reading | None = None
        if params.reasoning is not None:
            self._reading = Reading("start" if params.reasoning.begin else "reasoning")
        # the output so far may also be the beginning of the form
        self._is_form = True
        # positions after tokens that need a check before the form; None = unknown
        self._to_check: dict[int, Reading] | None = None
        self._compiled: CompiledGrammar | None = None
        self._worn_out: CompiledGrammar | None = None
        self._output = -1
        self._failure: str | None = None
        self._taken: list[int] = []
        self._has_offered = False
        # newest work while an answer is missing, and newest answer
        self._pending: Pending | None = None
        self._done = Done()
        self._is_late = False

    @property
    def is_ready(self) -> bool:
        """True if the output can begin, False while another thread compiles the grammar.

        It is also True after a failed compilation. Then no token is allowed, and `error` has the
        reason.
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
        """True while a mask is missing that a step did not get in time."""
        if self._is_late:
            self._is_late = not self._has_mask(may_wait=False)
        return self._is_late

    def await_mask(self) -> bool:
        """Wait for the mask of the next token, as long as the step may.

        Returns:
            True if the mask has come.
        """
        self._is_late = not self._has_mask(may_wait=True)
        return not self._is_late

    def release(self) -> None:
        """Release the worker after the end of the output. Samplers may keep this object."""
        if self._compiled is not None:
            self._compiled.process.drop(self._output)
        self._compiled, self._worn_out, self._pending = None, None, None
        self._failure = self._failure or "the output has ended"

    def copy(self) -> GrammarMatcher:
        """Return another matcher at the same position."""
        other = copy.copy(self)
        other._taken = self._taken.copy()
        if self._compiled is not None:
            other._follow(self._compiled, self._output)
        return other

    @property
    def is_finished(self) -> bool:
        """True if no token can follow, or the output has its end of sequence."""
        while not self._has_state(may_wait=True):
            self._compiler.wait()
        return self._failure is None and self._may_be_form and self._done.is_finished

    @property
    def _may_be_form(self) -> bool:
        """Return True if the output so far may be the form, or its beginning."""
        reading = self._reading
        return reading is None or (reading.state == "start" and self._is_form)

    @property
    def error(self) -> str | None:
        """Reason why the output cannot continue: the grammar is too complex, or allows no token."""
        self._settle()
        return self._failure or self._done.error

    def fill_bitmask(self, bitmask: npt.NDArray[np.int32]) -> None:
        """Write the mask of the tokens that are allowed next.

        The end of sequence is allowed if the grammar is complete. After an error no token is
        allowed.

        Args:
            bitmask: int32 [ceil(vocab_size / 32)]; bit i % 32 of value i // 32 belongs to token i.
        """
        self._settle()
        bitmask[:] = 0
        if self._failure is not None:
            return
        if self._may_be_form:
            if self._done.mask is not None and self._done.error is None:
                bitmask[:] = np.frombuffer(self._done.mask, np.int32)[: len(bitmask)]
        elif self._reading is not None and self._reading.state == "reasoning":
            bitmask[:] = self._compiler.free[: len(bitmask)]
        if self._to_check is not None:
            self._correct_before_form(bitmask, self._to_check)

    def _correct_before_form(
        self, bitmask: npt.NDArray[np.int32], to_check: dict[int, Reading]
    ) -> None:
        """Allow tokens that begin the reasoning, and exclude those that begin another form."""
        assert self._compiled is not None
        bits = bitmask.view(np.uint32)
        for token_id, after in to_check.items():
            if after.state == "answer" and after.rest is None:
                # the mask of the form decides
                continue
            bit = np.uint32(1 << token_id % 32)
            if not after.rest or self._compiled.may_begin[after.rest]:
                bits[token_id // 32] |= bit
            else:
                bits[token_id // 32] &= ~bit

    def offer(self, token_id: int) -> None:
        """Give the worker a token, without waiting for the result of `accept`."""
        self._has_offered = True
        before = self._reading
        if before is None:
            self._take([token_id])
            return
        compiled = self._begun()
        assert self._params.reasoning is not None
        after = compiled.vocabulary.reasoning(self._params.reasoning).read(before, token_id)
        if before.state == "start" and after.state != "reasoning" and after.rest is None:
            # the output has not begun a reasoning
            if self._is_form and after.state == "start":
                self._is_form = self._form_allows(token_id)
            token_ids = [token_id] if self._is_form else []
        else:
            if before.state == "start" and self._taken:
                compiled.process.drop(self._output)
                self._taken = []
                self._begin(compiled)
            token_ids = compiled.vocabulary.spell(after.rest) or [] if after.rest else []
        self._reading = None if after.state == "answer" else after
        self._to_check = None
        self._take(token_ids)

    def send(self) -> None:
        """Send the collected work to an idle worker."""
        if self._compiled is not None:
            self._compiled.process.send()

    def accept(self, token_id: int) -> bool | None:
        """Append a token to the output, unless `offer` has.

        Returns:
            `is_finished`; None if the worker does not answer in time.
        """
        if not self._has_offered:
            self.offer(token_id)
        self._has_offered = False
        self._is_late = not self._has_state(may_wait=True)
        return None if self._is_late else self.is_finished

    def count_allowed(self, token_ids: list[int]) -> int:
        """Return the number of leading tokens that are allowed, without appending them.

        The number is smaller if the worker does not answer in time.
        """
        if self._failure is not None or (self._compiled is None and self._worn_out is not None):
            return 0
        if self._reading is None:
            process = self._begun().process
            work = Work(self._output, counted=(tuple(token_ids),))
            done = self._compiler.answer(process, process.ask(work))
            return 0 if done is None else done.counts[0]
        ahead, bitmask = self.copy(), np.zeros_like(self._compiler.free)
        for count, token_id in enumerate(token_ids):
            if ahead._reading is None:
                return count + ahead.count_allowed(token_ids[count:])
            if not ahead.await_mask():
                return count
            ahead.fill_bitmask(bitmask)
            if not bitmask[token_id // 32] >> token_id % 32 & 1:
                return count
            if ahead.accept(token_id) is not False:
                return count + 1
        return len(token_ids)

    def _form_allows(self, token_id: int) -> bool:
        """Return True if the form allows a token next."""
        self._settle()
        mask = self._done.mask
        return mask is not None and bool(mask[token_id // 8] >> token_id % 8 & 1)

    def _begun(self) -> CompiledGrammar:
        """Wait for the compiled grammar, and return it."""
        while self._compiled is None:
            if not self.is_ready:
                self._compiler.wait()
            elif self._failure is not None:
                raise ValueError(self._failure)
        return self._compiled

    def _begin(self, compiled: CompiledGrammar) -> None:
        """Begin the output, or begin it again with its tokens so far."""
        self._follow(compiled, -1)
        self._pending, self._done = None, Done()
        self._ask_for(compiled, self._taken)

    def _follow(self, compiled: CompiledGrammar, source: int) -> None:
        """Start to follow this output in a worker, as a copy of another output."""
        self._compiled, self._output = compiled, compiled.process.copy(source)
        finalizer = weakref.finalize(self, _drop, weakref.ref(compiled.process), self._output)
        finalizer.atexit = False

    def _take(self, token_ids: list[int]) -> None:
        """Append tokens of the form."""
        self._taken += token_ids
        if self._compiled is not None:
            self._compiled.num_tokens += len(token_ids)
            self._ask_for(self._compiled, token_ids)

    def _ask_for(self, compiled: CompiledGrammar, token_ids: list[int]) -> None:
        """Give the worker tokens, after which it computes the next mask."""
        if token_ids:
            work = Work(self._output, token_ids=tuple(token_ids), needs_mask=True)
            self._pending = compiled.process.ask(work)

    def _settle(self) -> None:
        """Wait for the mask without a bound."""
        while not self._has_mask(may_wait=True):
            self._compiler.wait()

    def _has_mask(self, may_wait: bool) -> bool:
        """Read the mask of the next token.

        Returns:
            True if the mask has come, or is not needed.
        """
        while self._has_state(may_wait):
            if self._failure is not None or self._compiled is None:
                return True
            if self._pending is None:
                if self._is_renewed(self._compiled):
                    continue
                done = self._done
                needs_mask = self._may_be_form and not done.is_finished and done.error is None
                if not needs_mask or done.mask is not None:
                    return self._knows_beginnings(self._compiled, may_wait)
                work = Work(self._output, needs_mask=True)
                self._pending = self._compiled.process.ask(work)
            if not self._read(may_wait, needs_mask=True):
                return False
        return False

    def _has_state(self, may_wait: bool) -> bool:
        """Read the state after the newest tokens, and return True if it has come."""
        return self.is_ready and (self._pending is None or self._read(may_wait, needs_mask=False))

    def _read(self, may_wait: bool, needs_mask: bool) -> bool:
        """Read an answer to the newest work, and return True if it has come."""
        assert self._compiled is not None and self._pending is not None
        process = self._compiled.process
        done = self._compiler.answer(process, self._pending, needs_mask, may_wait)
        if done is None:
            return False
        self._done = done
        if self._pending.done is done:
            self._pending = None
        return True

    def _knows_beginnings(self, compiled: CompiledGrammar, may_wait: bool) -> bool:
        """Look up the tokens that need a check before the form, and the texts that may begin it.

        Returns:
            False if the worker does not answer in time.
        """
        if self._reading is None or self._params.reasoning is None:
            return True
        if self._to_check is None:
            tokens = compiled.vocabulary.reasoning(self._params.reasoning)
            self._to_check = tokens.to_check(self._reading)
        rests = {after.rest for after in self._to_check.values() if after.rest}
        unknown = [rest for rest in rests if rest not in compiled.may_begin]
        spelled = {rest: tuple(compiled.vocabulary.spell(rest) or ()) for rest in unknown}
        if unknown:
            work = Work(-1, counted=tuple(spelled.values()))
            pending = compiled.process.ask(work)
            done = self._compiler.answer(compiled.process, pending, may_wait=may_wait)
            if done is None:
                return False
            for (rest, token_ids), count in zip(spelled.items(), done.counts, strict=True):
                compiled.may_begin[rest] = 0 < len(token_ids) == count
        return True

    def _is_renewed(self, compiled: CompiledGrammar) -> bool:
        """Compile the grammar again if its outputs have used up the states that they share.

        This output may be simple, so it continues with the new worker.

        Returns:
            False if the grammar stays.
        """
        if not self._done.is_worn_out:
            return False
        age_s = time.monotonic() - compiled.since
        if compiled.num_tokens < RENEWED_AFTER_TOKENS and age_s < RENEWED_AFTER_S:
            return False
        self._worn_out, self._compiled = compiled, None
        return True


def _drop(process: weakref.ref[GrammarProcess], output: int) -> None:
    """Drop an output from its worker, because its matcher is gone."""
    if (alive := process()) is not None:
        alive.drop(output)
