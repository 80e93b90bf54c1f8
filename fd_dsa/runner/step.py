"""The record of a step that layers are called with.

    maker of a field              field                             reader
    engine, by InputBatch.arrays  ids, token counts, tables         staging
    engine, by SamplingInputs     sampling                          staging
    staging: views of one tensor  the same, on the model's device   embedding, backend, head
    attention backend             caches, metadata, slots           layers
    model                         logits, hidden_states             sampler, MTP layer

On a device the values of a step travel through one of three page-locked slabs. So a step may be
staged while the one before runs (`fd_dsa.runner.device_steps`, `fd_dsa.device.staging`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fd_dsa.attention.protocol import AttentionBackend
from fd_dsa.runner.input_batch import NO_SAMPLING, SamplingInputs
from fd_dsa.runner.selections import Selections
from fd_dsa.step import ForwardMeta
from fd_dsa.tensor import StepArray


@dataclass(slots=True)
class Step:
    """Inputs of one step on the model's device, its metadata, and its results.

    Layers are called with it as `forward_meta`. Every step has a new one, as in FastDeploy
    (docs/concepts/fastdeploy-contract.md). A row has one token and its drafts, or a prefill chunk.

    Attributes:
        token_ids, num_chunk_tokens, num_computed_tokens, num_scheduled_tokens, sampled,
            pending_source, snapshot_slots, block_tables: see StepInputs.
        caches: caches of the attention backend; for DSA two tensors a layer, latents and indexer
            keys.
        attn_backend: attention backend that all layers call.
        sampling: how a device samples its tokens; empty if the host samples.
        position_ids, slot_mapping, indexer_attn_mask_offsets: as in `fd_dsa_step`.
        fd_dsa_step: metadata of the step; None until the backend has built it.
        selections: collector of each layer's selection, None unless a request asks for them.
        logits: float32 [num_rows, vocab_size], from a graph followed by rows of padding. None if no
            token is sampled, or until the model has run.
        hidden_states: [num_tokens, width], results of the model, which a layer for multi-token
            prediction reads; None without such a layer.
    """

    token_ids: StepArray
    num_chunk_tokens: StepArray
    num_computed_tokens: StepArray
    num_scheduled_tokens: StepArray
    sampled: StepArray
    pending_source: StepArray
    snapshot_slots: StepArray
    block_tables: StepArray
    caches: Sequence[Any]
    attn_backend: AttentionBackend
    sampling: SamplingInputs = NO_SAMPLING
    position_ids: StepArray = None
    slot_mapping: StepArray = None
    indexer_attn_mask_offsets: StepArray = None
    fd_dsa_step: ForwardMeta | None = None
    selections: Selections | None = None
    logits: StepArray | None = None
    hidden_states: StepArray | None = None
