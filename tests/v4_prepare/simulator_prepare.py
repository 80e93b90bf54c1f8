"""V4Prepare as a builder of the simulator: in host memory, or on a device that is read back."""

from __future__ import annotations

from typing import Any

import numpy as np

from fd_dsa.v4_prepare import OUTPUT_SHAPES, V4Prepare, V4PrepareConfig
from tests.kernel_memory import KernelMemory
from tests.reference.v4_prepare import naive
from tests.v4_prepare.simulator import simulate

Arrays = dict[str, Any]


class PreparedSteps:
    """Steps that are staged, expanded and read back whole.

    Args:
        cfg: sizes of the steps.
        memory: where it runs, all tensors full of poison at first; None = in NumPy arrays.
        by_cells: say which blocks of a row are new, in place of passing block tables.
    """

    def __init__(
        self, cfg: V4PrepareConfig, memory: KernelMemory | None = None, by_cells: bool = False
    ) -> None:
        self.cfg, self.memory, self.by_cells = cfg, memory, by_cells
        place = ("gpu", memory.poisoned) if memory else ("numpy",)
        self.prepare = V4Prepare(cfg, *place)
        self.blocks: list[list[int]] = [[] for _ in range(cfg.max_num_seqs)]

    def __call__(
        self, cfg: Any, ctx: Any, q: Any, slot: Any, table: Any, rollback: Any = None
    ) -> Arrays:
        assert cfg is self.cfg
        self.stage(ctx, q, slot, table)
        return self.expand(rollback)

    def stage(self, ctx: Any, q: Any, slot: Any, table: np.ndarray) -> None:
        """Stage one step."""
        if not self.by_cells:
            self.prepare.stage(ctx, q, slot, table)
            return
        for row, cells in enumerate(table.tolist()):
            self._set_blocks(row, [block for block in cells if block >= 0])
        self.prepare.stage(ctx, q, slot)

    def expand(self, rollback: np.ndarray | None) -> Arrays:
        """Copies of the outputs of the earliest staged step; `hca_idx` is None in table mode."""
        if rollback is not None and self.memory:
            rollback = self.memory.put(rollback)
        out = self.prepare.expand(rollback)
        copy = self.memory.get if self.memory else np.copy
        arrays = {name: copy(getattr(out, name)) for name in OUTPUT_SHAPES(self.cfg)}
        self.prepare.poll_error()
        return {"hca_idx": None, **arrays}

    def _set_blocks(self, row: int, blocks: list[int]) -> None:
        """Say what is new in a row, from the first block that differs."""
        old = self.blocks[row]
        shorter = min(len(old), len(blocks))
        start = next((i for i in range(shorter) if old[i] != blocks[i]), shorter)
        if old != blocks:
            self.prepare.set_blocks(row, blocks[start:], start)
        self.blocks[row] = blocks


def recorded(cfg: V4PrepareConfig, seed: int, num_steps: int) -> list[tuple[Any, ...]]:
    """Steps of a history: ctx, q, slot, block table, rollback, and the right outputs."""
    steps: list[tuple[Any, ...]] = []

    def record(cfg: Any, ctx: Any, q: Any, slot: Any, table: Any, rollback: Any) -> Arrays:
        wanted = naive(cfg, np.where(q > 0, ctx - rollback, ctx), q, slot, table)
        steps.append((ctx, q, slot, table, rollback, wanted))
        return wanted

    simulate(cfg, record, seed, num_steps, late=True)
    return steps
