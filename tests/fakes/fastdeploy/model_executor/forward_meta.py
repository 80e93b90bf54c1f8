"""ForwardMeta: what a step's layers are given (`model_executor/forward_meta.py`).

A new object every step, with the runner's buffers in it; attributes that no tree knows may be
set, and one that was never set reads as None. Fields as at 8f8e7cf6, but for those of other models
and kernels; `attn_backends` as the runner at 39d329f2 sets it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass
class ForwardMeta:
    """Tensors and flags of one step. B rows, T launched tokens, S slots, M table columns."""

    # int64 [T]; its length is the number of tokens that are launched
    ids_remove_padding: Any
    rotary_embs: Any = None
    attn_backend: Any = None
    is_dummy_or_profile_run: bool = False
    # int32 on the host; the shared buffer, with the values of the step before until it is filled
    max_len_tensor_cpu: Any = None
    # int32 [B]
    seq_lens_encoder: Any = None
    seq_lens_decoder: Any = None
    seq_lens_this_time: Any = None
    # int32 [T], -1 in the memory past it
    batch_id_per_token: Any = None
    # int32 [B + 1]
    cu_seqlens_q: Any = None
    cu_seqlens_k: Any = None
    # int32 [B, M], -1 unused
    block_tables: Any = None
    # uint8, two a layer; None before initialize_kv_cache
    caches: Any = None
    position_ids: Any = None
    # int64 [T]
    slot_mapping: Any = None
    # int32 [2T], by trees with #7598
    indexer_attn_mask_offsets: Any = None
    # a backend for each layer (#8041)
    attn_backends: Any = None
    step_use_cudagraph: bool = False
    is_zero_size: bool = False
    exist_prefill: bool = False

    def clear_caches(self) -> None:
        """Drop the caches; they are about to be freed."""
        if self.caches:
            del self.caches

    def __getattr__(self, name: str) -> Any:
        """None for what was never set, which is then set: `hasattr` is always true."""
        # copying and pickling ask for methods that no dataclass has
        if name.startswith("__"):
            raise AttributeError(name)
        setattr(self, name, None)
        return None
