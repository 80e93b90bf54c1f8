"""The host's copy of the block table, which tracks the cells that the device lacks."""

from __future__ import annotations

from operator import index

import numpy as np
import numpy.typing as npt

from fd_dsa.errors import V4PrepareError
from fd_dsa.v4_prepare.checks import Integers, cells_are_good, check_cells, num_blocks_needed
from fd_dsa.v4_prepare.config import V4PrepareConfig

Int32Array = npt.NDArray[np.int32]
# (row, first new column, blocks from that column on)
Run = tuple[int, int, Integers]


class BlockTable:
    """The block table as set by its owner. Every set cell has been checked.

    The set cells of a row are its first ones, without gaps. The cells that the device lacks are the
    last of them, and are sent with the next step that has the row. So a step costs the host one
    comparison of lengths, for rows of any length.

    Attributes:
        room: int32 [max_num_seqs], tokens in the set cells of each row, at most max_model_len.
        news: row -> (first column, cells) that the device lacks.
    """

    def __init__(self, cfg: V4PrepareConfig) -> None:
        self._cfg = cfg
        self._cells = np.full((cfg.max_num_seqs, cfg.max_blocks_per_seq), -1, np.int32)
        self._num_set, self.room = np.zeros((2, cfg.max_num_seqs), np.int32)
        self.news: dict[int, tuple[int, Int32Array]] = {}

    def set_blocks(self, row: int, block_ids: npt.ArrayLike, start: int) -> None:
        """Replace a row's cells from `start` on with `block_ids`. See `V4Prepare`."""
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
        """Return a copy of the first rows and columns, with -1 for unset cells."""
        table = self._cells[:num_rows, :width].copy()
        table[np.arange(table.shape[1]) >= self._num_set[:num_rows, None]] = -1
        return table

    def changes(self, ctx: Integers, q: Integers, table: Integers | None) -> list[Run] | None:
        """Return the changes of the table by a step, without writing them.

        Args:
            ctx, q: [B], checked.
            table: [B, columns]. None = the set cells.

        Returns:
            The changes, or None if a required cell is missing or invalid.
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
            # backwards, so that the first differing cell of each row remains
            first[rows[is_known][::-1]] = columns[is_known][::-1]
        changed = ((q > 0) & ((first < needed) | (needed < num_set))).nonzero()[0].tolist()
        runs = [(row, int(first[row]), table[row, first[row] : needed[row]]) for row in changed]
        cells = np.concatenate([ids for _, _, ids in runs]) if runs else table[:0]
        return runs if cells_are_good(cells, self._cfg.num_blocks).all() else None

    def send(
        self, num_rows: int, run_column: Int32Array, run_start: Int32Array, values: Int32Array
    ) -> int:
        """Write the cells that the device lacks in the first rows, and return their number.

        They count as sent, because the step is already being staged. Cells of other rows stay
        pending for a later step.

        Args:
            run_column: int32 [max_num_seqs], receives the first such column of each row that has
                any.
            run_start: int32 [max_num_seqs + 1] of zeros, receives the prefix sums.
            values: int32 [max_num_seqs * max_blocks_per_seq], receives the cells.
        """
        end = 0
        for row in sorted(self.news):
            if row < num_rows:
                run_column[row], cells = self.news.pop(row)
                begin, end = end, end + len(cells)
                values[begin:end] = cells
                run_start[row + 1 :] = end
        return end
