"""The record of a step in the embedded engine.

    who makes a field               field                             who reads it
    engine, by InputBatch and Draw  ids, lengths, tables, sampled     staging
    runner                          hints, padding of a graph         attention backend
    staging: views of one tensor    the same, where the model runs    embedding, backend, head
    attention backend               caches, metadata, slots           layers

On a device the values of a step travel through one of three page-locked slabs, so a step may be
staged while the one before runs (`fd_dsa.runner.device_step`, `fd_dsa.device.staging`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from fd_dsa.runner.input_batch import InputBatch
from fd_dsa.runner.selections import Selections
from fd_dsa.step import ForwardMeta, StepHints


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
        batch.staged_ids(),
        batch.seq_lens_encoder[:rows],
        batch.seq_lens_decoder[:rows],
        batch.seq_lens_this_time[:rows],
        sampled,
        batch.follows[:rows],
        batch.block_tables[:rows],
    )
