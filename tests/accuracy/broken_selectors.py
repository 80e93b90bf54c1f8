"""Selectors with the failures of other engines put in: what a test of them has to notice."""

from __future__ import annotations

from typing import Any

import numpy as np

from fd_dsa.accuracy.selection.topk_hook import RecordingBackend
from fd_dsa.ops.arrays import as_numpy
from fd_dsa.ops.key_bounds import positions_to_slots


class Broken(RecordingBackend):
    """Lets a token that has more keys than `index_topk` attend to others than the indexer chose."""

    def select(self, q: Any, weights: Any, layer_id: int, forward_meta: Any) -> Any:
        """See DSAAttentionBackend; then as `chosen` says."""
        selection = super().select(q, weights, layer_id, forward_meta)
        step, topk = self.current_step(forward_meta), self.config.index_topk
        positions = as_numpy(step.position_ids)
        tokens = np.flatnonzero(positions >= topk)
        if not len(tokens):
            return selection
        kept = np.full((len(tokens), topk), -1, np.int32)
        for row, token in zip(kept, tokens, strict=True):
            found = self.chosen(int(positions[token]), topk)
            row[: len(found)] = found
        rows, tables = as_numpy(step.batch_id_per_token)[tokens], as_numpy(step.block_tables)
        as_numpy(selection)[tokens] = positions_to_slots(kept, rows, tables, self.block_size)
        return selection

    def chosen(self, position: int, topk: int) -> range:
        """Positions that the token at `position` attends to."""
        raise NotImplementedError


class TrailingKeysOnly(Broken):
    """Scores are zero, so the choice falls to the last keys, as in mlx-lm #1454."""

    def chosen(self, position: int, topk: int) -> range:
        """The last keys."""
        return range(position + 1 - topk, position + 1)


class FewLastKeysOnly(Broken):
    """Keeps a few last keys alone as soon as it has to choose: a collapse at `index_topk`."""

    def chosen(self, position: int, topk: int) -> range:
        """The last four keys."""
        return range(position - 3, position + 1)
