"""The words that go from the host to the device in one copy a step, and those that come back.

A slab is int32: a header, five sections of equally many words, then the cells of the block table
that changed:

    header        stamp, rows B, tokens T, number n of changed cells; the rest is 0
    ctx, q, slot  [max_num_seqs] each; rows from B on: 0, 0, -1
    run_column    [max_num_seqs]: the first changed column of a row
    run_start     [max_num_seqs + 1]: where a row's new cells start among `values`
    values        [n]: the new cells of row b from run_start[b] to run_start[b + 1]

Row b's cells from `run_column[b]` on change, one run a row; rows from B on have none. Only the
words up to the last value are copied; those after it are left from an earlier step.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from fd_dsa.v4_prepare.config import V4PrepareConfig
from fd_dsa.v4_prepare.table import Int32Array, TableMirror

HEADER_WORDS = 16
"""Sections start at multiples of this many words: 64 bytes."""
MAX_STAMP = 2**31 - 1
"""Steps are stamped 1, 2, ... up to here and then from 1 on again; 0 is no step."""
ERROR_SLOTS = 16
"""Steps whose faults are kept; the fault of a step goes to slot `stamp % ERROR_SLOTS`."""
ERROR_WORDS = 8
"""Words of such a slot: fault, row, value found, limit, stamp of the step; the rest is unused."""
FAULT_ROLLBACK = 1
"""A row's rollback is negative. Found: the rollback; limit: 0."""
FAULT_CTX = 2
"""A row has fewer tokens than it adds. Found: ctx - rollback; limit: q."""

_STAMP, _NUM_ROWS, _NUM_TOKENS, _NUM_VALUES = range(4)


def section_words(cfg: V4PrepareConfig) -> int:
    """Words of each section of rows."""
    return -(-(cfg.max_num_seqs + 1) // HEADER_WORDS) * HEADER_WORDS


def slab_words(cfg: V4PrepareConfig) -> int:
    """Words of a slab in which every cell of the table changes, a multiple of HEADER_WORDS."""
    cells = cfg.max_num_seqs * cfg.max_blocks_per_seq
    return HEADER_WORDS + 5 * section_words(cfg) + -(-cells // HEADER_WORDS) * HEADER_WORDS


class StepWords:
    """Header and sections of the steps, kept from step to step and copied into a slab as they are.

    A step thus writes only what differs from the step before it.
    """

    def __init__(self, cfg: V4PrepareConfig) -> None:
        rows, section = cfg.max_num_seqs, section_words(cfg)
        self._words: Int32Array = np.zeros(HEADER_WORDS + 5 * section, np.int32)
        sections = self._words[HEADER_WORDS:].reshape(5, section)
        self._ctx, self._q, self._slot, self._run_column = sections[:4, :rows]
        self._run_start = sections[4, : rows + 1]
        self._slot.fill(-1)
        self._num_rows = 0
        self._has_runs = False

    def take_rows(self, q: npt.NDArray[Any], slot: npt.NDArray[Any], num_tokens: int) -> None:
        """The numbers of tokens and the slots [B] of the steps from now on, and their T."""
        num_rows = self._num_rows = len(q)
        self._q[:num_rows], self._slot[:num_rows] = q, slot
        self._ctx[num_rows:], self._q[num_rows:], self._slot[num_rows:] = 0, 0, -1
        self._words[_NUM_ROWS], self._words[_NUM_TOKENS] = num_rows, num_tokens

    def write(self, slab: Int32Array, stamp: int, ctx: npt.NDArray[Any], table: TableMirror) -> int:
        """Fill a slab with a step that has passed all checks; how many of its words count.

        Args:
            slab: int32 [slab_words]; whatever it holds.
            stamp: number of the step.
            ctx: [B]; B is that of `take_rows`.
            table: its cells which the device lacks go along.
        """
        words = self._words
        self._ctx[: self._num_rows] = ctx
        num_values = 0
        if table.has_news:
            values = slab[len(words) :]
            num_values = table.write_runs(self._num_rows, self._run_column, self._run_start, values)
            self._has_runs = True
        elif self._has_runs:
            self._run_start.fill(0)
            self._has_runs = False
        words[_STAMP], words[_NUM_VALUES] = stamp, num_values
        slab[: len(words)] = words
        return len(words) + num_values
