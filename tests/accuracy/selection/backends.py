"""Backends that choose badly, as selectors of other engines have done."""

from __future__ import annotations

from typing import Any

import numpy as np

from fd_dsa.accuracy.selection.tap import RecordingBackend
from fd_dsa.ops._host import as_numpy
from fd_dsa.ops.topk import positions_to_slots


class LastKeys(RecordingBackend):
    """Chooses the last keys, whatever they say."""

    def indexer_forward(
        self, q: Any, k: Any, weights: Any, layer_id: int, forward_meta: Any
    ) -> Any:
        """See DSAAttentionBackend; then as many last keys for the tokens that have more."""
        selection = super().indexer_forward(q, k, weights, layer_id, forward_meta)
        step, topk = self.current_step(forward_meta), self.config.index_topk
        positions = as_numpy(step.position_ids)
        tokens = np.flatnonzero(positions >= topk)
        if len(tokens):
            kept = positions[tokens, None] - self.kept_back(topk)[::-1]
            rows, tables = as_numpy(step.batch_id_per_token)[tokens], as_numpy(step.block_tables)
            slots = positions_to_slots(kept.astype(np.int32), rows, tables, self.block_size)
            as_numpy(selection)[tokens] = -1
            as_numpy(selection)[tokens, : kept.shape[1]] = slots
        return selection

    def kept_back(self, topk: int) -> np.ndarray:
        """How far back the keys lie that are kept."""
        return np.arange(topk)


class Collapsing(LastKeys):
    """Keeps a few last keys alone as soon as it has to choose."""

    def kept_back(self, topk: int) -> np.ndarray:
        """See LastKeys."""
        return np.arange(4)
