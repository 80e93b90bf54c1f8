"""The host's copy of the block table: which cells are set, and which the device does not have."""

from __future__ import annotations

from operator import index
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from fd_dsa.errors import V4PrepareError
from fd_dsa.v4_prepare.checks import cells_are_good, check_cells
from fd_dsa.v4_prepare.config import V4PrepareConfig

Int32Array = npt.NDArray[np.int32]
# a row, its first new column, and its blocks from there on
Run = tuple[int, int, npt.NDArray[Any]]


class TableMirror:
    """The block table as its owner last described it; every set cell of it was checked.

    A row's set cells are its first ones, without holes. The device has the first `num_sent` of
    them, and the rest goes with the next step that has the row. So a step costs the host one
    comparison of lengths, however long its rows are.

    Args:
        cfg: sizes of the steps.

    Attributes:
        version: changes whenever a set cell may have; no two states of a table have the same.
        has_news: whether any row may have cells that the device lacks.
    """

    def __init__(self, cfg: V4PrepareConfig) -> None:
        rows, columns = cfg.max_num_seqs, cfg.max_blocks_per_seq
        self._cfg = cfg
        self._cells: Int32Array = np.full((rows, columns), -1, np.int32)
        self._num_set = np.zeros(rows, np.int32)
        self._num_sent = np.zeros(rows, np.int32)
        # tokens in so many blocks, no more than a row may have at all
        tokens = np.arange(columns + 1) * cfg.block_size
        self._tokens_of = np.minimum(tokens, cfg.max_model_len).astype(np.int32)
        self.version = 0
        self.has_news = False
        # ascending rows, columns and blocks of the last append, if the device lacks nothing else
        self._appended: tuple[npt.NDArray[Any], Int32Array, npt.NDArray[Any]] | None = None
        self._row_ends = np.arange(rows + 1)

    def room(self, num_rows: int) -> Int32Array:
        """int32 [num_rows]: tokens that the set cells of each row hold, at most max_model_len."""
        # not "raise", which would go through a copy
        return self._tokens_of.take(self._num_set[:num_rows], mode="clip")

    def set_blocks(self, row: int, block_ids: Any, start: int = 0) -> None:
        """Replace a row's cells from `start` on with `block_ids`; see `V4Prepare`."""
        row, start, ids = self._checked(row, np.asarray(block_ids), start)
        self.put([(row, start, ids)])

    def put(self, runs: list[Run]) -> None:
        """Replace the cells of each row from a column on with checked blocks."""
        for row, start, ids in runs:
            stop = start + len(ids)
            self._cells[row, start:stop] = ids
            self._num_set[row] = stop
            if start < self._num_sent[row]:
                self._num_sent[row] = start
        self.version += 1
        self.has_news, self._appended = True, None

    def append_blocks(self, rows: Any, block_ids: Any) -> None:
        """Put one more cell after those of each of some rows; see `V4Prepare`."""
        # copies: they are kept until they are sent
        rows, ids = np.array(rows), np.array(block_ids)
        kinds = rows.dtype.kind + ids.dtype.kind
        if rows.shape != ids.shape or rows.ndim != 1 or kinds.strip("iu"):
            _check_pairs(rows, ids)
        row_list, id_list = rows.tolist(), ids.tolist()
        if not row_list:
            return
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
        self._appended = None
        if ordered == row_list and not self.has_news:
            self._appended = rows, columns, ids
        self.version += 1
        self.has_news = True

    def table_of(self, num_rows: int, width: int | None = None) -> Int32Array:
        """A copy of the first rows and columns, -1 where no cell is set."""
        table = self._cells[:num_rows, :width].copy()
        table[np.arange(table.shape[1]) >= self._num_set[:num_rows, None]] = -1
        return table

    def changes(
        self, table: npt.NDArray[Any], ctx: npt.NDArray[Any], q: npt.NDArray[Any]
    ) -> list[Run] | None:
        """What the table of a step changes; nothing is written yet.

        Args:
            table: [B, columns], any integer dtype.
            ctx, q: [B], checked.

        Returns:
            None if a cell that a row needs is missing or is no block.
        """
        num_rows, num_set = len(q), self._num_set[: len(q)]
        needed = (ctx.astype(np.int32, copy=False) - 1) // self._cfg.block_size + 1
        needed *= q > 0
        width = int(needed.max(initial=0))
        if width > table.shape[1]:
            return None
        table = table[:, :width]
        # the first cell of each row that is not known, or known to be another block
        first = np.minimum(needed, num_set)
        differing = np.flatnonzero(table != self._cells[:num_rows, :width])
        if len(differing):
            row, column = np.divmod(differing, width)
            is_known = column < first[row]
            # backwards: of the cells of a row the first one stays
            first[row[is_known][::-1]] = column[is_known][::-1]
        rows = np.flatnonzero((q > 0) & ((first < needed) | (needed < num_set)))
        if not len(rows):
            return []
        table, columns = table[rows], np.arange(width)
        is_new = (columns >= first[rows, None]) & (columns < needed[rows, None])
        if not (cells_are_good(table, self._cfg.num_blocks) | ~is_new).all():
            return None
        bounds = zip(rows.tolist(), table, first[rows].tolist(), needed[rows].tolist(), strict=True)
        return [(row, start, cells[start:stop]) for row, cells, start, stop in bounds]

    def write_runs(
        self, num_rows: int, run_column: Int32Array, run_start: Int32Array, values: Int32Array
    ) -> int:
        """Write the cells that the device lacks in the first rows; how many they are.

        They count as sent: they go with a step that is on its way.

        Args:
            run_column: int32 [max_num_seqs]; takes the first such column of a row.
            run_start: int32 [max_num_seqs + 1]; takes the prefix sums.
            values: int32 [max_num_seqs * max_blocks_per_seq]; takes the cells.
        """
        num_set, num_sent = self._num_set[:num_rows], self._num_sent[:num_rows]
        appended, self._appended = self._appended, None
        if appended is not None and appended[0][-1] < num_rows:
            # what decoding needs at the ends of blocks: one cell a row, in few calls
            rows, columns, blocks = appended
            num_cells = len(rows)
            run_column[rows] = columns
            run_start[:] = rows.searchsorted(self._row_ends)
            values[:num_cells] = blocks
            num_sent[:] = num_set
            self.has_news = False
            return num_cells
        rows = (num_set != num_sent).nonzero()[0]
        first = num_sent[rows]
        run_column[rows] = first
        run_start.fill(0)
        run_start[rows + 1] = num_set[rows] - first
        np.add.accumulate(run_start, out=run_start)
        num_cells = int(run_start[-1])
        if num_cells:
            runs = zip(rows.tolist(), first.tolist(), num_set[rows].tolist(), strict=True)
            np.concatenate([self._cells[r, a:b] for r, a, b in runs], out=values[:num_cells])
        num_sent[:] = num_set
        self.has_news = bool((self._num_set[num_rows:] != self._num_sent[num_rows:]).any())
        return num_cells

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
            return row, start, ids.reshape(0).astype(np.int32)
        if ids.ndim != 1 or ids.dtype.kind not in "iu":
            text = f"block_ids of shape {list(ids.shape)} and dtype {ids.dtype}"
            raise V4PrepareError("E_DTYPE", row, f"{text}, must be [n] integers")
        stop = start + len(ids)
        if stop > cfg.max_blocks_per_seq or not cells_are_good(ids, cfg.num_blocks).all():
            check_cells(cfg, row, ids.tolist(), stop, cfg.max_blocks_per_seq, start)
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


def _check_pairs(rows: npt.NDArray[Any], block_ids: npt.NDArray[Any]) -> None:
    """Refuse rows and blocks that are no arrays of integers, or not equally many."""
    for name, array in (("rows", rows), ("block_ids", block_ids)):
        if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
            text = f"{name} of shape {list(array.shape)} and dtype {array.dtype}"
            raise V4PrepareError("E_DTYPE", -1, f"{text}, must be [n] integers")
    if rows.shape != block_ids.shape:
        raise V4PrepareError("E_SHAPE", -1, f"got {len(rows)} rows and {len(block_ids)} block_ids")
