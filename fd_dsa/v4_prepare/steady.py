"""The check of a step that differs from the one before in `ctx` alone, as decoding steps mostly do.

Slots and numbers of tokens that were good once are good again. What is left of the checks is that
each row's context lies between two bounds, which takes one subtraction and one comparison.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from fd_dsa.v4_prepare.config import V4PrepareConfig
from fd_dsa.v4_prepare.table import Int32Array, TableMirror

# NumPy has one object for it
_INT32 = np.dtype(np.int32)
_ZERO = np.zeros((), np.int32)


class SteadyCheck:
    """Remembers the last step that was staged. It only knows good steps, it refuses none.

    It owns memory for results, so one object serves one thread.

    Args:
        cfg: sizes of the steps.
        table: the blocks of all rows.
    """

    def __init__(self, cfg: V4PrepareConfig, table: TableMirror) -> None:
        self._table = table
        # one above the longest context of an idle row, which may pass int32
        self._idle_bound = cfg.max_model_len + 1
        self._is_new = True
        self._shape: tuple[int, ...] = (-1,)
        self._q = self._slot = b""
        # version of the table for which the bounds hold
        self._version = -1
        self._take_rows(np.empty(0, np.int32))

    def remember(self, q: npt.NDArray[Any], slot: npt.NDArray[Any]) -> None:
        """Take a step that has passed all checks as the last one; q and slot [B], any integers."""
        self._is_new, self._shape = True, q.shape
        self._q = q.astype(np.int32, copy=False).tobytes()
        # the slot of an idle row may be any number: some bits of it matter as little as all
        self._slot = slot.astype(np.int32, copy=False).tobytes()

    def is_good(self, ctx: Any, q: Any, slot: Any) -> bool:
        """Whether a step with the table as it is is good, and differs in `ctx` alone.

        Args:
            ctx, q, slot: whatever `V4Prepare.stage` got.

        Returns:
            False also of good steps that differ in more, or are not of int32 arrays [B].
        """
        if not (
            type(ctx) is type(q) is type(slot) is np.ndarray
            and ctx.dtype is q.dtype is slot.dtype is _INT32
            and ctx.shape == q.shape == slot.shape == self._shape
            and q.tobytes() == self._q
            and slot.tobytes() == self._slot
        ):
            return False
        if self._is_new:
            self._take_rows(q)
        if self._version != self._table.version:
            self._set_bounds()
        np.subtract(ctx, q, out=self._before)
        np.greater_equal(self._before_unsigned, self._bounds_unsigned, out=self._is_bad)
        # a search in bytes costs a tenth of `any`
        return 1 not in self._is_bad.tobytes()

    def _take_rows(self, q: Int32Array) -> None:
        """Make memory and constants for the rows of the last step, once it is repeated."""
        self._before, self._bounds = np.empty((2, len(q)), np.int32)
        # as unsigned numbers, what is negative lies past every bound
        self._before_unsigned = self._before.view(np.uint32)
        self._bounds_unsigned = self._bounds.view(np.uint32)
        self._is_bad = np.empty(len(q), np.bool_)
        self._q_less_1 = q - 1
        self._idle = np.flatnonzero(q == 0)
        self._is_new, self._version = False, -1

    def _set_bounds(self) -> None:
        """What `ctx - q` of each row must be below: room - q + 1; 0 where that is negative."""
        self._table.room(len(self._bounds), out=self._bounds)
        np.subtract(self._bounds, self._q_less_1, out=self._bounds)
        np.maximum(self._bounds, _ZERO, out=self._bounds)
        if len(self._idle):
            # their blocks are nobody's business
            self._bounds_unsigned[self._idle] = self._idle_bound
        self._version = self._table.version
