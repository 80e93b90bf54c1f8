"""Steps of a runner by their rows, without an engine."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType

import numpy as np

from fd_dsa.runner import ModelRunner

NO_SLOTS: Mapping[int, int] = MappingProxyType({})
"""A step that writes no snapshots."""


def logits_of_rows(
    runner: ModelRunner,
    rows: Iterable[tuple[int, Sequence[int], int, bool]],
    slots: Mapping[int, int] = NO_SLOTS,
) -> np.ndarray:
    """Run a step, and return the logits of the last token of each row.

    Args:
        rows: arguments of `InputBatch.add_row`.
        slots: places of the snapshots that the step writes, by row.
    """
    batch = runner.input_batch
    batch.begin_step()
    last = [batch.add_row(*row) for row in rows]
    for row, slot in slots.items():
        batch.snapshot_slots[row] = slot
    return np.array(runner.execute_model(np.array(last)))
