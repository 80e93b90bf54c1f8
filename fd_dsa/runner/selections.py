"""Selected keys of some tokens of a step, by layer, as positions in their sequences."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fd_dsa.ops.arrays import as_numpy
from fd_dsa.runner.input_batch import InputBatch
from fd_dsa.tensor import StepArray


class Selections:
    """Collector of the selections of a step on a CPU, layer by layer.

    Args:
        tokens: flat tokens of the step whose selections are kept.
    """

    def __init__(self, tokens: Sequence[int] | np.ndarray) -> None:
        self._tokens = np.asarray(tokens, np.int64)
        self._layers: list[np.ndarray] = []

    def add(self, slots: StepArray) -> None:
        """Keep a copy of the tokens' rows of a layer.

        Args:
            slots: int32 [num_tokens, topk]; physical slots, -1 = padding. They are copied, because
                the next layer writes to the same buffer of the backend.
        """
        array = as_numpy(slots)
        self._layers.append(array.reshape(-1, array.shape[-1])[self._tokens].copy())

    def positions(self, batch: InputBatch) -> list[list[np.ndarray]]:
        """Return the selected positions of each token and layer, ascending int64 [n].

        Args:
            batch: input batch of the step, as it was run.
        """
        ends = np.cumsum(batch.num_scheduled_tokens[: batch.num_rows])
        rows = np.searchsorted(ends, self._tokens, side="right")
        tables, size = batch.block_tables, batch.block_size
        return [
            [positions_of(layer[i], tables[row], size) for layer in self._layers]
            for i, row in enumerate(rows)
        ]


def positions_of(slots: np.ndarray, table: np.ndarray, block_size: int) -> np.ndarray:
    """Return the positions of a token's selected slots in its sequence, ascending int64 [n].

    Args:
        slots: integers [topk], -1 = padding.
        table: int32 [max_blocks], block table of the sequence.
    """
    used = table[table >= 0]
    first = np.zeros(int(used.max()) + 1, np.int64)
    first[used] = np.arange(len(used)) * block_size
    block, offset = np.divmod(slots[slots >= 0], block_size)
    return np.sort(first[block] + offset)
