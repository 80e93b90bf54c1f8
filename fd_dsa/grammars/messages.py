"""Messages between an engine and the workers of its grammars.

Messages of every step are named tuples, because pickle handles them in a quarter of the time of
data classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

Kind = Literal["json_schema", "regex", "lark", "grammar"]
COMPILE_S = 0.5
"""Limit of the processor time for compiling a grammar, seconds."""
TOKENS_S = 0.5
"""Processor time that a worker may spend on tokens besides its gains, seconds."""
GAIN_S = 0.05
"""Processor time that a worker gains with each token, seconds.

It keeps at most `TOKENS_S`.
"""
MEMORY_MIB = 192
"""Limit of a grammar's memory in addition to the vocabulary, MiB."""
TOKEN_BYTES = 2048
"""Additional memory limit for each token of a grammar's outputs, bytes.

JSON takes 300 bytes a token.
"""


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """The tokens of a model.

    The answer is None, or the reason why llguidance refuses them.

    Attributes:
        number: number that identifies the vocabulary.
        tokens: bytes of each token id.
        special_token_ids: tokens that a grammar can request only by name.
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
    """A vocabulary that no further grammar needs. The message has no answer."""

    number: int


@dataclass(frozen=True, slots=True)
class Compile:
    """A grammar for a new worker, which answers with `Compiled` on its own socket.

    The socket follows the message.

    Attributes:
        vocabulary: number of the vocabulary.
        forms: kind and text of each form. An output has one of the forms.
        max_lexer_states: llguidance's limit for all outputs of the grammar together.
    """

    vocabulary: int
    forms: tuple[tuple[Kind, str], ...]
    max_lexer_states: int


@dataclass(frozen=True, slots=True)
class Compiled:
    """Result of a compilation: the worker's process id, and a refusal's reason or None."""

    pid: int
    error: str | None


class Work(NamedTuple):
    """Work on one output.

    A message is a list of works. Its answer is a list with the state of each output. If masks are
    needed, a second answer follows: a list with the states of those outputs and their masks.

    Attributes:
        output: number of the output.
        source: for a new output, the output to copy. -1 = the beginning of the grammar.
        token_ids: tokens to append to the output.
        needs_mask: True to compute the tokens that may follow.
        counted: sequences of tokens. The answer has the length of each one's allowed prefix.
        is_over: True to delete the output.
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
        is_finished: True if no token may follow.
        error: reason why the output no longer follows the grammar, or None.
        is_worn_out: True if the error comes from the lexer states shared by all outputs.
        mask: bit i % 8 of byte i // 8 is set if token i may follow. None = not requested.
        counts: one number for each sequence of `Work.counted`.
    """

    is_finished: bool = False
    error: str | None = None
    is_worn_out: bool = False
    mask: bytes | None = None
    counts: tuple[int, ...] = ()
