"""Grammars of structured output, compiled and followed by llguidance (extra `structured`).

The rest of the engine sees three things of a matcher: a bitmask of the tokens that may come, a
token that it takes, and whether it is at its end.
"""

from __future__ import annotations

import copy
import re
import threading
import time
from collections.abc import Callable, Iterable
from concurrent import futures
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import TYPE_CHECKING
from weakref import WeakValueDictionary

import numpy as np
import numpy.typing as npt

from fd_dsa.chat.grammar import JSON_SPACE
from fd_dsa.engine.structured_outputs import Kind, StructuredOutputsParams
from fd_dsa.engine.tokenizer import Tokenizer
from fd_dsa.environment import usable_cpus

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLParserLimits, LLTokenizer
    from llguidance._lib import JsonCompileOptions

# compiled grammars that are kept for requests with the same one, each of up to 30 MB
_NUM_KEPT = 32
# for which one that nobody asks for is kept, at least; at most twice as long
_KEPT_FOR_S = 20.0
_Key = tuple[Kind, str]
_MAX_LEXER_STATES = 25_000
# what llguidance says of a lexer that has come to its limits
_WORN_OUT = ("LexerTooComplex", "InternalError")
# a grammar that was worn out sooner by fewer tokens is too complex, and compiling it costs others
_RENEWED_AFTER_TOKENS = 1000
_RENEWED_AFTER_S = 60.0
_SHOWN_ERROR_CHARS = 300
_QUOTATION = re.compile(r"^ *\d+ \| ", re.MULTILINE)
_JSON_OPTIONS: JsonCompileOptions = {"whitespace_pattern": JSON_SPACE}


@dataclass
class CompiledGrammar:
    """What outputs of one grammar share: the states that they have reached.

    Attributes:
        matcher: at the beginning of the grammar, to be copied.
        num_tokens: that its outputs have taken.
        since: `time.monotonic()` of its compilation.
    """

    matcher: LLMatcher
    num_tokens: int = 0
    since: float = field(default_factory=time.monotonic)


class GrammarMatcher:
    """Follows one output through its grammar; for the thread that steps the engine.

    Args:
        compiler: has or makes the compiled grammar, when the output is about to begin: requests
            that wait hold nothing.
    """

    def __init__(self, compiler: GrammarCompiler, params: StructuredOutputsParams) -> None:
        self._compiler = compiler
        self._params = params
        self._awaited = params.after_token_id
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
    def _matcher(self) -> LLMatcher:
        """Of llguidance, where the output stands."""
        return self._copy or self._begin(self._compiler.find(self._params))

    def _begin(self, compiled: CompiledGrammar) -> LLMatcher:
        """A copy of the compiled grammar for this output alone."""
        self._compiled = compiled
        self._copy = compiled.matcher.deep_copy()
        return self._copy

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
        return _one_line(self._matcher.get_error()) if self._matcher.is_error() else None

    def fill_bitmask(self, bitmask: npt.NDArray[np.int32]) -> None:
        """Write bit i % 32 of int32 i // 32 for every token i: 1 = may come.

        The end of sequence may come only where the grammar is complete. After an error nothing
        may come.
        """
        if self._failure is not None:
            bitmask[:] = 0
            return
        if self._awaited is not None:
            bitmask[:] = self._compiler.free[: len(bitmask)]
            return
        self._compute_mask()
        if self._matcher.is_error() and self._is_renewed():
            self._compute_mask()
        bitmask[:] = 0 if self._matcher.is_error() else self._compiler.buffer[: len(bitmask)]

    def accept(self, token_id: int) -> bool:
        """Take a token of the output; returns `is_finished`."""
        if self._awaited is None:
            self._matcher.consume_token(token_id)
            self._taken.append(token_id)
            if self._compiled is not None:
                self._compiled.num_tokens += 1
        elif token_id == self._awaited:
            self._awaited = None
        return self.is_finished

    def count_allowed(self, token_ids: list[int]) -> int:
        """How many of these tokens, the first ones, may come; nothing is taken."""
        if self._failure is not None:
            return 0
        begin = 0
        if self._awaited is not None:
            if self._awaited not in token_ids:
                return len(token_ids)
            begin = token_ids.index(self._awaited) + 1
        return begin + self._matcher.validate_tokens(token_ids[begin:])

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
        self._begin(self._compiler.find(self._params, again=True)).consume_tokens(self._taken)
        return True


class GrammarCompiler:
    """Makes matchers, and compiles their grammars beside the thread that steps the engine.

    A grammar is compiled once, when a request with it is checked, and copied from then on. Copies
    share the states that their outputs have reached, the most of what a grammar takes of memory.
    One that was dropped since, as others were asked for, is compiled again by a thread of its own
    when its output is the next to begin.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_token_ids: Iterable[int]) -> None:
        """Nothing is imported before `prepare` or the first grammar."""
        self._tokenizer = tokenizer
        self._vocab_size = max(vocab_size, tokenizer.vocab_size)
        self._eos_token_ids = sorted(eos_token_ids)
        # of all matchers, which copy their mask from it at once
        self.buffer = np.zeros(-(-self._vocab_size // 32), np.int32)
        # all but the end of sequence, which may not come before the grammar has begun
        self.free = np.full_like(self.buffer, -1)
        for token_id in self._eos_token_ids:
            self.free.view(np.uint32)[token_id // 32] &= ~np.uint32(1 << token_id % 32)
        self._lock = threading.Lock()
        self._tokenizer_lock = threading.Lock()
        self._checks = threading.BoundedSemaphore(max(1, usable_cpus() // 2))
        # asked for since `_expire` was called last, and only before; and all that outputs follow
        self._recent: dict[_Key, CompiledGrammar] = {}
        self._older: dict[_Key, CompiledGrammar] = {}
        self._in_use: WeakValueDictionary[_Key, CompiledGrammar] = WeakValueDictionary()
        self._is_expiring = False
        self._ll_tokenizer: LLTokenizer | None = None
        self._worker = ThreadPoolExecutor(1, "fd_dsa-grammar")
        # what the worker compiles, never more than one
        self._pending: tuple[_Key, Future[CompiledGrammar]] | None = None

    def prepare(self) -> None:
        """Make what all grammars need, where llguidance is installed.

        For a vocabulary of 129,280 tokens that takes half a second, in which no other thread runs.
        """
        if find_spec("llguidance") is not None:
            self._llguidance_tokenizer()

    def check(self, params: StructuredOutputsParams) -> None:
        """Compile a grammar unless it is known; for any thread but the engine's and an event loop.

        Raises:
            ValueError: it is wrong or too large, or llguidance is missing; begins with the name
                of the field.
        """
        if self._kept(params.definition()) is None:
            with self._checks:
                self.find(params)

    def find(self, params: StructuredOutputsParams, again: bool = False) -> CompiledGrammar:
        """The compiled grammar; this thread compiles it if needed, with `again` in any case.

        Raises:
            ValueError: see `check`.
        """
        key = params.definition()
        compiled = None if again else self._kept(key)
        if compiled is not None:
            return compiled
        if find_spec("llguidance") is None:
            raise ValueError(
                f"{params.source} needs llguidance, which is not installed here; pip install "
                "'fd_dsa[structured]'"
            )
        # not under the lock, which the engine's thread takes too
        matcher = self._compile(*key)
        if isinstance(matcher, str):
            raise ValueError(f"{params.source} cannot be used: {matcher}")
        compiled = CompiledGrammar(matcher)
        with self._lock:
            self._keep(key, compiled)
        return compiled

    def poll(self, params: StructuredOutputsParams) -> CompiledGrammar | None:
        """The compiled grammar, or None until the worker has made it; for the engine's thread.

        Raises:
            ValueError: see `check`.
        """
        key = params.definition()
        compiled = self._kept(key)
        if compiled is None and self._pending is not None and self._pending[1].done():
            (done, future), self._pending = self._pending, None
            compiled = future.result() if done == key else None
        if compiled is None and self._pending is None:
            self._pending = key, self._worker.submit(self.find, params)
        return compiled

    def wait(self) -> bool:
        """Block until the worker has compiled what it is at; False when it is at nothing."""
        if self._pending is None:
            return False
        futures.wait([self._pending[1]])
        return True

    def _kept(self, key: _Key) -> CompiledGrammar | None:
        """A compiled grammar that need not be made, which is now the last one asked for."""
        with self._lock:
            compiled = self._in_use.get(key)
            if compiled is not None:
                self._keep(key, compiled)
            return compiled

    def _keep(self, key: _Key, compiled: CompiledGrammar) -> None:
        """Note the last grammar asked for, and drop one for it; the caller holds the lock."""
        for kept in (self._older, self._recent):
            kept.pop(key, None)
        self._in_use[key] = self._recent[key] = compiled
        if len(self._older) + len(self._recent) > _NUM_KEPT:
            oldest = self._older or self._recent
            del oldest[next(iter(oldest))]
        if not self._is_expiring:
            self._is_expiring = True
            _later(self._expire)

    def _expire(self) -> None:
        """Drop what nobody has asked for since the call before; once more while one is kept."""
        with self._lock:
            dropped, self._older, self._recent = self._older, self._recent, {}
            self._is_expiring = bool(self._older)
            if self._is_expiring:
                _later(self._expire)
        # freed one at a time and without the lock: a large one takes milliseconds
        while dropped:
            dropped.popitem()

    def _compile(self, kind: Kind, text: str) -> LLMatcher | str:
        """A compiled grammar, or what is wrong with it."""
        from llguidance import LLMatcher, grammar_from

        try:
            if kind == "json_schema":
                grammar = LLMatcher.grammar_from_json_schema(text, defaults=_JSON_OPTIONS)
            else:
                grammar = grammar_from(kind, text)
        except (ValueError, RecursionError) as error:
            return _one_line(str(error))
        matcher = LLMatcher(self._llguidance_tokenizer(), grammar, log_level=0, limits=_limits())
        if not matcher.is_error():
            # what is too complex shows in the first mask at the latest
            buffer = np.zeros_like(self.buffer)
            matcher.unsafe_compute_mask_ptr(buffer.ctypes.data, buffer.nbytes)
        if matcher.is_error():
            return _one_line(matcher.get_error())
        return matcher

    def _llguidance_tokenizer(self) -> LLTokenizer:
        """The tokenizer as llguidance wants it; made once, which takes a second for a large one."""
        from llguidance import LLTokenizer

        with self._tokenizer_lock:
            if self._ll_tokenizer is None:
                self._ll_tokenizer = LLTokenizer(
                    self._tokenizer.to_json(),
                    n_vocab=self._vocab_size,
                    eos_token=self._eos_token_ids or None,
                )
            return self._ll_tokenizer


def _later(work: Callable[[], None]) -> None:
    """Call `work` after `_KEPT_FOR_S`, in a daemon thread."""
    timer = threading.Timer(_KEPT_FOR_S, work)
    timer.daemon = True
    timer.start()


def _limits() -> LLParserLimits:
    """Bounds of time and memory: 0.2 s and 30 MB for a grammar, 15 ms for a step.

    With a million units of initial fuel a letter that is repeated a million times takes 125 MB;
    with these, 600 fields of most formats still fit into a schema.
    """
    from llguidance import LLParserLimits

    return LLParserLimits(
        max_items_in_row=2_000,
        initial_lexer_fuel=300_000,
        step_lexer_fuel=200_000,
        step_max_items=50_000,
        max_lexer_states=_MAX_LEXER_STATES,
        max_grammar_size=100_000,
        verbose_errors=False,
    )


def _one_line(error: str) -> str:
    """An error of llguidance in one line, without the quotation of the grammar that follows it."""
    own = _QUOTATION.split(error.replace("<non-verbose/>", ""))[0]
    text = " ".join(own.split())
    return text if len(text) <= _SHOWN_ERROR_CHARS else text[:_SHOWN_ERROR_CHARS] + "..."
