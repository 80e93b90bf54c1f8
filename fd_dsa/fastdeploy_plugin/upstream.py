"""Parts of FastDeploy's objects that the plug-in reads, as types.

FastDeploy is not read by the type checker, and trees differ: attributes that only some trees have
are looked up by name where they are used.

Source: FastDeploy's `config.py`, `model_executor/forward_meta.py`, `models/deepseek_v3.py` and
`model_executor/layers/{linear,normalization,rotary_embedding}.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from fd_dsa.step import ForwardMeta as CoreMeta
from fd_dsa.tensor import Tensor


class ModelConfig(Protocol):
    """FastDeploy's configuration of a model."""

    model_type: str
    num_hidden_layers: int
    max_model_len: int
    kv_lora_rank: int
    qk_rope_head_dim: int
    index_head_dim: int
    index_n_heads: int
    index_topk: int


class CacheConfig(Protocol):
    """FastDeploy's configuration of the caches."""

    block_size: int


class SpeculativeConfig(Protocol):
    """FastDeploy's configuration of drafts."""

    model_type: str
    method: str | None
    num_speculative_tokens: int | None


class SchedulerConfig(Protocol):
    """FastDeploy's limits of a step."""

    max_num_seqs: int
    max_num_batched_tokens: int


class FDConfig(Protocol):
    """FastDeploy's configuration of a worker."""

    model_config: ModelConfig
    cache_config: CacheConfig
    speculative_config: SpeculativeConfig
    scheduler_config: SchedulerConfig
    graph_opt_config: object

    def get_max_chunk_tokens(self) -> int: ...


class ForwardMeta(Protocol):
    """FastDeploy's record of a step, which every layer is called with."""

    attn_backend: object
    ids_remove_padding: Tensor
    seq_lens_encoder: Tensor
    seq_lens_decoder: Tensor
    seq_lens_this_time: Tensor
    block_tables: Tensor
    position_ids: Tensor
    slot_mapping: Tensor
    indexer_attn_mask_offsets: Tensor | None
    caches: Sequence[Tensor]
    fd_dsa_step: CoreMeta | None


class AttentionRecord(Protocol):
    """FastDeploy's own metadata of a step (`DSAAttentionMetadata`)."""

    block_tables: Tensor
    rotary_embs: object
    slot_mapping: Tensor
    kv_signal_data_list: list[object]
    kv_signal_metadata: object


class Linear(Protocol):
    """Linear layer, plain or quantised."""

    weight: Tensor
    # FastDeploy's method of quantization, of which the size of a block is read
    quant_method: Any

    def __call__(self, x: Tensor) -> Tensor: ...


class BlockFp8Linear(Linear, Protocol):
    """Linear layer with block-FP8 weights."""

    weight_scale_inv: Tensor


class Norm(Protocol):
    """Norm with a weight; a LayerNorm has a bias too."""

    weight: Tensor
    bias: Tensor


class Indexer(Protocol):
    """Indexer of a layer, after `PluginIndexer.adopt`."""

    layer_id: int
    wk: Linear
    weights_proj: Linear
    k_norm: Norm
    rope_interleave: bool


class RotaryEmbedding(Protocol):
    """Rotary embedding with its table."""

    cos_sin_cache: Tensor


class AttentionBackend(Protocol):
    """FastDeploy's DSA backend, as far as disaggregation is concerned."""

    num_layers: int
    num_layers_draft_model: int
    start_layer_index: int
    rank: int
    device_id: int | str
    pd_disaggregation_mode: str
    keep_pd_step_flag: bool
