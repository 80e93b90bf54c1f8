"""The record of a step that layers are called with.

    maker of a field              field                             reader
    engine, by InputBatch.arrays  ids, lengths, tables, sampled     staging
    engine, by SamplingInputs     sampling                          staging
    runner                        hints, padding of a graph         attention backend
    staging: views of one tensor  the same, where the model runs    embedding, backend, head
    attention backend             caches, metadata, slots           layers
    model                         logits, hidden_states             sampler, MTP layer

On a device the values of a step travel through one of three page-locked slabs. So a step may be
staged while the one before runs (`fd_dsa.runner.device_step`, `fd_dsa.device.staging`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fd_dsa.attention.protocol import AttentionBackend, HostLengths
from fd_dsa.runner.input_batch import NO_SAMPLING, SamplingInputs
from fd_dsa.runner.selections import Selections
from fd_dsa.step import ForwardMeta, StepHints
from fd_dsa.tensor import StepArray as Array


@dataclass(slots=True)
class Step:
    """Inputs of one step where the model runs, its metadata, and its results.

    Layers are called with it as `forward_meta`. Every step has a new one, as in FastDeploy
    (docs/design.md, "FastDeploy's contract"). A row has one token and its drafts, or a prefill
    chunk. B = number of rows of the step.

    Attributes:
        hints: counts of the step that the host knows. The longest row is an upper bound.
        ids_remove_padding: int64, on a device int32, [num_tokens]; packed token ids, on a device
            followed by zeros up to the padded number of tokens.
        seq_lens_encoder, seq_lens_decoder, seq_lens_this_time: int32 [B].
        sampled: int64, on a device int32, [n]; flat tokens whose logits are asked for.
        follows: int32 [B]; see InputBatch.
        block_tables: int32 [B, max_blocks_per_seq].
        caches: caches of the attention backend; for DSA two tensors a layer, latents and indexer
            keys.
        attn_backend: attention backend that all layers call.
        sampling: how its tokens are sampled, on a device; empty if the host samples.
        position_ids, slot_mapping, indexer_attn_mask_offsets: as in `fd_dsa_step`.
        fd_dsa_step: metadata of the step; None until `build_metadata`.
        selections: collector of each layer's selection, None unless a request asks for them.
        host_lengths: the three lengths in host memory.
        logits: float32 [num_rows, vocab_size] where the model runs; in a graph followed by rows of
            padding. None if no token is sampled, or until the model has run.
        hidden_states: [num_tokens, hidden_size], normed, which a layer for multi-token prediction
            reads; None without such a layer.
    """

    hints: StepHints
    ids_remove_padding: Array
    seq_lens_encoder: Array
    seq_lens_decoder: Array
    seq_lens_this_time: Array
    sampled: Array
    follows: Array
    block_tables: Array
    caches: Sequence[Any]
    attn_backend: AttentionBackend
    sampling: SamplingInputs = NO_SAMPLING
    position_ids: Array = None
    slot_mapping: Array = None
    indexer_attn_mask_offsets: Array = None
    fd_dsa_step: ForwardMeta | None = None
    selections: Selections | None = None
    host_lengths: HostLengths | None = None
    logits: Array | None = None
    hidden_states: Array | None = None

    def build_metadata(self) -> None:
        """Build the metadata of the step by its attention backend."""
        self.attn_backend.init_attention_metadata(self, self.hints, self.host_lengths)
