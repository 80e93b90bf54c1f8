"""The host's copy of the block table: which cells are set, and which the device does not have."""

from __future__ import annotations

from operator import index

import numpy as np
import numpy.typing as npt

from fd_dsa.errors import V4PrepareError
from fd_dsa.v4_prepare.checks import Integers, cells_are_good, check_cells, num_blocks_needed
from fd_dsa.v4_prepare.config import V4PrepareConfig

Int32Array = npt.NDArray[np.int32]
# a row, its first new column, and its blocks from there on
Run = tuple[int, int, Integers]


class BlockTable:
    """The block table as its owner last described it; every set cell of it was checked.

    A row's set cells are its first ones, without holes. Those that the device lacks are the last
    of them, and go with the next step that has the row. So a step costs the host one comparison of
    lengths, however long its rows are.

    Attributes:
        room: int32 [max_num_seqs], tokens that the set cells of each row hold, at most
            max_model_len.
        news: of rows with cells that the device lacks, the first such column and the cells.
    """

    def __init__(self, cfg: V4PrepareConfig) -> None:
        self._cfg = cfg
        self._cells = np.full((cfg.max_num_seqs, cfg.max_blocks_per_seq), -1, np.int32)
        self._num_set, self.room = np.zeros((2, cfg.max_num_seqs), np.int32)
        self.news: dict[int, tuple[int, Int32Array]] = {}

    def set_blocks(self, row: int, block_ids: npt.ArrayLike, start: int) -> None:
        """Replace a row's cells from `start` on with `block_ids`; see `V4Prepare`."""
        cfg, row, start, ids = self._cfg, index(row), index(start), np.asarray(block_ids)
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
        if ids.size and (ids.ndim != 1 or ids.dtype.kind not in "iu"):
            text = f"block_ids of shape {list(ids.shape)} and dtype {ids.dtype}"
            raise V4PrepareError("E_DTYPE", row, f"{text}, must be [n] integers")
        check_cells(cfg, row, ids.tolist(), start + ids.size, cfg.max_blocks_per_seq, start)
        self.put([(row, start, ids.reshape(-1))])

    def put(self, runs: list[Run]) -> None:
        """Replace the cells of each row from a column on with checked blocks."""
        cfg = self._cfg
        for row, start, ids in runs:
            stop = start + len(ids)
            first = min(start, self.news[row][0]) if row in self.news else start
            cells = self._cells[row, first:stop]
            cells[start - first :] = ids
            self.news[row] = first, cells
            self._num_set[row] = stop
            self.room[row] = min(stop * cfg.block_size, cfg.max_model_len)

    def table_of(self, num_rows: int, width: int | None = None) -> Int32Array:
        """A copy of the first rows and columns, -1 where no cell is set."""
        table = self._cells[:num_rows, :width].copy()
        table[np.arange(table.shape[1]) >= self._num_set[:num_rows, None]] = -1
        return table

    def changes(self, ctx: Integers, q: Integers, table: Integers | None) -> list[Run] | None:
        """What the table of a step changes; nothing is written yet.

        Args:
            ctx, q: [B], checked.
            table: [B, columns]; None = the cells that are set.

        Returns:
            None if a cell that a row needs is missing or is no block.
        """
        needed, num_set = num_blocks_needed(self._cfg, ctx, q), self._num_set[: len(q)]
        if table is None:
            return None if (needed > num_set).any() else []
        width = int(needed.max(initial=0))
        if width > table.shape[1]:
            return None
        first = np.minimum(needed, num_set)
        differs = table[:, :width] != self._cells[: len(q), :width]
        # in one dimension, which takes a tenth of the time of two
        places = differs.ravel().nonzero()[0]
        if len(places):
            rows, columns = np.divmod(places, width)
            is_known = columns < first[rows]
            # backwards: of the cells of a row that differ, the first one stays
            first[rows[is_known][::-1]] = columns[is_known][::-1]
        changed = ((q > 0) & ((first < needed) | (needed < num_set))).nonzero()[0].tolist()
        runs = [(row, int(first[row]), table[row, first[row] : needed[row]]) for row in changed]
        cells = np.concatenate([ids for _, _, ids in runs]) if runs else table[:0]
        return runs if cells_are_good(cells, self._cfg.num_blocks).all() else None

    def send(
        self, num_rows: int, run_column: Int32Array, run_start: Int32Array, values: Int32Array
    ) -> int:
        """Write the cells that the device lacks in the first rows; how many they are.

        They count as sent: they go with a step that is on its way. Rows that the step lacks keep
        their news for a later one.

        Args:
            run_column: int32 [max_num_seqs]; takes the first such column of each row that has any.
            run_start: int32 [max_num_seqs + 1] of zeros; takes the prefix sums.
            values: int32 [max_num_seqs * max_blocks_per_seq]; takes the cells.
        """
        end = 0
        for row in sorted(self.news):
            if row < num_rows:
                run_column[row], cells = self.news.pop(row)
                begin, end = end, end + len(cells)
                values[begin:end] = cells
                run_start[row + 1 :] = end
        return end
