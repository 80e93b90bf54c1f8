"""Messages between an engine and the workers of its grammars.

The messages of every step are named tuples, because pickle reads and writes them in a quarter of
the time of data classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

Kind = Literal["json_schema", "regex", "lark", "grammar"]
COMPILE_S = 0.5
"""Processor time in which a grammar is compiled, seconds."""
TOKENS_S = 0.5
"""Processor time that a worker may spend on tokens beyond its gains, seconds."""
GAIN_S = 0.05
"""Processor time that a worker gains with each token, seconds; it keeps at most `TOKENS_S`."""
MEMORY_MIB = 192
"""Memory that a grammar may take in addition to the vocabulary, MiB."""
TOKEN_BYTES = 2048
"""Memory that a grammar may take beyond that for each token of the outputs that follow it.

JSON takes 300 bytes a token.
"""


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """Tokens of a model; the answer is None, or the reason why llguidance refuses them.

    Attributes:
        number: name of the vocabulary.
        tokens: bytes of each token id.
        special_token_ids: tokens that a grammar can only ask for by name.
        end_token_ids: tokens that end an output.
        names: texts of the form <...> that a grammar may use as names of tokens.
    """

    number: int
    tokens: list[bytes]
    special_token_ids: list[int]
    end_token_ids: list[int]
    names: frozenset[bytes]


@dataclass(frozen=True, slots=True)
class Forget:
    """Vocabulary that no further grammar needs; has no answer."""

    number: int


@dataclass(frozen=True, slots=True)
class Compile:
    """Grammar for a new worker, which answers with `Compiled` on a socket of its own.

    The socket follows the message.

    Attributes:
        vocabulary: number of the vocabulary.
        forms: kind and text of each form; an output has one of them.
        max_lexer_states: limit of llguidance for all outputs of the grammar together.
    """

    vocabulary: int
    forms: tuple[tuple[Kind, str], ...]
    max_lexer_states: int


@dataclass(frozen=True, slots=True)
class Compiled:
    """Result of a compilation: the worker's process id, and the reason of a refusal."""

    pid: int
    error: str | None


class Work(NamedTuple):
    """Work on one output.

    A message is a list of works. Its answer is a list with the state of each output. A second
    answer follows if masks are needed: a list with the states of those outputs and their masks.

    Attributes:
        output: number of the output.
        source: for a new output: the output whose copy it is, -1 = the beginning of the grammar.
        token_ids: tokens that the output takes.
        needs_mask: True to compute which tokens may come next.
        counted: sequences of tokens; the answer has how many tokens of each may come.
        is_over: True to forget the output.
    """

    output: int
    source: int = -1
    token_ids: tuple[int, ...] = ()
    needs_mask: bool = False
    counted: tuple[tuple[int, ...], ...] = ()
    is_over: bool = False


class Done(NamedTuple):
    """State of an output after `Work`.

    Attributes:
        is_finished: no token may follow.
        error: reason why the grammar cannot be followed any more.
        is_worn_out: the error is due to the states that all outputs of the grammar share.
        mask: bit i % 8 of byte i // 8 is set if token i may come; None = not asked for.
        counts: one number for each sequence of `Work.counted`.
    """

    is_finished: bool = False
    error: str | None = None
    is_worn_out: bool = False
    mask: bytes | None = None
    counts: tuple[int, ...] = ()
