"""Persistent host state of the rows of a step: numbers of tokens, block tables and token ids.

The buffers are allocated once. The engine fills them with `begin_step` and `add_rows`. The runner
gives them to the attention backend, which makes the metadata of the step. A prefill row has
`num_chunk_tokens == num_scheduled_tokens > 0`, and a decode row has `num_chunk_tokens == 0`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from operator import add, ge
from typing import Any, NamedTuple

import numpy as np

from fd_dsa.errors import CapacityError
from fd_dsa.tensor import StepArray

NO_SLOT = -1
"""Value of `InputBatch.snapshot_slots` for a row without a snapshot."""


class SamplingInputs(NamedTuple):
    """Inputs of the sampling of a step on a device, by row of logits.

    An engine gives sequences. In a `Step` on a device the fields are int32 tensors.

    Attributes:
        batch_rows: batch row of each row of logits; -1 = padding, which gets no token.
        positions: position of each token in its output. Like the lengths of the step it is an upper
            bound while drafts are pending.
        logits_indptr: first row of logits of each request, then the number of rows. The rows of
            drafts follow the row of their request. On a device padded by -1.
        mask_rows: row of each mask in the masks of the step, -1 = no mask; empty without masks.
        next_ids: values of `InputBatch.next_tokens`, which the runner adds in a `Step`; empty
            without a layer that reads them.
    """

    batch_rows: StepArray = ()
    positions: StepArray = ()
    logits_indptr: StepArray = ()
    mask_rows: StepArray = ()
    next_ids: StepArray = ()


NO_SAMPLING = SamplingInputs()
"""Inputs of a step that the host samples."""


class StepInputs(NamedTuple):
    """Arrays of a step, in host memory or on the model's device. B = number of rows of the step.

    Attributes:
        token_ids: int64, on a device int32, [num_tokens]; ids of all rows, one row after another.
            On a device zeros follow up to the padded number of tokens.
        num_chunk_tokens, num_computed_tokens, num_scheduled_tokens: int32 [B]; see InputBatch.
        sampled: int64, on a device int32, [n]; flat tokens whose logits are asked for.
        pending_source, snapshot_slots: int32 [B]; see InputBatch.
        block_tables: int32 [B, max_blocks_per_seq].
    """

    token_ids: StepArray
    num_chunk_tokens: StepArray
    num_computed_tokens: StepArray
    num_scheduled_tokens: StepArray
    sampled: StepArray
    pending_source: StepArray
    snapshot_slots: StepArray
    block_tables: StepArray

    @property
    def lengths(self) -> tuple[StepArray, StepArray, StepArray]:
        """Three token counts of the rows: of prefill chunks, computed and scheduled."""
        return self.num_chunk_tokens, self.num_computed_tokens, self.num_scheduled_tokens


# row, first logical block, and block ids; None = the row was cleared
_TableChange = tuple[int, int, list[int] | None]


class InputBatch:
    """Rows, block tables and packed token ids of the step that is being assembled.

    Attributes:
        num_chunk_tokens: int32 [max_num_seqs]; tokens of the row's prefill chunk in this step, 0
            for a decode or idle row.
        num_computed_tokens: int32 [max_num_seqs]; tokens of the row in the cache before this step.
        num_scheduled_tokens: int32 [max_num_seqs]; tokens of the row in this step, 0 = idle.
        block_tables: int32 [max_num_seqs, max_blocks_per_seq]; physical blocks, -1 = unused.
            Read-only; `set_blocks` and `clear_row` change them.
        token_ids: int64 [max_num_tokens]; token ids of the step, packed in row order.
        pending: int32 [max_num_tokens]; index of each pending token in the `TokenBuffer`, -1 = the
            id is known.
        has_pending: True if the step has a pending token.
        num_tokens, num_prefill_tokens: tokens of this step so far.
        max_seqlen_k: longest row after this step, tokens; 0 without rows.
        num_rows: 1 + the highest row that has tokens in this step.
        pending_source: int32 [max_num_seqs]; index of the request, among those that the step before
            sampled, whose sample a row depends on, else -1. `num_computed_tokens` of such a row is
            an upper bound.
        snapshot_slots: int32 [max_num_seqs]; place of the snapshot that the step writes of a row,
            NO_SLOT = none. It is the state after the last full block before the row's last token.
        next_prompt_tokens: token after a chunk that ends inside of a prompt, by the last flat token
            of the chunk.
    """

    def __init__(
        self, max_num_seqs: int, max_num_tokens: int, max_blocks_per_seq: int, block_size: int
    ) -> None:
        self.max_num_seqs = max_num_seqs
        self.max_num_tokens = max_num_tokens
        self.block_size = block_size
        self.num_chunk_tokens = np.zeros(max_num_seqs, np.int32)
        self.num_computed_tokens = np.zeros(max_num_seqs, np.int32)
        self.num_scheduled_tokens = np.zeros(max_num_seqs, np.int32)
        self.pending_source = np.full(max_num_seqs, -1, np.int32)
        self.snapshot_slots = np.full(max_num_seqs, NO_SLOT, np.int32)
        self._tables = np.full((max_num_seqs, max_blocks_per_seq), -1, np.int32)
        # every change passes a method that notes it
        self.block_tables = self._tables.view()
        self.block_tables.flags.writeable = False
        # changes of the tables for `state`, in their order; None = no other process has the tables
        self._changes: list[_TableChange] | None = None
        self.token_ids = np.zeros(max_num_tokens, np.int64)
        self.pending = np.full(max_num_tokens, -1, np.int32)
        self.begin_step()

    @property
    def max_row_len(self) -> int:
        """Maximum length of a row, tokens: that of its block table."""
        return self.block_tables.shape[1] * self.block_size

    def begin_step(self) -> None:
        """Make every row idle, and keep the block tables."""
        self.num_chunk_tokens[:] = 0
        self.num_computed_tokens[:] = 0
        self.num_scheduled_tokens[:] = 0
        self.pending_source[:] = -1
        self.snapshot_slots[:] = NO_SLOT
        self.num_tokens = 0
        self.has_pending = False
        self.num_prefill_tokens = 0
        self.max_seqlen_k = 0
        self.num_rows = 0
        self.next_prompt_tokens: dict[int, int] = {}

    def add_row(
        self, row: int, token_ids: Sequence[int], num_computed_tokens: int, is_prefill: bool
    ) -> int:
        """Add one row to this step, as `add_rows` does.

        Returns:
            Flat index of its last token.

        Raises:
            ValueError: a negative token id.
        """
        if (least := min(token_ids, default=0)) < 0:
            raise ValueError(f"token_ids: row {row} has the id {least}; ids are at least 0")
        self.add_rows([row], [len(token_ids)], token_ids, [num_computed_tokens], [is_prefill])
        return self.num_tokens - 1

    def add_rows(
        self,
        rows: Sequence[int],
        num_new: Sequence[int],
        token_ids: Sequence[int],
        num_computed_tokens: Sequence[int],
        are_prefills: Sequence[bool],
        pending: Mapping[int, int] | None = None,
    ) -> None:
        """Add the tokens of some rows to this step.

        Args:
            rows: batch rows in ascending order, after the rows that the step has.
            num_new: number of tokens of each row in this step, at least 1.
            token_ids: token ids of all rows, one after another; 0 for a pending token.
            num_computed_tokens: number of tokens of each row whose keys are in the cache.
            are_prefills: True for each row whose tokens are a prefill chunk.
            pending: index of each pending token in `token_ids` -> its index in the `TokenBuffer`.

        Raises:
            ValueError: rows out of order, or a row without a token.
            CapacityError: more tokens than `max_num_tokens`.
        """
        begin, end = self.num_tokens, self.num_tokens + len(token_ids)
        last = rows[-1]
        if any(map(ge, (self.num_rows - 1, *rows), rows)) or last >= self.max_num_seqs:
            raise ValueError(
                f"rows: {list(rows)} must ascend from {self.num_rows} on and stay below "
                f"max_num_seqs {self.max_num_seqs}"
            )
        if min(num_new) < 1:
            row = rows[num_new.index(min(num_new))]
            raise ValueError(f"token_ids: row {row} has no token; leave idle rows out")
        if end > self.max_num_tokens:
            raise CapacityError(
                f"token_ids: rows {rows[0]} to {last} bring the step to {end} tokens, "
                f"max_num_tokens is {self.max_num_tokens}"
            )
        chunks = [
            new if is_prefill else 0 for new, is_prefill in zip(num_new, are_prefills, strict=True)
        ]
        self.token_ids[begin:end] = token_ids
        self.pending[begin:end] = -1
        if pending:
            self.pending[begin:end][list(pending)] = list(pending.values())
            self.has_pending = True
        self.num_chunk_tokens[rows] = chunks
        self.num_computed_tokens[rows] = num_computed_tokens
        self.num_scheduled_tokens[rows] = num_new
        self.num_tokens, self.num_rows = end, last + 1
        self.num_prefill_tokens += sum(chunks)
        self.max_seqlen_k = max(self.max_seqlen_k, *map(add, num_computed_tokens, num_new))

    def arrays(self, sampled: np.ndarray) -> StepInputs:
        """Return the arrays of the step without padding, valid until the next `begin_step`.

        Args:
            sampled: int64 [n]; flat tokens whose logits are wanted.
        """
        rows = self.num_rows
        return StepInputs(
            self.staged_ids(),
            self.num_chunk_tokens[:rows],
            self.num_computed_tokens[:rows],
            self.num_scheduled_tokens[:rows],
            sampled,
            self.pending_source[:rows],
            self.snapshot_slots[:rows],
            self.block_tables[:rows],
        )

    def staged_ids(self) -> np.ndarray:
        """Return the token ids of the step as a device takes them, int64 [num_tokens]."""
        ids = self.token_ids[: self.num_tokens]
        return _staged(ids, self.pending[: self.num_tokens]) if self.has_pending else ids

    def next_tokens(
        self, sampled: Sequence[int] | np.ndarray = (), first_sample: int = 0
    ) -> np.ndarray:
        """Return the token after each token of the step as a device takes it, int64 [num_tokens].

        Args:
            sampled: flat tokens after which a token is sampled; the tokens after all others are
                known.
            first_sample: index of the first sample in the `TokenBuffer`.
        """
        samples = np.arange(first_sample, first_sample + len(sampled), dtype=np.int32)
        if len(sampled) == self.num_tokens:
            # a decode step, in which every token is followed by a sample
            return _staged(samples, samples)
        tokens, ends = slice(self.num_tokens), list(self.next_prompt_tokens)
        next_ids = np.roll(self.token_ids[tokens], -1)
        pending = np.roll(self.pending[tokens], -1)
        next_ids[ends], pending[ends] = list(self.next_prompt_tokens.values()), -1
        pending[np.asarray(sampled, np.int64)] = samples
        return _staged(next_ids, pending)

    def begin_changes(self) -> None:
        """Note the changes of the block tables from now on, and forget earlier ones.

        The other processes have the present tables.
        """
        self._changes = []

    def state(self) -> tuple[Any, ...]:
        """Return the step for `restore` in another process, with the changes of the block tables.

        Whole tables would be megabytes. A decode step changes a few cells. A process that restores
        the states in their order has the same tables. If it gets some changes again, they have no
        effect.
        """
        assert self._changes is not None, "begin_changes was not called"
        rows = self.num_rows
        return (
            (self.num_tokens, self.num_prefill_tokens, self.max_seqlen_k, rows),
            self.next_prompt_tokens,
            self._changes,
            self.token_ids[: self.num_tokens],
            self.pending[: self.num_tokens],
            self.num_chunk_tokens[:rows],
            self.num_computed_tokens[:rows],
            self.num_scheduled_tokens[:rows],
            self.pending_source[:rows],
            self.snapshot_slots[:rows],
        )

    def restore(self, state: tuple[Any, ...]) -> None:
        """Set the step of a batch of the same sizes from its `state`."""
        counts, next_prompt_tokens, changes, ids, pending, *by_row = state
        self.begin_step()
        self.num_tokens, self.num_prefill_tokens, self.max_seqlen_k, rows = counts
        self.num_rows, self.next_prompt_tokens = rows, next_prompt_tokens
        self.token_ids[: len(ids)], self.pending[: len(ids)] = ids, pending
        self.has_pending = bool((pending >= 0).any())
        lengths = self.num_chunk_tokens, self.num_computed_tokens, self.num_scheduled_tokens
        arrays = *lengths, self.pending_source, self.snapshot_slots
        for target, values in zip(arrays, by_row, strict=True):
            target[:rows] = values
        for row, start, block_ids in changes:
            if block_ids is None:
                self.clear_row(row)
            else:
                self.set_blocks(row, block_ids, start)

    def num_tokens_past(self, num_keys: int) -> int:
        """Return the number of tokens of this step that attend to more than `num_keys` keys."""
        if self.max_seqlen_k <= num_keys:
            return 0
        new = self.num_scheduled_tokens[: self.num_rows]
        past = self.num_computed_tokens[: self.num_rows] + new - num_keys
        # np.clip takes three times as long for so few numbers
        return int(np.maximum(np.minimum(past, new), 0).sum())

    def set_blocks(self, row: int, block_ids: Sequence[int], start: int = 0) -> None:
        """Write `block_ids` into the block table of `row` from logical block `start` on.

        Raises:
            CapacityError: the table has too few columns.
        """
        end = start + len(block_ids)
        if end > self.block_tables.shape[1]:
            raise CapacityError(
                f"block_tables: row {row} needs {end} blocks, "
                f"a row holds {self.block_tables.shape[1]}"
            )
        self._tables[row, start:end] = block_ids
        if self._changes is not None:
            self._changes.append((row, start, self._tables[row, start:end].tolist()))

    def clear_row(self, row: int) -> None:
        """Clear the block table of `row`."""
        self._tables[row] = -1
        if self._changes is not None:
            self._changes.append((row, 0, None))


def _staged(token_ids: np.ndarray, pending: np.ndarray) -> np.ndarray:
    """Return the values from which `follow_kernel` makes the token ids of a step.

    Ids are never negative, so one value has either the id or the index of a pending token.

    Args:
        token_ids: integers [n]; ids of tokens that the host knows.
        pending: int32 [n]; index of each pending token in the `TokenBuffer`, -1 = the host knows
            it.

    Returns:
        int64 [n]; the id, or -1 - index of a pending token.
    """
    return np.where(pending < 0, token_ids, -1 - pending.astype(np.int64))
