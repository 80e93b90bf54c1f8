"""What the backend is made for, and what a runner tells it of a step."""

from __future__ import annotations

from dataclasses import dataclass

from fd_dsa.attention.cache_layout import CacheLayout


@dataclass(frozen=True, slots=True)
class DSABackendConfig:
    """What the backend must know of the model and the engine; lengths in tokens."""

    num_heads: int
    index_n_heads: int
    index_topk: int
    softmax_scale: float
    cache_layout: CacheLayout
    max_num_seqs: int
    max_num_tokens: int
    max_blocks_per_seq: int
    num_blocks: int | None = None


@dataclass(frozen=True, slots=True)
class StepHints:
    """What only the runner knows of a step; see StepMetadataBuilder.build."""

    num_tokens: int
    num_prefill_tokens: int
    max_seqlen_k: int
    num_padded_tokens: int | None = None
