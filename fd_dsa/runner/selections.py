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
        selections = []
        for i, row in enumerate(np.searchsorted(ends, self._tokens, side="right")):
            table = batch.block_tables[row]
            used = table[table >= 0]
            first = np.zeros(int(used.max()) + 1, np.int64)
            first[used] = np.arange(len(used)) * batch.block_size
            layers = []
            for layer in self._layers:
                block, offset = np.divmod(layer[i][layer[i] >= 0], batch.block_size)
                layers.append(np.sort(first[block] + offset))
            selections.append(layers)
        return selections
