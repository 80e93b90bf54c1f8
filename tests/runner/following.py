"""A batch that follows another one by messages, as on the other ranks of a split model."""

from __future__ import annotations

import pickle

from fd_dsa.runner import InputBatch

BY_ROW = "num_chunk_tokens", "num_computed_tokens", "num_scheduled_tokens", "pending_source"
COUNTS = "num_tokens", "num_prefill_tokens", "max_seqlen_k", "num_rows", "has_pending"


def all_of(batch: InputBatch) -> dict[str, object]:
    """Everything that a step reads, copied."""
    found = {name: getattr(batch, name).tolist() for name in (*BY_ROW, "block_tables")}
    found |= {name: getattr(batch, name) for name in (*COUNTS, "next_prompt_tokens")}
    tokens = slice(batch.num_tokens)
    return found | {"ids": batch.token_ids[tokens].tolist(), "staged": batch.staged_ids().tolist()}


class Follower:
    """Batch of another process, which restores each step.

    Args:
        batch: batch that is followed from now on.

    Attributes:
        batch: copy of the followed batch as it was at the last `follow`.
    """

    def __init__(self, batch: InputBatch) -> None:
        rows, columns = batch.block_tables.shape
        self.batch = InputBatch(rows, batch.max_num_tokens, columns, batch.block_size)
        for row, table in enumerate(batch.block_tables):
            self.batch.set_blocks(row, table)
        self._followed = batch
        batch.begin_changes()

    def follow(self, *, is_sent_again: bool = False) -> int:
        """Restore the step of the followed batch, and check that the batches are equal.

        Args:
            is_sent_again: True if the next message repeats the changes of this one.

        Returns:
            Size of the message in bytes.
        """
        message = pickle.dumps(self._followed.state(), pickle.HIGHEST_PROTOCOL)
        if not is_sent_again:
            self._followed.begin_changes()
        self.batch.restore(pickle.loads(message))
        assert all_of(self.batch) == all_of(self._followed), "the batches differ"
        return len(message)
