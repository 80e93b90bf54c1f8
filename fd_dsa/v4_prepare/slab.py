"""The words that go from the host to the device builder in one copy a step, and back in a fault.

A slab is int32. It starts with a header, then come the sections of the rows, then the cells of the
block table that have changed:

    header        stamp, rows B, tokens T, number n of changed cells; the rest is 0
    ctx, q, slot  [max_num_seqs] each; rows from B on: 0, 0, -1
    run_column    [max_num_seqs]: the first changed column of a row
    run_start     [max_num_seqs + 1]: where a row's new cells start among `values`
    values        [n]: the new cells of row b from run_start[b] to run_start[b + 1]

Row b's cells `run_column[b]` and following change, one run a row; rows from B on have none. Only
the words up to the last value are copied. What lies behind them is left from an earlier step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

SECTION_WORDS = 16
"""Sections start at multiples of this many words: 64 bytes."""

# words of the header
STAMP, NUM_ROWS, NUM_TOKENS, NUM_VALUES = range(4)
MAX_STAMP = 2**31 - 1
"""Steps are stamped 1, 2, ... up to here and then from 1 on again; 0 is no step."""

ERROR_SLOTS = 16
"""Steps whose faults are kept: that of a step lies in slot `stamp % ERROR_SLOTS`."""
ERROR_WORDS = 8
"""Words of such a slot: fault, row, value found, limit, stamp of the step; the rest is unused."""

FAULT_ROLLBACK = 1
"""A row's rollback is negative. Found: the rollback; limit: 0."""
FAULT_CTX = 2
"""A row has fewer tokens than it adds. Found: ctx - rollback; limit: q."""


class Sizes(Protocol):
    """What a layout asks of a configuration."""

    @property
    def max_num_seqs(self) -> int: ...
    @property
    def max_blocks_per_seq(self) -> int: ...


@dataclass(frozen=True, slots=True, init=False)
class SlabLayout:
    """Where the sections of a slab start, in words.

    Attributes:
        num_rows: rows that each section of rows has room for.
        ctx, q, slot, run_column, run_start, values: first word of a section.
        num_words: words of a slab.
    """

    num_rows: int
    ctx: int
    q: int
    slot: int
    run_column: int
    run_start: int
    values: int
    num_words: int

    def __init__(self, cfg: Sizes) -> None:
        rows = cfg.max_num_seqs
        at = SECTION_WORDS
        for name, size in (
            ("ctx", rows),
            ("q", rows),
            ("slot", rows),
            ("run_column", rows),
            ("run_start", rows + 1),
            ("values", rows * cfg.max_blocks_per_seq),
        ):
            object.__setattr__(self, name, at)
            at += -(-size // SECTION_WORDS) * SECTION_WORDS
        object.__setattr__(self, "num_rows", rows)
        object.__setattr__(self, "num_words", at)
