"""Staged steps in host memory: the same slabs, expanded by the host builder."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from fd_dsa.errors import DtypeError
from fd_dsa.step.checks import host_array
from fd_dsa.v4_prepare.config import V4PrepareConfig
from fd_dsa.v4_prepare.host import V4Arrays, v4_prepare_np
from fd_dsa.v4_prepare.slab import (
    ERROR_SLOTS,
    ERROR_WORDS,
    FAULT_CTX,
    FAULT_ROLLBACK,
    NUM_ROWS,
    STAMP,
    SlabLayout,
)

Int32Array = npt.NDArray[np.int32]

# what holds one value a token, and what a token without keys has there
_TOKEN_PADS = {
    "positions": 0,
    "req_of_token": -1,
    "win_idx": -1,
    "win_len": 0,
    "ext_len": 0,
    "swa_write": -1,
    "csa_visible": 0,
}
_OFFSETS = ("hca_indptr", "csa_indptr")
_PLANS = ("plan_r1", "wplan_r1", "plan_r2", "wplan_r2")
_SAME = ("ctx", "plan_dst_r1", "plan_dst_r2", "counts")


class HostSteps:
    """Slabs and outputs in host memory; a step is built when it is expanded.

    Args:
        cfg: sizes of the steps.
        layout: of a slab.
        arrays: the outputs by name, and `block_table`.
        num_slabs: slabs that take turns.
    """

    def __init__(
        self,
        cfg: V4PrepareConfig,
        layout: SlabLayout,
        arrays: dict[str, np.ndarray],
        num_slabs: int,
    ) -> None:
        self._cfg, self._layout = cfg, layout
        self._table = arrays["block_table"]
        self.out = V4Arrays(cfg, **{n: a for n, a in arrays.items() if n != "block_table"})
        self._slabs = [np.zeros(layout.num_words, np.int32) for _ in range(num_slabs)]
        self._turn = 0
        # where a step without its faulty rows is built
        self._spare: V4Arrays | None = None
        self.faults: Int32Array = np.zeros((ERROR_SLOTS, ERROR_WORDS), np.int32)

    def next_slab(self) -> Int32Array:
        """The slab to fill."""
        return self._slabs[self._turn]

    def upload(self, num_words: int) -> int:
        """Index of the slab that was filled."""
        turn = self._turn
        self._turn = (turn + 1) % len(self._slabs)
        return turn

    def is_done(self, slab: int) -> bool:
        """A step is done when `expand` returns."""
        return True

    def expand(self, slab: int, rollback: Any) -> None:
        """Build the step in a slab."""
        words, layout = self._slabs[slab], self._layout
        num_rows = int(words[NUM_ROWS])
        self._take_runs(words, num_rows)
        ctx, q, slot = (words[at:][:num_rows] for at in (layout.ctx, layout.q, layout.slot))
        if rollback is None:
            v4_prepare_np(self._cfg, ctx, q, slot, self._table[:num_rows], out=self.out)
            return
        left, is_bad = self._rolled_back(ctx, q, rollback, int(words[STAMP]))
        if is_bad.any():
            self._build_without(is_bad, left, q, slot)
        else:
            v4_prepare_np(self._cfg, left, q, slot, self._table[:num_rows], out=self.out)

    def _take_runs(self, words: Int32Array, num_rows: int) -> None:
        """Put the changed cells of a slab into the table."""
        layout = self._layout
        starts = words[layout.run_start :][: num_rows + 1]
        for row in np.flatnonzero(np.diff(starts)):
            start, stop = int(starts[row]), int(starts[row + 1])
            column = words[layout.run_column + row]
            cells = words[layout.values + start : layout.values + stop]
            self._table[row, column : column + stop - start] = cells

    def _rolled_back(
        self, ctx: Int32Array, q: Int32Array, rollback: Any, stamp: int
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
        """Effective lengths, 0 in the rows where there is none, and which rows these are."""
        given = host_array("rollback", rollback)
        if given.dtype != np.int32 or given.ndim != 1:
            raise DtypeError(
                f"rollback: got {given.dtype} of shape {given.shape}, must be int32 [n]; convert it"
            )
        taken = np.zeros(len(q), np.int64)
        taken[: len(given)] = given[: len(q)]
        left = ctx - taken
        is_bad = (q > 0) & ((taken < 0) | (left < q))
        if is_bad.any():
            row = int(is_bad.argmax())
            fault = (
                (FAULT_ROLLBACK, row, taken[row], 0)
                if taken[row] < 0
                else (FAULT_CTX, row, left[row], q[row])
            )
            self.faults[stamp % ERROR_SLOTS, :5] = (*fault, stamp)
        return np.where(q > 0, np.where(is_bad, 0, left), ctx), is_bad

    def _build_without(
        self, is_bad: npt.NDArray[np.bool_], ctx: npt.NDArray[Any], q: Int32Array, slot: Int32Array
    ) -> None:
        """Build the step with padding in the place of all tokens of some rows."""
        if self._spare is None:
            self._spare = V4Arrays.allocate(self._cfg)
        spare, out = self._spare, self.out
        kept_q = np.where(is_bad, 0, q)
        v4_prepare_np(self._cfg, ctx, kept_q, slot, self._table[: len(q)], out=spare)
        token = np.flatnonzero(np.repeat(~is_bad, q))
        num_kept, num_tokens = len(token), int(q.sum())
        for name, pad in _TOKEN_PADS.items():
            getattr(out, name).fill(pad)
            getattr(out, name)[token] = getattr(spare, name)[:num_kept]
        for name in _OFFSETS:
            lengths = np.zeros(len(out.positions), np.int32)
            lengths[token] = np.diff(getattr(spare, name)[: num_kept + 1])
            np.cumsum(lengths, out=getattr(out, name)[1:])
        for name in _PLANS:
            plan = getattr(out, name)
            plan[:] = getattr(spare, name)
            real = plan[:, 0] >= 0
            plan[real, 0] = token[plan[real, 0]]
        for name in _SAME:
            getattr(out, name)[:] = getattr(spare, name)
        if out.hca_idx is not None and spare.hca_idx is not None:
            num_entries = int(spare.counts[2])
            out.hca_idx[:num_entries] = spare.hca_idx[:num_entries]
        np.cumsum(q, out=out.cu_q[1 : len(q) + 1])
        out.cu_q[len(q) + 1 :] = num_tokens
        out.counts[1] = num_tokens
