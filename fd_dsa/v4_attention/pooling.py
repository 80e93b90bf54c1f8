"""Plans of a step as indices: sources to pool into entries, and sources to keep."""

from __future__ import annotations

import numpy as np

from fd_dsa.v4_attention.pools import LayerPools
from fd_dsa.v4_prepare import V4Arrays


class PoolingPlan:
    """The plans of one ratio as index arrays, shared by all layers of the kind.

    Args:
        out: the step's index arrays.
        name: "r1" (CSA) or "r2" (HCA).
        slots: slot of each row of the step.

    Attributes:
        num_entries: number of entries that the step finishes.
        first: int [num_entries], first position of each entry's own group.
        rows: int [num_entries], row of each entry in `keys`.
    """

    def __init__(self, out: V4Arrays, name: str, slots: np.ndarray) -> None:
        cfg = out.config
        ratio = cfg.csa_ratio if name == "r1" else cfg.hca_ratio
        self._pool = pool = cfg.pool(ratio)
        ring = cfg.source_rows(ratio)
        at = 4 if name == "r1" else 6
        self.num_entries, num_kept = int(out.counts[at]), int(out.counts[at + 1])
        kept = getattr(out, f"wplan_{name}")[:num_kept]
        self._kept = kept[:, 0]
        self._kept_rows = slots[kept[:, 1]] * ring + kept[:, 2] % ring
        if not self.num_entries:
            return
        plan = getattr(out, f"plan_{name}")[: self.num_entries]
        token, row, position, from_ring = plan.T[:, :, None]
        self.first = position[:, 0] + 1 - ratio
        self.rows = getattr(out, f"plan_dst_{name}")[: self.num_entries]
        number = np.arange(pool, dtype=np.int32)
        source = position - (pool - 1) + number
        # the first half of a CSA entry's sources uses their first half
        half = np.broadcast_to(number // ratio, source.shape)
        in_ring = np.broadcast_to(number < from_ring, source.shape)
        self._absent = source < 0
        place = slots[row] * ring + source % ring
        self._from_ring = in_ring.nonzero()
        self._ring_at = place[self._from_ring], half[self._from_ring]
        self._from_step = (~in_ring).nonzero()
        step = token - (pool - 1) + number
        self._step_at = step[self._from_step], half[self._from_step]

    def pooled(self, sources: np.ndarray, states: np.ndarray) -> np.ndarray:
        """Return each entry's gated mean of its sources, float32 [num_entries, width].

        Args:
            sources: float32 [num_tokens, halves, 2, width], the step's sources.
            states: sources kept by earlier steps.
        """
        taken = np.empty((self.num_entries, self._pool, *sources.shape[2:]), np.float32)
        taken[self._from_ring] = states[self._ring_at]
        taken[self._from_step] = sources[self._step_at]
        values, gates = taken[:, :, 0], taken[:, :, 1]
        if self._absent.any():
            values[self._absent] = 0.0
            gates[self._absent] = -np.inf
        gates -= gates.max(axis=1, keepdims=True)
        np.exp(gates, out=gates)
        values *= gates
        total: np.ndarray = values.sum(axis=1)
        total /= gates.sum(axis=1)
        return total

    def keep(self, sources: np.ndarray, states: np.ndarray) -> None:
        """Store the sources that a later step may pool. Call it after `pooled`."""
        states[self._kept_rows] = sources[self._kept]


class RecordPlan:
    """Sources at a block's end, stored with it and restored at the next block's start.

    A row that starts a step at a block's start reads them from the record of the previous block.
    That block was computed by the row itself, or by another request and found in the prefix cache.

    Args:
        out: the step's index arrays.
        start: int [rows], position of each row's first token in the step.
        q: int [rows], number of its tokens in the step.
        slots: slot of each row.
        block_table: int32 [rows, columns].
    """

    def __init__(
        self,
        out: V4Arrays,
        start: np.ndarray,
        q: np.ndarray,
        slots: np.ndarray,
        block_table: np.ndarray,
    ) -> None:
        cfg = out.config
        size, ratio = cfg.block_size, cfg.csa_ratio
        ring = cfg.source_rows(ratio)
        rows = ((q > 0) & (start > 0) & (start % size == 0)).nonzero()[0]
        self._restored = None
        if len(rows):
            positions = start[rows, None] - ratio + np.arange(ratio)
            self._restored = slots[rows, None] * ring + positions % ring
            self._restored_from = block_table[rows, start[rows] // size - 1]
        num_tokens = int(out.counts[1])
        positions, row = out.positions[:num_tokens], out.req_of_token[:num_tokens]
        offset = positions % size - (size - ratio)
        self._recorded = (offset >= 0).nonzero()[0]
        at = self._recorded
        self._record_at = block_table[row[at], positions[at] // size], offset[at]

    def restore(self, pools: LayerPools) -> None:
        """Restore the states of rows that start at a block's start."""
        if self._restored is not None:
            assert pools.states is not None and pools.records is not None
            pools.states[self._restored, 0] = pools.records[self._restored_from]

    def record(self, sources: np.ndarray, pools: LayerPools) -> None:
        """Store the sources of the last tokens of blocks."""
        if len(self._recorded):
            assert pools.records is not None
            pools.records[self._record_at] = sources[self._recorded, 0]
