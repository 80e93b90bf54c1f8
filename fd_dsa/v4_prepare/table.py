"""The host's copy of the block table: which cells are set, and which the device does not have."""

from __future__ import annotations

from operator import index
from typing import Any, NamedTuple, NoReturn

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
        version: changes whenever a set cell may have; no two states of a table have the same.
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
        self._counts = np.zeros(rows, np.int32)
        # tokens in so many blocks, no more than a row may have at all
        tokens = np.arange(columns + 1) * cfg.block_size
        self._tokens_of = np.minimum(tokens, cfg.max_model_len).astype(np.int32)
        self.version = 0
        # the rows from here on have no cells that the device lacks
        self._news_end = 0
        # ascending rows, columns and blocks of the last append, if the device lacks nothing else
        self._appended: tuple[npt.NDArray[Any], Int32Array, npt.NDArray[Any]] | None = None
        self._row_ends = np.arange(rows + 1)

    @property
    def has_news(self) -> bool:
        """Whether any row may have cells that the device lacks."""
        return self._news_end > 0

    def room(self, num_rows: int, out: Int32Array | None = None) -> Int32Array:
        """int32 [num_rows]: tokens that the set cells of each row hold, at most max_model_len."""
        # not "raise", which would go through a copy
        return self._tokens_of.take(self._num_set[:num_rows], out=out, mode="clip")

    def set_blocks(self, row: int, block_ids: Any, start: int = 0) -> None:
        """Put `block_ids` in the place of a row's cells from `start` on; see `V4Prepare`."""
        row, start, ids = self._checked(row, np.asarray(block_ids), start)
        stop = start + len(ids)
        self._cells[row, start:stop] = ids
        self._num_set[row] = stop
        if start < self._num_sent[row]:
            self._num_sent[row] = start
        self._changed(row + 1)

    def append_blocks(self, rows: Any, block_ids: Any) -> None:
        """Put one more cell behind those of each of some rows; see `V4Prepare`."""
        # copies: some are kept until they are sent
        rows, ids = np.array(rows), np.array(block_ids)
        if rows.shape != ids.shape or rows.ndim != 1:
            _raise_pair_fault(rows, ids)
        row_list, id_list = rows.tolist(), ids.tolist()
        if not row_list:
            return
        if rows.dtype.kind not in "iu" or ids.dtype.kind not in "iu":
            _raise_pair_fault(rows, ids)
        ordered = sorted(set(row_list))
        if (
            ordered[0] < 0
            or ordered[-1] >= self._cfg.max_num_seqs
            or len(ordered) < len(row_list)
            or min(id_list) < 0
            or max(id_list) >= self._cfg.num_blocks
        ):
            self._raise_first_fault(row_list, id_list)
        columns = self._num_set[rows]
        if max(columns.tolist()) == self._cfg.max_blocks_per_seq:
            self._raise_first_fault(row_list, id_list)
        self._cells[rows, columns] = ids
        self._num_set[rows] = columns + 1
        is_all_news = not self.has_news and ordered == row_list
        self._changed(ordered[-1] + 1)
        if is_all_news:
            self._appended = rows, columns, ids

    def _changed(self, end: int) -> None:
        """Cells of rows before `end` have changed."""
        self.version += 1
        self._appended = None
        if end > self._news_end:
            self._news_end = end

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
        self._changed(num_rows)

    def write_runs(
        self, num_rows: int, run_column: Int32Array, run_start: Int32Array, values: Int32Array
    ) -> int:
        """Write the cells that the device lacks in the first rows; how many they are.

        Args:
            run_column: int32 [max_num_seqs]; takes the first such column of a row.
            run_start: int32 [max_num_seqs + 1], starting with 0; takes the prefix sums.
            values: int32 [max_num_seqs * max_blocks_per_seq]; takes the cells.
        """
        if self._appended is not None and self._news_end <= num_rows:
            rows, columns, blocks = self._appended
            run_column[rows] = columns
            # one cell a row: of the rows before each
            run_start[:] = rows.searchsorted(self._row_ends)
            values[: len(rows)] = blocks
            return len(rows)
        num_sent, counts = self._num_sent[:num_rows], self._counts[:num_rows]
        np.subtract(self._num_set[:num_rows], num_sent, out=counts)
        run_column[:num_rows] = num_sent
        np.add.accumulate(counts, out=run_start[1 : num_rows + 1])
        num_cells = int(run_start[num_rows])
        run_start[num_rows + 1 :] = num_cells
        if num_cells:
            cells = (self._first_cells[:num_rows] + num_sent - run_start[:num_rows]).repeat(counts)
            cells += np.arange(num_cells, dtype=np.int32)
            # not "raise", which would go through a copy
            self._flat.take(cells, out=values[:num_cells], mode="clip")
        return num_cells

    def mark_sent(self, num_rows: int) -> None:
        """The device gets the cells of these rows with a step that is on its way."""
        self._num_sent[:num_rows] = self._num_set[:num_rows]
        self._appended = None
        if self._news_end <= num_rows:
            self._news_end = 0

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

    def _raise_first_fault(self, rows: list[int], block_ids: list[int]) -> NoReturn:
        """The error of the first row to which its block cannot be appended."""
        seen: set[int] = set()
        for row, block in zip(rows, block_ids, strict=True):
            start = int(self._num_set[row]) if 0 <= row < self._cfg.max_num_seqs else 0
            self._checked(row, np.array([block]), start)
            if row in seen:
                raise ValueError(f"rows: got row {row} twice; set several blocks with set_blocks")
            seen.add(row)
        raise AssertionError("blocks were refused of which each may be appended")


def _raise_pair_fault(rows: npt.NDArray[Any], block_ids: npt.NDArray[Any]) -> NoReturn:
    """The error of rows and blocks that are no arrays of integers, or not equally many."""
    for name, array in (("rows", rows), ("block_ids", block_ids)):
        if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
            raise V4PrepareError(
                "E_DTYPE",
                -1,
                f"{name} of shape {list(array.shape)} and dtype {array.dtype}, must be [n] "
                "integers",
            )
    raise V4PrepareError("E_SHAPE", -1, f"got {len(rows)} rows and {len(block_ids)} block_ids")
