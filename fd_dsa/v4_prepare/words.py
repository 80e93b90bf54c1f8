"""Writes a step into a slab, in few NumPy calls on views that are made once."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from fd_dsa.v4_prepare.slab import NUM_ROWS, NUM_TOKENS, NUM_VALUES, STAMP, SlabLayout
from fd_dsa.v4_prepare.table import Int32Array, TableMirror

_Lengths = tuple[Int32Array, Int32Array, Int32Array]


class StepWords:
    """The words in front of a slab's values, kept from step to step and copied as they are.

    A step thus writes only what differs from the step before it.

    Args:
        layout: where the sections of a slab start.

    Attributes:
        num_tokens: T of the last step.
    """

    def __init__(self, layout: SlabLayout) -> None:
        self._num_words = layout.values
        self._words: Int32Array = np.zeros(layout.values, np.int32)
        rows = layout.num_rows
        self._lengths: _Lengths = (
            self._words[layout.ctx :][:rows],
            self._words[layout.q :][:rows],
            self._words[layout.slot :][:rows],
        )
        self._lengths[2].fill(-1)
        self._run_column = self._words[layout.run_column :][:rows]
        self._run_start = self._words[layout.run_start :][: rows + 1]
        self._ctx = self._lengths[0][:0]
        self._num_rows = self.num_tokens = 0
        self._has_runs = False

    def take_rows(self, q: npt.NDArray[Any], slot: npt.NDArray[Any], num_tokens: int) -> None:
        """The numbers of tokens and the slots [B] of the steps from now on, and their T."""
        num_rows = len(q)
        self._ctx = self._lengths[0][:num_rows]
        self._lengths[1][:num_rows], self._lengths[2][:num_rows] = q, slot
        if num_rows < self._num_rows:
            for section, nothing in zip(self._lengths, (0, 0, -1), strict=True):
                section[num_rows : self._num_rows] = nothing
        self._num_rows, self.num_tokens = num_rows, num_tokens
        self._words[NUM_ROWS] = num_rows
        self._words[NUM_TOKENS] = num_tokens

    def write(self, slab: Int32Array, stamp: int, ctx: npt.NDArray[Any], table: TableMirror) -> int:
        """Fill a slab with a step that has passed all checks; how many of its words count.

        Args:
            slab: int32 [num_words]; whatever it holds.
            stamp: number of the step.
            ctx: [B]; B is that of `take_rows`.
            table: its cells which the device lacks go along.
        """
        words, num_rows = self._words, self._num_rows
        self._ctx[:] = ctx
        words[STAMP] = stamp
        num_values = 0
        if table.has_news:
            values = slab[self._num_words :]
            num_values = table.write_runs(num_rows, self._run_column, self._run_start, values)
            self._has_runs = True
        elif self._has_runs:
            self._run_start.fill(0)
            self._has_runs = False
        words[NUM_VALUES] = num_values
        slab[: self._num_words] = words
        return self._num_words + num_values
