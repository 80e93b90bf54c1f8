"""Grammars of structured output, compiled and followed by llguidance (extra `structured`).

The rest of the engine sees three things of a matcher: a bitmask of the tokens that may come, a
token that it takes, and whether it is at its end.
"""

from __future__ import annotations

import re
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from fd_dsa.engine.structured_outputs import Kind, StructuredOutputsParams
from fd_dsa.engine.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLParserLimits, LLTokenizer
    from llguidance._lib import JsonCompileOptions

# compiled grammars that are kept for requests with the same one, each of up to 30 MB
_NUM_KEPT = 32
_MAX_LEXER_STATES = 25_000
# what llguidance says of a lexer that has come to its limits
_WORN_OUT = ("LexerTooComplex", "InternalError")
# a grammar that was worn out sooner by fewer tokens is too complex, and compiling it costs others
_RENEWED_AFTER_TOKENS = 1000
_RENEWED_AFTER_S = 60.0
_SHOWN_ERROR_CHARS = 300
_QUOTATION = re.compile(r"^ *\d+ \| ", re.MULTILINE)
# between two signs of JSON; without a bound a small model may write spaces until max_tokens
_JSON_OPTIONS: JsonCompileOptions = {"whitespace_pattern": "[ \\t\\n\\r]{1,40}"}


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

    @property
    def may_be_renewed(self) -> bool:
        """Whether it has served for long enough to be compiled anew."""
        age_s = time.monotonic() - self.since
        return self.num_tokens >= _RENEWED_AFTER_TOKENS or age_s >= _RENEWED_AFTER_S


class GrammarMatcher:
    """Follows one output through its grammar.

    Args:
        find: gives the compiled grammar; given True, one that no output has used. Called when the
            first mask is asked for, so that requests which wait hold nothing.
        buffer: int32, one bit for every token that llguidance knows; shared, since a mask is
            copied from it at once.
        free: int32, the bits of the tokens that may come before the grammar begins.
        after_token_id: the grammar begins behind this token; None = with the output.
    """

    def __init__(
        self,
        find: Callable[[bool], CompiledGrammar],
        buffer: npt.NDArray[np.int32],
        free: npt.NDArray[np.int32],
        after_token_id: int | None = None,
    ) -> None:
        """At the beginning of the output."""
        self._free = free
        self._awaited = after_token_id
        self._find = find
        self._compiled: CompiledGrammar | None = None
        self._copy: LLMatcher | None = None
        self._taken: list[int] = []
        self._buffer = buffer

    @property
    def _matcher(self) -> LLMatcher:
        """Of llguidance, where the output stands."""
        return self._begin(False) if self._copy is None else self._copy

    def _begin(self, anew: bool) -> LLMatcher:
        """A copy of the compiled grammar for this output alone."""
        self._compiled = self._find(anew)
        self._copy = self._compiled.matcher.deep_copy()
        return self._copy

    @property
    def is_finished(self) -> bool:
        """True when nothing can follow, or the end of sequence was taken."""
        return self._matcher.is_stopped() and not self._matcher.is_error()

    @property
    def error(self) -> str | None:
        """Why the grammar cannot be followed any more: it is too complex or has no way on."""
        return _told(self._matcher.get_error()) if self._matcher.is_error() else None

    def fill_bitmask(self, bitmask: npt.NDArray[np.int32]) -> None:
        """Write bit i % 32 of int32 i // 32 for every token i: 1 = may come.

        The end of sequence may come only where the grammar is complete. After an error nothing
        may come.
        """
        if self._awaited is not None:
            bitmask[:] = self._free[: len(bitmask)]
            return
        self._compute_mask()
        if self._matcher.is_error() and self._is_renewed():
            self._compute_mask()
        bitmask[:] = 0 if self._matcher.is_error() else self._buffer[: len(bitmask)]

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

    def _compute_mask(self) -> None:
        """Let llguidance write the mask into the buffer."""
        self._matcher.unsafe_compute_mask_ptr(self._buffer.ctypes.data, self._buffer.nbytes)

    def _is_renewed(self) -> bool:
        """Begin anew where the states that outputs of one grammar share have come to their limit.

        That says nothing of this output, which may have reached few of them itself.
        """
        worn = self._matcher.stop_reason() in _WORN_OUT
        if not worn or self._compiled is None or not self._compiled.may_be_renewed:
            return False
        self._begin(True).consume_tokens(self._taken)
        return True


class GrammarCompiler:
    """Makes matchers; safe to call from any thread.

    A grammar is compiled once, when a request with it is checked, and copied from then on. Copies
    share the states that their outputs have reached, the most of what a grammar takes of memory.

    Args:
        tokenizer: of the model.
        vocab_size: columns of the logits.
        eos_token_ids: tokens that end an output.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_token_ids: Iterable[int]) -> None:
        """Nothing is imported before the first grammar."""
        self._tokenizer = tokenizer
        self._vocab_size = max(vocab_size, tokenizer.vocab_size)
        self._eos_token_ids = sorted(eos_token_ids)
        self._buffer = np.zeros(-(-self._vocab_size // 32), np.int32)
        # all but the end of sequence, which may not come before the grammar has begun
        self._free = np.full_like(self._buffer, -1)
        for token_id in self._eos_token_ids:
            self._free.view(np.uint32)[token_id // 32] &= ~np.uint32(1 << token_id % 32)
        self._lock = threading.Lock()
        self._tokenizer_lock = threading.Lock()
        self._compiled: OrderedDict[tuple[Kind, str], CompiledGrammar] = OrderedDict()
        self._ll_tokenizer: LLTokenizer | None = None

    def check(self, params: StructuredOutputsParams) -> None:
        """Compile a grammar unless it is known.

        Raises:
            ValueError: it is wrong or too large, or llguidance is missing; begins with the name
                of the field.
        """
        self._find(params)

    def new_matcher(self, params: StructuredOutputsParams) -> GrammarMatcher:
        """A matcher at the beginning of the grammar, which `check` has taken."""
        find = partial(self._find, params)
        return GrammarMatcher(find, self._buffer, self._free, params.after_token_id)

    def _find(self, params: StructuredOutputsParams, anew: bool = False) -> CompiledGrammar:
        """The compiled grammar; `anew` compiles it in any case."""
        if find_spec("llguidance") is None:
            raise ValueError(
                f"{params.source} needs llguidance, which is not installed here; pip install "
                "'fd_dsa[structured]'"
            )
        key = params.definition()
        with self._lock:
            found = None if anew else self._compiled.get(key)
            if found is not None:
                self._compiled.move_to_end(key)
                return found
        # not under the lock, which the engine's thread takes too
        matcher = self._compile(*key)
        if isinstance(matcher, str):
            raise ValueError(f"{params.source} cannot be used: {matcher}")
        compiled = CompiledGrammar(matcher)
        with self._lock:
            self._compiled[key] = compiled
            if len(self._compiled) > _NUM_KEPT:
                self._compiled.popitem(last=False)
        return compiled

    def _compile(self, kind: Kind, text: str) -> LLMatcher | str:
        """A compiled grammar, or what is wrong with it."""
        from llguidance import LLMatcher, grammar_from

        try:
            if kind == "json_schema":
                grammar = LLMatcher.grammar_from_json_schema(text, defaults=_JSON_OPTIONS)
            else:
                grammar = grammar_from(kind, text)
        except (ValueError, RecursionError) as error:
            return _told(str(error))
        matcher = LLMatcher(self._llguidance_tokenizer(), grammar, log_level=0, limits=_limits())
        if not matcher.is_error():
            # what is too complex shows in the first mask at the latest
            buffer = np.zeros_like(self._buffer)
            matcher.unsafe_compute_mask_ptr(buffer.ctypes.data, buffer.nbytes)
        if matcher.is_error():
            return _told(matcher.get_error())
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


def _told(error: str) -> str:
    """An error of llguidance in one line, without the quotation of the grammar behind it."""
    own = _QUOTATION.split(error.replace("<non-verbose/>", ""))[0]
    text = " ".join(own.split())
    return text if len(text) <= _SHOWN_ERROR_CHARS else text[:_SHOWN_ERROR_CHARS] + "..."
