"""Grammars of structured output, compiled by llguidance (extra `structured`)."""

from __future__ import annotations

import logging
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

from fd_dsa.engine.grammar_source import grammar_text, is_panic, one_line, refusal
from fd_dsa.engine.grammar_vocabulary import GrammarVocabulary
from fd_dsa.engine.sampling_params import SamplingParams
from fd_dsa.engine.structured_outputs import Kind, StructuredOutputsParams
from fd_dsa.engine.tokenizer import Tokenizer
from fd_dsa.environment import usable_cpus

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLParserLimits

# compiled grammars that are kept for requests with the same one, each of up to 30 MB
_NUM_KEPT = 32
# for which one that nobody asks for is kept, at least; at most twice as long
_KEPT_FOR_S = 20.0
# of a form and its alternatives, and the special tokens that the text shows
_Key = tuple[tuple[tuple[Kind, str], ...], frozenset[int]]
_MAX_LEXER_STATES = 25_000

logger = logging.getLogger(__name__)


@dataclass
class CompiledGrammar:
    """What outputs of one grammar share: the states that they have reached.

    Attributes:
        matcher: at the beginning of the grammar, to be copied.
        vocabulary: tokens of its outputs.
        num_tokens: that its outputs have taken.
        since: `time.monotonic()` of its compilation.
    """

    matcher: LLMatcher
    vocabulary: GrammarVocabulary
    num_tokens: int = 0
    since: float = field(default_factory=time.monotonic)


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
        self._vocab_size = vocab_size
        self._eos_token_ids = sorted(i for i in eos_token_ids if i < vocab_size)
        # of all matchers, which copy their mask from it at once; llguidance adds an end of sequence
        # to a vocabulary without one
        size = vocab_size + (not self._eos_token_ids)
        self.buffer = np.zeros(-(-size // 32), np.int32)
        # all but the end of sequence, which may not come before the grammar has begun
        self.free = np.full_like(self.buffer, -1)
        for token_id in self._eos_token_ids:
            self.free.view(np.uint32)[token_id // 32] &= ~np.uint32(1 << token_id % 32)
        self._lock = threading.Lock()
        self._vocabulary_lock = threading.Lock()
        self._checks = threading.BoundedSemaphore(max(1, usable_cpus() // 2))
        # asked for since `_expire` was called last, and only before; and all that outputs follow
        self._recent: dict[_Key, CompiledGrammar] = {}
        self._older: dict[_Key, CompiledGrammar] = {}
        self._in_use: WeakValueDictionary[_Key, CompiledGrammar] = WeakValueDictionary()
        self._is_expiring = False
        # by the special tokens that the text shows; or the reason why there is none
        self._vocabularies: dict[frozenset[int], GrammarVocabulary | str] = {}
        self._worker = ThreadPoolExecutor(1, "fd_dsa-grammar")
        # what the worker compiles, never more than one
        self._pending: tuple[_Key, Future[CompiledGrammar]] | None = None

    def prepare(self) -> None:
        """Make the vocabulary of most grammars if llguidance is installed.

        A tokenizer that cannot be used is logged. For 129,280 tokens this takes half a second, in
        which no other thread runs.
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

    def find(self, params: SamplingParams, again: bool = False) -> CompiledGrammar:
        """The compiled grammar; this thread compiles it if needed, with `again` in any case.

        Raises:
            ValueError: see `check`.
        """
        form, key = form_of(params), self._key(params)
        compiled = None if again else self._kept(key)
        if compiled is not None:
            return compiled
        if find_spec("llguidance") is None:
            raise ValueError(
                f"{form.source} needs llguidance, which is not installed here; pip install "
                "'fd_dsa[structured]'"
            )
        # not under the lock, which the engine's thread takes too
        made = self._compile(*key)
        if isinstance(made, str):
            raise ValueError(self._blame(form, key[1], made))
        with self._lock:
            self._keep(key, made)
        return made

    def poll(self, params: SamplingParams) -> CompiledGrammar | None:
        """The compiled grammar, or None until the worker has made it; for the engine's thread.

        Raises:
            ValueError: see `check`.
        """
        key = self._key(params)
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
        try:
            matcher = self._make_matcher(grammar_text(forms, vocabulary.names), vocabulary)
        except BaseException as error:
            if not isinstance(error, (ValueError, RecursionError)) and not is_panic(error):
                raise
            return one_line(str(error))
        if matcher.is_error():
            return one_line(matcher.get_error())
        return refusal(matcher.get_grammar_warnings()) or CompiledGrammar(matcher, vocabulary)

    def _make_matcher(self, text: str, vocabulary: GrammarVocabulary) -> LLMatcher:
        """llguidance's matcher of a grammar; it holds an error if the grammar is wrong."""
        from llguidance import LLMatcher

        matcher = LLMatcher(vocabulary.ll_tokenizer, text, log_level=0, limits=_limits())
        if not matcher.is_error():
            # what is too complex shows in the first mask at the latest
            buffer = np.zeros_like(self.buffer)
            matcher.unsafe_compute_mask_ptr(buffer.ctypes.data, buffer.nbytes)
        return matcher

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
            return GrammarVocabulary(self._tokenizer, self._vocab_size, self._eos_token_ids, shown)
        except BaseException as error:
            if not isinstance(error, Exception) and not is_panic(error):
                raise
            return f"llguidance cannot use this model's tokenizer: {one_line(str(error))}"


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


def form_of(params: SamplingParams) -> StructuredOutputsParams:
    """The form of a request that has one."""
    assert params.structured_outputs is not None, "grammars are made for requests with a form"
    return params.structured_outputs
