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
"""Maximum number of compiled grammars that are kept for later requests."""
KEPT_FOR_S = 20.0
"""Unused grammars are evicted after one to two of these periods, seconds."""
MAX_LEXER_STATES = 25_000
"""Maximum number of lexer states of a grammar. Larger grammars are too complex."""
# definitions of a form and its alternative, and the special tokens that stay in the text
_Key = tuple[tuple[tuple[Kind, str], ...], frozenset[int]]
# maximum time for which steps wait for all grammars: in one step, seconds, and as a share of time
_PATIENCE_S, _PATIENCE_SHARE = 0.1, 0.25
# maximum time for which an idle engine waits for grammars, seconds
_IDLE_WAIT_S = 0.05

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class CompiledGrammar:
    """Worker of a grammar, which the outputs of the grammar share.

    Attributes:
        process: worker, which keeps the states of the outputs.
        vocabulary: tokens of the outputs.
        may_begin: text -> True if an output may begin with it; only texts that were looked up.
        num_tokens: number of tokens that the outputs have appended.
        since: time of the compilation, seconds of `time.monotonic()`.
    """

    process: GrammarProcess
    vocabulary: GrammarVocabulary
    may_begin: dict[bytes, bool] = field(default_factory=dict)
    num_tokens: int = 0
    since: float = field(default_factory=time.monotonic)


class GrammarCompiler:
    """Compiles grammars in workers, and bounds the time for which steps wait for them.

    A grammar is compiled when a request with it is checked. All outputs of the grammar share a
    worker. A grammar that was evicted is compiled again when an output with it is about to begin.

    Args:
        tokenizer: tokenizer of the model.
        vocab_size: number of tokens of the model.
        eos_token_ids: tokens that end an output.
        is_patient: True = wait for workers without a bound.

    Attributes:
        free: int32 [ceil(vocab_size / 32)]; mask that allows all tokens without the end of
            sequence, which is not allowed before a grammar has begun.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        vocab_size: int,
        eos_token_ids: Iterable[int],
        is_patient: bool = True,
    ) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._eos_token_ids = sorted(i for i in eos_token_ids if i < vocab_size)
        self.free = np.full(-(-vocab_size // 32), -1, np.int32)
        for token_id in self._eos_token_ids:
            self.free.view(np.uint32)[token_id // 32] &= ~np.uint32(1 << token_id % 32)
        self._lock = threading.Lock()
        self._vocabulary_lock = threading.Lock()
        self._checks = threading.BoundedSemaphore(max(1, usable_cpus() // 2))
        # used since the last call of `expire`, not used since then, and those of running outputs
        self._recent: dict[_Key, CompiledGrammar] = {}
        self._older: dict[_Key, CompiledGrammar] = {}
        self._in_use: WeakValueDictionary[_Key, CompiledGrammar] = WeakValueDictionary()
        self._is_expiring = False
        # by the special tokens that stay in the text; or the reason for an error
        self._vocabularies: dict[frozenset[int], GrammarVocabulary | str] = {}
        self._worker = ThreadPoolExecutor(1, "fd_dsa-grammar")
        # the one grammar that the thread compiles
        self._pending: tuple[_Key, Future[None]] | None = None
        self._patience = None if is_patient else Patience(_PATIENCE_S, _PATIENCE_SHARE)
        # workers for which a step has stopped to wait
        self._late: WeakSet[GrammarProcess] = WeakSet()

    def prepare(self) -> None:
        """Make the usual vocabulary if llguidance is installed, and log an unsupported tokenizer.

        For 129,280 tokens this takes a second.
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
        """Compile a grammar unless it is known. The call may take a second, so a thread makes it.

        Raises:
            ValueError: the grammar is invalid or too large, llguidance is missing, or the tokenizer
                is not supported. The message begins with the name of the field.
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
        """Return the compiled grammar, and wait for its compilation if needed.

        Args:
            params: parameters with a form.
            instead_of: compiled grammar that has used up its states, and is replaced.

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
        # without the lock, which the engine's thread needs too
        made = self._compile(*key)
        if isinstance(made, str):
            raise ValueError(self._blame(form, key[1], made))
        with self._lock:
            self._keep(key, made)
        return made

    def poll(
        self, params: SamplingParams, instead_of: CompiledGrammar | None = None
    ) -> CompiledGrammar | None:
        """Return the compiled grammar, or None while another thread compiles it.

        Only the engine's thread calls it.

        Raises:
            ValueError: see `check`.
        """
        key = self._key(params)
        if self._pending is not None and self._pending[1].done():
            try:
                if self._pending[0] == key:
                    # raise the error of the compilation, if it has failed
                    self._pending[1].result()
            finally:
                self._pending = None
        compiled = self._kept(key)
        if compiled is instead_of:
            compiled = None
        if compiled is None and self._pending is None:
            self._pending = key, self._worker.submit(self._make, params, instead_of)
        return compiled

    def _make(self, params: SamplingParams, instead_of: CompiledGrammar | None) -> None:
        """Compile and keep a grammar. A return value would keep it alive for longer."""
        self.find(params, instead_of)

    def answer(
        self,
        process: GrammarProcess,
        pending: Pending,
        needs_mask: bool = False,
        may_wait: bool = True,
    ) -> Done | None:
        """Return the answer of a worker, or None if the time for which the step may wait is over.

        Steps wait for a bounded share of the time, and for one grammar half of it. So a slow
        grammar delays other requests only for a short while.
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
        """Block until a grammar is compiled or a late mask has come, for `_IDLE_WAIT_S` at most.

        Returns:
            False if no grammar or mask is missing.
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
        """Return a known compiled grammar, marked as the last one used, or None."""
        with self._lock:
            compiled = self._in_use.get(key)
            if compiled is None or compiled.process.has_ended:
                return None
            self._keep(key, compiled)
            return compiled

    def _keep(self, key: _Key, compiled: CompiledGrammar) -> None:
        """Mark a grammar as the last one used, and evict another. The caller holds the lock."""
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
        """Evict the grammars that were not used since the last call.

        The compiler calls it every `KEPT_FOR_S` seconds while it keeps a grammar.
        """
        with self._lock:
            dropped, self._older, self._recent = self._older, self._recent, {}
            self._is_expiring = bool(self._older)
            if self._is_expiring:
                _later(self.expire)
        # free them one by one without the lock, because a large one takes milliseconds
        while dropped:
            dropped.popitem()

    def _key(self, params: SamplingParams) -> _Key:
        """Return the key of a grammar: its definitions, and the special tokens in its texts."""
        shown = self._tokenizer.shown_special_ids(
            params.skip_special_tokens, params.kept_ids(self._tokenizer)
        )
        return tuple(one.definition() for one in form_of(params).either()), shown

    def _blame(self, form: StructuredOutputsParams, shown: frozenset[int], reason: str) -> str:
        """Return the message for the form or alternative that cannot be compiled."""
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
        """Return a compiled grammar, or the reason for an error."""
        vocabulary = self._vocabulary(shown)
        if isinstance(vocabulary, str):
            return vocabulary
        made = WORKERS.compile(vocabulary, forms, MAX_LEXER_STATES)
        return made if isinstance(made, str) else CompiledGrammar(made, vocabulary)

    def _vocabulary(self, shown: frozenset[int]) -> GrammarVocabulary | str:
        """Return the vocabulary of answers with these special tokens, or the reason for an error.

        The first call for a large vocabulary takes half a second.
        """
        with self._vocabulary_lock:
            if shown not in self._vocabularies:
                try:
                    self._vocabularies[shown] = self._make_vocabulary(shown)
                except (OSError, EOFError) as error:
                    # the next request for it tries again
                    return f"llguidance has no process ({str(error) or 'it has ended'})"
            return self._vocabularies[shown]

    def _make_vocabulary(self, shown: frozenset[int]) -> GrammarVocabulary | str:
        """Make the result of `_vocabulary`."""
        try:
            made = GrammarVocabulary(self._tokenizer, self._vocab_size, self._eos_token_ids, shown)
            reason = WORKERS.add(made)
        except (ValueError, RuntimeError, KeyError) as error:
            reason = one_line(str(error))
        return f"llguidance cannot use this model's tokenizer: {reason}" if reason else made


def _later(work: Callable[[], None]) -> None:
    """Call `work` after `KEPT_FOR_S`, in a daemon thread."""
    timer = threading.Timer(KEPT_FOR_S, work)
    timer.daemon = True
    timer.start()


def form_of(params: SamplingParams) -> StructuredOutputsParams:
    """Return the form of a request, which must have one."""
    assert params.structured_outputs is not None, "grammars are made for requests with a form"
    return params.structured_outputs
