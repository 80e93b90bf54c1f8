"""Builders that get their steps out of slabs, as a device does, and build them in NumPy."""

from __future__ import annotations

import numpy as np

from fd_dsa.v4_prepare import V4Prepare, V4PrepareConfig
from fd_dsa.v4_prepare.prepare import HostSteps
from fd_dsa.v4_prepare.slab import HEADER_WORDS, StepWords, section_words, slab_words
from fd_dsa.v4_prepare.table import TableMirror


class SlabSteps(HostSteps):
    """Steps that are read out of slabs full of garbage, over a table that only slabs fill.

    Attributes:
        words: those that count of the slab filled last.
    """

    def __init__(self, cfg: V4PrepareConfig, table: TableMirror) -> None:
        super().__init__(cfg, table, lambda array: array)
        self._sent = np.full((cfg.max_num_seqs, cfg.max_blocks_per_seq), -77, np.int32)
        self._step_words, self._cfg, self._num_steps = StepWords(cfg), cfg, 0

    def take_rows(self, q: np.ndarray, slot: np.ndarray, num_tokens: int) -> None:
        self._step_words.take_rows(q, slot, num_tokens)

    def stage(self, ctx: np.ndarray) -> None:
        slab = np.full(slab_words(self._cfg), 0x5A5A5A5A, np.int32)
        self._num_steps += 1
        end = self._step_words.write(slab, self._num_steps, ctx, self._table)
        self.words = slab[:end].copy()
        stamp, num_rows, num_tokens, num_values = self.words[:4]
        ctx, q, slot, run_column, run_start = self.sections()
        assert (stamp, num_rows, num_tokens) == (self._num_steps, len(ctx), q.sum())
        assert run_start[0] == 0 and run_start[-1] == num_values == len(self.values())
        for row, (column, begin, stop) in enumerate(
            zip(run_column, run_start[:-1], run_start[1:], strict=True)
        ):
            self._sent[row, column : column + stop - begin] = self.values()[begin:stop]
        rows = self._cfg.max_num_seqs
        raw = self.words[HEADER_WORDS:].tolist()[: 3 * section_words(self._cfg)]
        for section, empty in enumerate((0, 0, -1)):
            first = section * section_words(self._cfg)
            assert raw[first + num_rows : first + rows] == [empty] * (rows - num_rows)
        self.staged.append((ctx, q, slot, self._sent[:num_rows].copy()))

    def sections(self) -> list[np.ndarray]:
        """ctx, q, slot of the rows; first changed column and starts of the runs of all rows."""
        num_rows, rows, size = int(self.words[1]), self._cfg.max_num_seqs, section_words(self._cfg)
        sections = self.words[HEADER_WORDS : HEADER_WORDS + 5 * size].reshape(5, size)
        return [*sections[:3, :num_rows], sections[3, :rows], sections[4, : rows + 1]]

    def values(self) -> list[int]:
        """The cells that travel."""
        return self.words[HEADER_WORDS + 5 * section_words(self._cfg) :].tolist()


def by_slabs(cfg: V4PrepareConfig) -> V4Prepare:
    """A builder whose steps travel in slabs."""
    prepare = V4Prepare(cfg, "numpy")
    prepare._steps = SlabSteps(cfg, prepare._table)
    prepare.buffers = prepare._steps.buffers
    return prepare
