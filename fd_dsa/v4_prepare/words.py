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

    A step thus writes its own rows, and the rows which only the step before it had.

    Args:
        layout: where the sections of a slab start.
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
        self._first_rows: dict[int, _Lengths] = {}
        self._num_rows = 0
        self._has_runs = False

    def write(
        self,
        slab: Int32Array,
        stamp: int,
        lengths: tuple[npt.NDArray[Any], npt.NDArray[Any], npt.NDArray[Any]],
        num_tokens: int,
        table: TableMirror,
    ) -> int:
        """Fill a slab with a step that has passed all checks; how many of its words count.

        Args:
            slab: int32 [num_words]; whatever it holds.
            stamp: number of the step.
            lengths: ctx, q and slot [B].
            num_tokens: T.
            table: its cells which the device lacks go along.
        """
        words, num_rows = self._words, len(lengths[0])
        ctx, q, slot = self._first(num_rows)
        ctx[:], q[:], slot[:] = lengths
        if num_rows < self._num_rows:
            for section, nothing in zip(self._lengths, (0, 0, -1), strict=True):
                section[num_rows : self._num_rows] = nothing
        self._num_rows = num_rows
        num_values = 0
        if table.has_news:
            values = slab[self._num_words :]
            num_values = table.write_runs(num_rows, self._run_column, self._run_start, values)
            self._has_runs = True
        elif self._has_runs:
            self._run_start.fill(0)
            self._has_runs = False
        words[STAMP] = stamp
        words[NUM_ROWS] = num_rows
        words[NUM_TOKENS] = num_tokens
        words[NUM_VALUES] = num_values
        slab[: self._num_words] = words
        return self._num_words + num_values

    def _first(self, num_rows: int) -> _Lengths:
        """The sections of the rows, cut to the first ones."""
        found = self._first_rows.get(num_rows)
        if found is None:
            ctx, q, slot = self._lengths
            found = ctx[:num_rows], q[:num_rows], slot[:num_rows]
            self._first_rows[num_rows] = found
        return found
