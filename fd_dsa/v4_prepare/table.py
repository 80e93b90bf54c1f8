"""The host's copy of the block table: which cells are set, and which the device does not have."""

from __future__ import annotations

from operator import index
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from fd_dsa.errors import V4PrepareError
from fd_dsa.v4_prepare.checks import cells_are_good
from fd_dsa.v4_prepare.config import V4PrepareConfig

Int32Array = npt.NDArray[np.int32]


class TableChange(NamedTuple):
    """What the table of a step changes in the rows of the step.

    Attributes:
        is_active: bool [B]; idle rows keep their blocks.
        num_set, num_sent: int32 [B]; set cells of the active rows afterwards, and how many of
            them the device has already.
        cells, blocks: [n]; which cells of the whole table change, row by row, and to what.
    """

    is_active: npt.NDArray[np.bool_]
    num_set: Int32Array
    num_sent: Int32Array
    cells: npt.NDArray[np.int64]
    blocks: npt.NDArray[Any]


_NONE = np.empty(0, np.int32)
UNCHANGED = TableChange(_NONE.astype(np.bool_), _NONE, _NONE, _NONE.astype(np.int64), _NONE)
"""The change of a table that says what was known."""


class TableMirror:
    """The block table as its owner last described it; every set cell of it was checked.

    A row's set cells are its first ones, without holes. The device has the first `num_sent` of
    them, and the rest goes with the next step that has the row. So a step costs the host one
    comparison of lengths, however long its rows are.

    Args:
        cfg: sizes of the steps.

    Attributes:
        num_tokens: int64 [max_num_seqs]; tokens that the set cells of each row hold.
        has_news: whether any row may have cells that the device lacks.
    """

    def __init__(self, cfg: V4PrepareConfig) -> None:
        rows, columns = cfg.max_num_seqs, cfg.max_blocks_per_seq
        self._cfg = cfg
        self._cells: Int32Array = np.full((rows, columns), -1, np.int32)
        self._flat: Int32Array = self._cells.reshape(-1)
        self._first_cells = np.arange(rows, dtype=np.int32) * columns
        self._columns = np.arange(columns, dtype=np.int32)
        self._num_set = np.zeros(rows, np.int32)
        self._num_sent = np.zeros(rows, np.int32)
        self.num_tokens = np.zeros(rows, np.int64)
        self.has_news = False

    def set_blocks(self, row: int, block_ids: Any, start: int = 0) -> None:
        """Put `block_ids` in the place of a row's cells from `start` on; see `V4Prepare`."""
        row, start, ids = self._checked(row, np.asarray(block_ids), start)
        stop = start + len(ids)
        self._cells[row, start:stop] = ids
        self._num_set[row] = stop
        self.num_tokens[row] = stop * self._cfg.block_size
        if start < self._num_sent[row]:
            self._num_sent[row] = start
        self.has_news = True

    def table_of(self, num_rows: int) -> Int32Array:
        """A copy of the first rows, -1 where no cell is set."""
        table = self._cells[:num_rows].copy()
        table[self._columns >= self._num_set[:num_rows, None]] = -1
        return table

    def compare(
        self, table: npt.NDArray[Any], ctx: npt.NDArray[Any], q: npt.NDArray[Any]
    ) -> TableChange | None:
        """What the table of a step changes; nothing is written yet.

        Args:
            table: [B, columns], any integer dtype.
            ctx, q: [B], checked.

        Returns:
            None if a cell that a row needs is missing or is no block.
        """
        num_rows, is_active = len(q), q > 0
        needed = (ctx.astype(np.int32, copy=False) - 1) // self._cfg.block_size + 1
        needed *= is_active
        width = int(needed.max(initial=0))
        if width > table.shape[1]:
            return None
        table = table[:, :width]
        changed = np.flatnonzero(table != self._cells[:num_rows, :width])
        if not len(changed) and (needed == self._num_set[:num_rows]).all():
            return UNCHANGED
        grown = np.flatnonzero(needed > self._num_set[:num_rows])
        if len(grown) and not self._are_blocks(table[grown], needed[grown]):
            return None
        row, column = np.divmod(changed, max(width, 1))
        # cells that no token needs may hold anything
        is_needed = column < needed[row]
        row, column = row[is_needed], column[is_needed]
        blocks = table[row, column]
        if not cells_are_good(blocks, self._cfg.num_blocks).all():
            return None
        first = needed.copy()
        # backwards: of the changed cells of a row, the first one stays
        first[row[::-1]] = column[::-1]
        num_sent = np.minimum(self._num_sent[:num_rows], first)
        cells = row * self._cells.shape[1] + column
        return TableChange(is_active, needed, num_sent, cells, blocks)

    def _are_blocks(self, cells: npt.NDArray[Any], needed: Int32Array) -> bool:
        """Whether the first cells of each row are blocks; one that equals a stale cell is none."""
        behind = self._columns[: cells.shape[1]] >= needed[:, None]
        return bool((behind | cells_are_good(cells, self._cfg.num_blocks)).all())

    def apply(self, change: TableChange) -> None:
        """Take over what `compare` found."""
        is_active, num_rows = change.is_active, len(change.is_active)
        self._flat[change.cells] = change.blocks
        np.copyto(self._num_set[:num_rows], change.num_set, where=is_active)
        np.copyto(self._num_sent[:num_rows], change.num_sent, where=is_active)
        num_set, num_tokens = self._num_set[:num_rows], self.num_tokens[:num_rows]
        np.multiply(num_set, self._cfg.block_size, out=num_tokens, dtype=np.int64)
        self.has_news = True

    def write_runs(
        self, num_rows: int, run_column: Int32Array, run_start: Int32Array, values: Int32Array
    ) -> int:
        """Write the cells that the device lacks in the first rows; how many they are.

        Args:
            run_column: int32 [max_num_seqs]; takes the first such column of a row.
            run_start: int32 [max_num_seqs + 1], starting with 0; takes the prefix sums.
            values: int32 [max_num_seqs * max_blocks_per_seq]; takes the cells.
        """
        num_sent = self._num_sent[:num_rows]
        counts = self._num_set[:num_rows] - num_sent
        run_column[:num_rows] = num_sent
        starts = run_start[: num_rows + 1]
        np.add.accumulate(counts, out=starts[1:])
        num_cells = int(starts[num_rows])
        run_start[num_rows + 1 :] = num_cells
        if num_cells:
            cells = (self._first_cells[:num_rows] + num_sent - starts[:num_rows]).repeat(counts)
            cells += np.arange(num_cells, dtype=np.int32)
            # not "raise", which would go through a copy
            self._flat.take(cells, out=values[:num_cells], mode="clip")
        return num_cells

    def mark_sent(self, num_rows: int) -> None:
        """The device gets the cells of these rows with a step that is on its way."""
        if self.has_news:
            self._num_sent[:num_rows] = self._num_set[:num_rows]
            waiting = self._num_sent[num_rows:] != self._num_set[num_rows:]
            self.has_news = bool(np.logical_or.reduce(waiting))

    def _checked(
        self, row: int, ids: npt.NDArray[Any], start: int
    ) -> tuple[int, int, npt.NDArray[Any]]:
        """Row, first column and new cells, if they may be set."""
        cfg, row, start = self._cfg, index(row), index(start)
        if not 0 <= row < cfg.max_num_seqs:
            raise ValueError(
                f"row: got {row}, allowed is 0..{cfg.max_num_seqs - 1} = max_num_seqs - 1; "
                "name a row of the buffers"
            )
        if not 0 <= start <= self._num_set[row]:
            raise ValueError(
                f"start: got {start}, row {row} has {self._num_set[row]} blocks, allowed is "
                f"0..{self._num_set[row]}; set the blocks before it first"
            )
        if not ids.size:
            return row, start, ids.reshape(0)
        if ids.ndim != 1 or ids.dtype.kind not in "iu":
            raise V4PrepareError(
                "E_DTYPE",
                row,
                f"block_ids of shape {list(ids.shape)} and dtype {ids.dtype}, must be [n] integers",
            )
        stop = start + len(ids)
        if stop > cfg.max_blocks_per_seq:
            raise V4PrepareError(
                "E_TABLE", row, f"needs {stop} blocks, table has {cfg.max_blocks_per_seq} columns"
            )
        if not cells_are_good(ids, cfg.num_blocks).all():
            column = int(cells_are_good(ids, cfg.num_blocks).argmin())
            raise V4PrepareError(
                "E_BLOCK",
                row,
                f"block_table[{start + column}]={ids[column]} not in [0, {cfg.num_blocks})",
            )
        return row, start, ids
