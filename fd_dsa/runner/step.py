"""The record of a step in the embedded engine, and the way of its values to a device and back.

    who makes a field               field                             who reads it
    engine, by InputBatch and Draw  ids, lengths, tables, sampled     staging
    runner                          hints, padding of a graph         attention backend
    staging: views of one tensor    the same, where the model runs    embedding, backend, head
    attention backend               caches, metadata, slots           layers

On a device the values of a step travel through one of three page-locked slabs, so a step may be
staged while the one before runs (`fd_dsa.step.staging`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from fd_dsa.runner.input_batch import Draw, InputBatch
from fd_dsa.runner.selections import Selections
from fd_dsa.step import ForwardMeta, StepHints
from fd_dsa.step.staging import StagedInputs
from fd_dsa.step.views import Allocate
from fd_dsa.triton_runtime.transfers import Transfers


class DrawInputs(NamedTuple):
    """A Draw on a device, int32.

    Attributes:
        slots, positions: of each row, slot -1 = padding, which gets no token.
        mask_rows: row of each row's mask, -1 = none.
        firsts: first row of each request, then the number of rows, then -1.
        next_ids: of `InputBatch.next_tokens`; empty where no layer reads it.
    """

    slots: Any
    positions: Any
    mask_rows: Any
    firsts: Any
    next_ids: Any


@dataclass(slots=True)
class Step:
    """One step: what was scheduled, where the model runs, and what the backend made of it.

    It is the `forward_meta` that layers are called with, a new one every step, as in FastDeploy
    (docs/design.md, "FastDeploy's contract"). A row has one token and its drafts, or a chunk of a
    prompt. B = rows of the step.

    Attributes:
        hints: what the host knows of the step; the longest row is an upper bound.
        ids_remove_padding: int64, on a device int32, [num_tokens]; packed token ids, on a device
            followed by zeros up to the padded number of tokens.
        seq_lens_encoder, seq_lens_decoder, seq_lens_this_time: int32 [B].
        sampled: int64, on a device int32, [n]; flat tokens whose logits are asked for.
        follows: int32 [B], as of InputBatch.
        block_tables: int32 [B, max_blocks_per_seq].
        caches: the backend's own, two tensors a layer for DSA: latents and indexer keys.
        attn_backend: the attention backend that all layers call.
        draw: what its tokens are drawn by, on a device.
        position_ids, slot_mapping, indexer_attn_mask_offsets: as in `fd_dsa_step`.
        fd_dsa_step: the step's metadata; None until `init_attention_metadata`.
        selections: takes what each layer chose; None: nobody asked.
        host_lengths: the three lengths in host memory; the batch's own.
    """

    hints: StepHints
    ids_remove_padding: Any
    seq_lens_encoder: Any
    seq_lens_decoder: Any
    seq_lens_this_time: Any
    sampled: Any
    follows: Any
    block_tables: Any
    caches: list[Any]
    attn_backend: Any
    draw: DrawInputs | None = None
    position_ids: Any = None
    slot_mapping: Any = None
    indexer_attn_mask_offsets: Any = None
    fd_dsa_step: ForwardMeta | None = None
    selections: Selections | None = None
    host_lengths: tuple[np.ndarray, ...] | None = None


def host_inputs(batch: InputBatch, sampled: np.ndarray) -> tuple[np.ndarray, ...]:
    """Fields of a Step from `ids_remove_padding` to `block_tables` for a model on the CPU.

    They are the batch's own arrays, valid until its next `begin_step`; nothing is padded on a CPU.
    """
    rows = batch.num_rows
    return (
        batch.ids_remove_padding[: batch.num_tokens],
        batch.seq_lens_encoder[:rows],
        batch.seq_lens_decoder[:rows],
        batch.seq_lens_this_time[:rows],
        sampled,
        batch.follows[:rows],
        batch.block_tables[:rows],
    )


class DeviceInputs(StagedInputs):
    """The same on a device: sections of one tensor, which never move; one copy fills a step.

    Args:
        batch: rows that the engine fills.
        allocate: makes a contiguous tensor of a shape and dtype on the device.
        most_drafts: of a row; a token is sampled for each, and for the row.
        reads_next: whether a layer for multi-token prediction reads the tokens after those.
    """

    def __init__(
        self,
        batch: InputBatch,
        allocate: Allocate,
        most_drafts: int = 0,
        *,
        reads_next: bool = False,
    ) -> None:
        rows, columns = batch.block_tables.shape
        self._most_rows, self._most_draws = rows, (1 + most_drafts) * rows
        self._has_drafts, self._reads_next = most_drafts > 0, reads_next
        draws, most_next = self._most_draws, reads_next * batch.max_num_tokens
        sizes = (batch.max_num_tokens, rows, rows, rows, draws, rows)
        super().__init__(allocate, (*sizes, *[draws] * 3, rows + 1, most_next), rows, columns)

    def stage(
        self, inputs: Sequence[Any], draw: Draw, next_ids: Sequence[int] | np.ndarray = ()
    ) -> None:
        """Queue the copy of `host_inputs`, a draw and `next_tokens`; all may then change."""
        (*values, tables), masks = inputs, _padded((), self._most_draws)
        if draw.masked:
            masks[draw.masked] = range(len(draw.masked))
        firsts = _padded(draw.firsts, self._most_rows + 1) if self._has_drafts else ()
        rows = _padded(draw.slots, self._most_draws), draw.positions, masks
        self.queue((*values, *rows, firsts, next_ids), tables)

    def views(
        self, num_tokens: int, num_rows: int, num_sampled: int
    ) -> tuple[list[Any], DrawInputs]:
        """The tensors of the fields of a Step, which never move, and those of its draw."""
        # kernels take no empty tensor
        draws, following = max(num_sampled, 1), self._reads_next * num_tokens
        sizes = (num_tokens, *[num_rows] * 3, num_sampled, num_rows)
        requests = self._most_rows + 1
        *values, tables = self.views_of((*sizes, *[draws] * 3, requests, following, num_rows))
        return [*values[:6], tables], DrawInputs(*values[6:])


def _padded(values: Sequence[int], size: int) -> np.ndarray:
    """int32 [size]; the values, then -1."""
    padded = np.full(size, -1, np.int32)
    padded[: len(values)] = values
    return padded


class HostLogits:
    """Page-locked memory for the logits of a step: one copy, one wait.

    Args:
        transfers: of the device.
        num_values: float32 values at first; a larger step makes it grow.
    """

    def __init__(self, transfers: Transfers, num_values: int) -> None:
        self._transfers, self._copied = transfers, transfers.event()
        self._buffer = transfers.host_buffer(4 * num_values).view(np.float32)

    def __call__(self, logits: Any) -> np.ndarray:
        """The values of a float32 tensor, which the calling thread waits for.

        Returns:
            float32 of the tensor's shape, valid until the next call.
        """
        size = int(np.prod(logits.shape))
        if size > len(self._buffer):
            self._buffer = self._transfers.host_buffer(4 * size).view(np.float32)
        values = self._buffer[:size]
        self._transfers.to_host(values, logits)
        self._copied.record()
        self._copied.wait()
        return values.reshape(logits.shape)
