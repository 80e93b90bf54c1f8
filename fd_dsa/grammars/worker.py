"""Worker processes of grammars: `python -m fd_dsa.grammars.worker SOCKET PIPE`.

The started process receives vocabularies and forks a worker for each grammar. A fork takes 5 ms and
shares the memory of the vocabularies. A worker compiles its grammar, then follows all outputs of
the grammar. The kernel ends a worker at its limits of processor time and memory. Waiting does not
count, so a worker that is stopped, or waits for a processor, is not ended.
"""

from __future__ import annotations

import ctypes
import gc
import os
import signal
import sys
import time
from multiprocessing.connection import Connection
from multiprocessing.reduction import recv_handle
from typing import cast

from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper

from fd_dsa.grammars.messages import (
    COMPILE_S,
    GAIN_S,
    MEMORY_MIB,
    TOKEN_BYTES,
    TOKENS_S,
    Compile,
    Compiled,
    Done,
    Forget,
    Vocabulary,
    Work,
)
from fd_dsa.grammars.source import (
    COMPILE_FUEL,
    TOKEN_FUEL,
    grammar_text,
    is_panic,
    one_line,
    refusal,
)
from fd_dsa.processes.child import connect_to_parent
from fd_dsa.processes.limits import (
    address_space,
    expect_end,
    limit_address_space,
    processor_time,
)

# stop reasons of llguidance for an output whose lexer has reached its limits
_WORN_OUT = ("LexerTooComplex", "InternalError")


class _Tokens:
    """A vocabulary in llguidance's form, a trie of the tokens' bytes."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, vocabulary: Vocabulary) -> None:
        ends = vocabulary.end_token_ids
        self.tokens = vocabulary.tokens
        self.special_token_ids = vocabulary.special_token_ids
        self.eos_token_id = ends[0] if ends else None
        self.names = vocabulary.names
        self.trie = LLTokenizer(cast("TokenizerWrapper", self), eos_token=ends or None)
        # only the constructor reads them
        del self.tokens
        # llguidance adds an end-of-sequence token to a vocabulary without one
        size = len(vocabulary.tokens) + (not ends)
        self.mask_bytes = -(-size // 32) * 4

    def __call__(self, text: str) -> list[int]:
        """Return token ids that spell a text, longest match at the front (for llguidance)."""
        return self.trie.greedy_tokenize(text)


def main() -> int:
    """Fork workers until the engine is gone.

    Returns:
        The exit status.
    """
    connection = connect_to_parent()
    # the kernel reaps workers that have ended
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    vocabularies: dict[int, _Tokens] = {}
    while True:
        try:
            message = connection.recv()
        except (EOFError, OSError):
            return 0
        if isinstance(message, Vocabulary):
            connection.send(_add(vocabularies, message))
            del message
            # freeze all objects, because a garbage collection in a worker would copy their pages
            gc.collect()
            gc.freeze()
        elif isinstance(message, Forget):
            vocabularies.pop(message.number, None)
        elif isinstance(message, Compile):
            with Connection(recv_handle(connection)) as to_engine:
                try:
                    pid = os.fork()
                except OSError as error:
                    to_engine.send(Compiled(0, f"no process can be started for it: {error}"))
                    continue
                if pid == 0:
                    connection.close()
                    _run_worker(to_engine, message, vocabularies[message.vocabulary])


def _add(vocabularies: dict[int, _Tokens], vocabulary: Vocabulary) -> str | None:
    """Add a vocabulary. Returns the reason of a refusal, or None."""
    try:
        vocabularies[vocabulary.number] = _Tokens(vocabulary)
    except BaseException as error:
        if not isinstance(error, Exception) and not is_panic(error):
            raise
        return one_line(str(error))
    return None


def _run_worker(connection: Connection, order: Compile, tokens: _Tokens) -> None:
    """Serve one grammar, then end the process."""
    try:
        # hide messages of panics and failed allocations from the engine's log
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())
        memory = _Memory()
        with processor_time(COMPILE_S):
            made = _compile(order, tokens)
        connection.send(Compiled(os.getpid(), made if isinstance(made, str) else None))
        if not isinstance(made, str):
            _Worker(made, tokens, memory).serve(connection)
    except (EOFError, OSError):
        pass
    finally:
        os._exit(0)


class _Memory:
    """Bounds the memory of this process.

    A failed allocation of llguidance ends the process.
    """

    def __init__(self) -> None:
        self._first = address_space() + MEMORY_MIB * 2**20
        self._limit = 0
        self.allow_tokens(0)
        expect_end()

    def allow_tokens(self, count: int) -> None:
        """Raise the bound for outputs with `count` tokens together. It never falls."""
        limit = self._first + count * TOKEN_BYTES
        if limit > self._limit:
            # in large steps, because this is a system call
            self._limit = limit + 2**20
            limit_address_space(self._limit)


def _compile(order: Compile, tokens: _Tokens) -> LLMatcher | str:
    """Return the matcher at the beginning of a grammar, or the reason of a refusal."""
    try:
        text = grammar_text(order.forms, tokens.names)
        limits = _limits(order.max_lexer_states)
        matcher = LLMatcher(tokens.trie, text, log_level=0, limits=limits)
        if not matcher.is_error():
            # most grammars that are too complex fail at the first mask
            matcher.compute_bitmask()
    except BaseException as error:
        if not isinstance(error, (ValueError, RecursionError, MemoryError)) and not is_panic(error):
            raise
        return one_line(str(error)) or f"it needs more than {MEMORY_MIB} MiB of memory"
    if matcher.is_error():
        return one_line(matcher.get_error())
    return refusal(matcher.get_grammar_warnings()) or matcher


def _limits(max_lexer_states: int) -> LLParserLimits:
    """Return llguidance's limits, which refuse most grammars that are too complex.

    With a million units of initial fuel, a letter repeated a million times takes 125 MB. With these
    limits, a schema may still have 600 fields of most formats. A schema of 600 optional fields has
    2,400 items in a row.
    """
    return LLParserLimits(
        max_items_in_row=10_000,
        initial_lexer_fuel=COMPILE_FUEL,
        step_lexer_fuel=TOKEN_FUEL,
        step_max_items=50_000,
        max_lexer_states=max_lexer_states,
        max_grammar_size=100_000,
        verbose_errors=False,
    )


class _Worker:
    """Follows the outputs of one grammar, each with a copy of its matcher."""

    def __init__(self, matcher: LLMatcher, tokens: _Tokens, memory: _Memory) -> None:
        self._outputs = {-1: matcher}
        self._num_tokens = {-1: 0}
        self._memory = memory
        self._mask = ctypes.create_string_buffer(tokens.mask_bytes)

    def serve(self, connection: Connection) -> None:
        """Answer messages in order, each within the remaining processor time."""
        left_s = TOKENS_S
        while True:
            works: list[Work] = connection.recv()
            gain_s = GAIN_S * sum(len(work.token_ids) for work in works)
            begin_s = time.process_time()
            self._count_tokens(works)
            with processor_time(left_s + gain_s):
                # send the states at once, so that the engine continues while masks are computed
                connection.send([self._take(work) for work in works])
                masks = [self._mask_of(work.output) for work in works if work.needs_mask]
            left_s = min(left_s + gain_s - (time.process_time() - begin_s), TOKENS_S)
            if masks:
                connection.send(masks)

    def _count_tokens(self, works: list[Work]) -> None:
        """Count the tokens of each output, because memory grows with them."""
        counts = self._num_tokens
        for work in works:
            if work.is_over:
                counts.pop(work.output, None)
            else:
                before = counts[work.output if work.output in counts else work.source]
                counts[work.output] = before + len(work.token_ids)
        self._memory.allow_tokens(sum(counts.values()))

    def _take(self, work: Work) -> Done:
        """Append tokens to an output, or delete it."""
        if work.is_over:
            self._outputs.pop(work.output, None)
            return Done()
        if work.output not in self._outputs:
            self._outputs[work.output] = self._outputs[work.source].deep_copy()
        matcher = self._outputs[work.output]
        for token_id in work.token_ids:
            matcher.consume_token(token_id)
        counts = tuple(matcher.validate_tokens(list(ids)) for ids in work.counted)
        return _state_of(matcher, counts=counts)

    def _mask_of(self, output: int) -> Done:
        """Compute the tokens that may follow an output."""
        matcher = self._outputs.get(output)
        if matcher is None:
            # a later work of the same message has deleted the output
            return Done()
        matcher.unsafe_compute_mask_ptr(ctypes.addressof(self._mask), len(self._mask))
        return _state_of(matcher, mask=self._mask.raw)


def _state_of(matcher: LLMatcher, mask: bytes | None = None, counts: tuple[int, ...] = ()) -> Done:
    """Return the state of an output, with its mask or counts."""
    is_error = matcher.is_error()
    return Done(
        matcher.is_stopped() and not is_error,
        one_line(matcher.get_error()) if is_error else None,
        is_error and matcher.stop_reason() in _WORN_OUT,
        mask,
        counts,
    )


if __name__ == "__main__":
    sys.exit(main())
