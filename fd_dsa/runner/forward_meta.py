"""What the embedded runner hands to the model for one step, with FastDeploy's field names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fd_dsa.runner.selections import Selections
from fd_dsa.step import ForwardMeta


@dataclass(slots=True)
class RunnerForwardMeta:
    """A step as the runner knows it, and the metadata that the backend hangs on it.

    Made anew every step, as in FastDeploy (docs/design.md, "FastDeploy's contract"), so that one
    code serves both.

    Attributes:
        ids_remove_padding: int64 [num_tokens]; packed token ids.
        seq_lens_encoder, seq_lens_decoder, seq_lens_this_time: int32 [num_rows].
        block_tables: int32 [num_rows, max_blocks_per_seq].
        caches: two tensors a layer, latents and indexer keys.
        attn_backend: the DSAAttentionBackend that all layers call.
        position_ids, slot_mapping, indexer_attn_mask_offsets: as in `fd_dsa_step`.
        fd_dsa_step: the step's metadata; None until `init_attention_metadata`.
        selections: takes what each layer chose; None: nobody asked.
    """

    ids_remove_padding: Any
    seq_lens_encoder: Any
    seq_lens_decoder: Any
    seq_lens_this_time: Any
    block_tables: Any
    caches: list[Any]
    attn_backend: Any
    position_ids: Any = None
    slot_mapping: Any = None
    indexer_attn_mask_offsets: Any = None
    fd_dsa_step: ForwardMeta | None = None
    selections: Selections | None = None
