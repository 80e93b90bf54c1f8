"""Compiled grammars of structured output, each in a worker process (extra `structured`)."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable
from concurrent import futures
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib.util import find_spec
from weakref import WeakSet, WeakValueDictionary

import numpy as np

from fd_dsa.commands import extra_command
from fd_dsa.engine.grammar_process import (
    WORKERS,
    GrammarProcess,
    Patience,
    Pending,
    wait_for_any,
)
from fd_dsa.engine.grammar_vocabulary import GrammarVocabulary
from fd_dsa.engine.sampling_params import SamplingParams
from fd_dsa.engine.structured_outputs import StructuredOutputsParams
from fd_dsa.engine.tokenizer import Tokenizer
from fd_dsa.environment import usable_cpus
from fd_dsa.grammars.messages import Done, Kind
from fd_dsa.grammars.source import one_line

MAX_KEPT = 32
"""Compiled grammars that are kept for later requests."""
KEPT_FOR_S = 20.0
"""Unused grammars are evicted after one to two of these periods, seconds."""
MAX_LEXER_STATES = 25_000
"""States of a grammar's lexer, above which it is too complex."""
# of a form and its alternatives, and the special tokens that the text shows
_Key = tuple[tuple[tuple[Kind, str], ...], frozenset[int]]
# time for which steps wait for all grammars: at once, seconds, and as a share of all time
_PATIENCE_S, _PATIENCE_SHARE = 0.1, 0.25
# at most this long the engine's thread waits for grammars if it has nothing else to do, seconds
_IDLE_WAIT_S = 0.05

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class CompiledGrammar:
    """Worker of a grammar, which the outputs of the grammar share.

    Attributes:
        process: the worker, which keeps the states that outputs have reached.
        vocabulary: tokens of the outputs.
        may_begin: True for texts with which an output may begin, by those asked for.
        num_tokens: number of tokens that the outputs have taken.
        since: `time.monotonic()` of the compilation.
    """

    process: GrammarProcess
    vocabulary: GrammarVocabulary
    may_begin: dict[bytes, bool] = field(default_factory=dict)
    num_tokens: int = 0
    since: float = field(default_factory=time.monotonic)


class GrammarCompiler:
    """Has grammars compiled and followed by workers, and bounds the time that steps wait for them.

    A grammar is compiled once, when a request with it is checked. All of its outputs share a
    worker. A grammar that was dropped since, as others were asked for, is compiled again when its
    output is the next to begin.

    Args:
        tokenizer, vocab_size, eos_token_ids: of the model.
        is_patient: True to wait for workers without a bound.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        vocab_size: int,
        eos_token_ids: Iterable[int],
        is_patient: bool = True,
    ) -> None:
        """Nothing is imported before `prepare` or the first grammar."""
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._eos_token_ids = sorted(i for i in eos_token_ids if i < vocab_size)
        # all but the end of sequence, which may not come before the grammar has begun
        self.free = np.full(-(-vocab_size // 32), -1, np.int32)
        for token_id in self._eos_token_ids:
            self.free.view(np.uint32)[token_id // 32] &= ~np.uint32(1 << token_id % 32)
        self._lock = threading.Lock()
        self._vocabulary_lock = threading.Lock()
        self._checks = threading.BoundedSemaphore(max(1, usable_cpus() // 2))
        # asked for since `expire` was called last, and only before; and all that outputs follow
        self._recent: dict[_Key, CompiledGrammar] = {}
        self._older: dict[_Key, CompiledGrammar] = {}
        self._in_use: WeakValueDictionary[_Key, CompiledGrammar] = WeakValueDictionary()
        self._is_expiring = False
        # by the special tokens that the text shows; or the reason why there is none
        self._vocabularies: dict[frozenset[int], GrammarVocabulary | str] = {}
        self._worker = ThreadPoolExecutor(1, "fd_dsa-grammar")
        # what the worker compiles, never more than one
        self._pending: tuple[_Key, Future[None]] | None = None
        self._patience = None if is_patient else Patience(_PATIENCE_S, _PATIENCE_SHARE)
        # workers for which a step did not wait any longer
        self._late: WeakSet[GrammarProcess] = WeakSet()

    def prepare(self) -> None:
        """Make the vocabulary of most grammars if llguidance is installed.

        A tokenizer that cannot be used is logged. For 129,280 tokens this takes a second.
        """
        if find_spec("llguidance") is None:
            return
        vocabulary = self._vocabulary(frozenset())
        if isinstance(vocabulary, str):
            logger.warning(
                "structured output and forced tool calls are off: %s; requests for them get a 400",
                vocabulary,
            )

    def check(self, params: SamplingParams) -> None:
        """Compile a grammar unless it is known; for any thread but the engine's and an event loop.

        Raises:
            ValueError: it is wrong or too large, llguidance is missing, or the tokenizer cannot be
                used; begins with the name of the field.
        """
        compiled = self._kept(self._key(params))
        if compiled is None:
            with self._checks:
                compiled = self.find(params)
        if params.reasoning is not None:
            compiled.vocabulary.reasoning(params.reasoning)

    def find(
        self, params: SamplingParams, instead_of: CompiledGrammar | None = None
    ) -> CompiledGrammar:
        """Return the compiled grammar; this thread waits for its compilation if needed.

        Args:
            instead_of: a compiled grammar that is worn out.

        Raises:
            ValueError: see `check`.
        """
        form, key = form_of(params), self._key(params)
        compiled = self._kept(key)
        if compiled is not None and compiled is not instead_of:
            return compiled
        if find_spec("llguidance") is None:
            raise ValueError(
                f"{form.source} needs llguidance, which is not installed here; "
                f"{extra_command('structured')}"
            )
        # not under the lock, which the engine's thread takes too
        made = self._compile(*key)
        if isinstance(made, str):
            raise ValueError(self._blame(form, key[1], made))
        with self._lock:
            self._keep(key, made)
        return made

    def poll(
        self, params: SamplingParams, instead_of: CompiledGrammar | None = None
    ) -> CompiledGrammar | None:
        """Return the compiled grammar, or None until it is made; for the engine's thread.

        Raises:
            ValueError: see `check`.
        """
        key = self._key(params)
        if self._pending is not None and self._pending[1].done():
            (done, future), self._pending = self._pending, None
            if done == key:
                # the error, if there is one
                future.result()
        compiled = self._kept(key)
        if compiled is instead_of:
            compiled = None
        if compiled is None and self._pending is None:
            self._pending = key, self._worker.submit(self._make, params, instead_of)
        return compiled

    def _make(self, params: SamplingParams, instead_of: CompiledGrammar | None) -> None:
        """Have a grammar compiled and kept; the result of a thread would hold it for longer."""
        self.find(params, instead_of)

    def answer(
        self,
        process: GrammarProcess,
        pending: Pending,
        needs_mask: bool = False,
        may_wait: bool = True,
    ) -> Done | None:
        """Return the answer of a worker, or None if the step may not wait for it any longer.

        Steps wait for a bounded share of all time, and half of it for one grammar. So a slow
        grammar soon delays no other request.
        """
        if (known := pending.done if needs_mask else pending.state) is not None:
            return known
        timeout_s = None if may_wait else 0.0
        if may_wait and self._patience is not None:
            timeout_s = min(self._patience.left_s(), process.patience.left_s())
        begin_s = time.monotonic()
        done = process.answer(pending, needs_mask, timeout_s)
        waited_s = time.monotonic() - begin_s
        if self._patience is not None:
            self._patience.spend(waited_s)
            process.patience.spend(waited_s)
        if done is None:
            self._late.add(process)
            process.give_way()
        return done

    def wait(self) -> bool:
        """Block until a grammar is compiled or a late mask has come, for a while at most.

        Returns:
            False if there is nothing to wait for.
        """
        late = list(self._late)
        busy = [process for process in late if process.is_busy]
        self._late = WeakSet(busy)
        if len(busy) < len(late):
            return True
        if busy:
            wait_for_any(busy, _IDLE_WAIT_S)
        elif self._pending is not None:
            futures.wait([self._pending[1]], _IDLE_WAIT_S)
        return bool(busy) or self._pending is not None

    def _kept(self, key: _Key) -> CompiledGrammar | None:
        """A compiled grammar that need not be made, which is now the last one asked for."""
        with self._lock:
            compiled = self._in_use.get(key)
            if compiled is None or compiled.process.has_ended:
                return None
            self._keep(key, compiled)
            return compiled

    def _keep(self, key: _Key, compiled: CompiledGrammar) -> None:
        """Note the last grammar asked for, and drop one for it; the caller holds the lock."""
        for kept in (self._older, self._recent):
            kept.pop(key, None)
        self._in_use[key] = self._recent[key] = compiled
        if len(self._older) + len(self._recent) > MAX_KEPT:
            oldest = self._older or self._recent
            del oldest[next(iter(oldest))]
        if not self._is_expiring:
            self._is_expiring = True
            _later(self.expire)

    def expire(self) -> None:
        """Drop the grammars that no request has asked for since the last call.

        The compiler calls it every `KEPT_FOR_S` seconds while it keeps a grammar.
        """
        with self._lock:
            dropped, self._older, self._recent = self._older, self._recent, {}
            self._is_expiring = bool(self._older)
            if self._is_expiring:
                _later(self.expire)
        # freed one at a time and without the lock: a large one takes milliseconds
        while dropped:
            dropped.popitem()

    def _key(self, params: SamplingParams) -> _Key:
        """The texts that tell compiled grammars apart, and the tokens of their vocabulary."""
        shown = self._tokenizer.shown_special_ids(
            params.skip_special_tokens, params.kept_ids(self._tokenizer)
        )
        return tuple(one.definition() for one in form_of(params).either()), shown

    def _blame(self, form: StructuredOutputsParams, shown: frozenset[int], reason: str) -> str:
        """The message for a form that cannot be compiled, or for one of its alternatives."""
        source = form.source
        if form.alternative is not None:
            for one in form.either():
                alone = self._compile((one.definition(),), shown)
                if isinstance(alone, str):
                    source, reason = one.source, alone
                    break
        return f"{source} cannot be used: {reason}"

    def _compile(
        self, forms: tuple[tuple[Kind, str], ...], shown: frozenset[int]
    ) -> CompiledGrammar | str:
        """A compiled grammar, or what is wrong with it."""
        vocabulary = self._vocabulary(shown)
        if isinstance(vocabulary, str):
            return vocabulary
        made = WORKERS.compile(vocabulary, forms, MAX_LEXER_STATES)
        return made if isinstance(made, str) else CompiledGrammar(made, vocabulary)

    def _vocabulary(self, shown: frozenset[int]) -> GrammarVocabulary | str:
        """The vocabulary of answers that show these special tokens, or why there is none.

        It is made once, which takes half a second for a large one.
        """
        with self._vocabulary_lock:
            if shown not in self._vocabularies:
                self._vocabularies[shown] = self._make_vocabulary(shown)
            return self._vocabularies[shown]

    def _make_vocabulary(self, shown: frozenset[int]) -> GrammarVocabulary | str:
        """See `_vocabulary`."""
        try:
            made = GrammarVocabulary(self._tokenizer, self._vocab_size, self._eos_token_ids, shown)
            reason = WORKERS.add(made)
        except (ValueError, RuntimeError, KeyError, OSError, EOFError) as error:
            reason = one_line(str(error))
        return f"llguidance cannot use this model's tokenizer: {reason}" if reason else made


def _later(work: Callable[[], None]) -> None:
    """Call `work` after `KEPT_FOR_S`, in a daemon thread."""
    timer = threading.Timer(KEPT_FOR_S, work)
    timer.daemon = True
    timer.start()


def form_of(params: SamplingParams) -> StructuredOutputsParams:
    """The form of a request that has one."""
    assert params.structured_outputs is not None, "grammars are made for requests with a form"
    return params.structured_outputs
