"""Parts of FastDeploy's classes that the plug-in reads, as types.

The type checker does not read FastDeploy. Trees differ, so the plug-in looks up by name the
attributes that only some trees have. `tree_checks.py` checks a tree for the attributes of the
classes that its `Known` names.

Source: FastDeploy's `config.py`, `model_executor/forward_meta.py`, `models/deepseek_v3.py` and
`model_executor/layers/{linear,normalization,rotary_embedding}.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
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
    # FastDeploy's method of quantization, from which the plug-in reads the size of a block
    quant_method: Any

    def __call__(self, x: Tensor) -> Tensor: ...


class BlockFp8Linear(Linear, Protocol):
    """Linear layer with block-FP8 weights."""

    weight_scale_inv: Tensor


class RMSNorm(Protocol):
    """RMSNorm with a weight. A call returns the normed values, and the sum of a fused addition."""

    weight: Tensor
    eps: float

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor | None]: ...


class LayerNorm(Protocol):
    """LayerNorm with weight and bias."""

    weight: Tensor
    bias: Tensor


class RotaryEmbedding(Protocol):
    """Rotary embedding with its table."""

    cos_sin_cache: Tensor


class Indexer:
    """FastDeploy's Indexer, from which the plug-in's derives."""

    layer_id: int
    index_n_heads: int
    index_head_dim: int
    wk: Linear
    weights_proj: Linear
    wq_b: Linear
    k_norm: LayerNorm


class AdoptedIndexer(Indexer):
    """Indexer after `PluginIndexer.adopt`."""

    rope_interleave: bool


class Attention:
    """FastDeploy's DeepseekV32DSAAttention, from which the plug-in's derives."""

    indexer: Any
    num_attention_heads_tp: int
    kv_lora_rank: int
    q_lora_rank: int
    qk_head_dim: int
    qk_nope_head_dim: int
    v_head_dim: int
    qkv_a_proj_with_mqa: Linear
    q_b_proj: Linear
    o_proj: Linear
    kv_b_proj_bmm: Callable[..., Tensor]
    q_a_layernorm: RMSNorm
    kv_a_layernorm: RMSNorm
    rotary_emb: RotaryEmbedding
    indexer_rotary_emb: RotaryEmbedding


class AttentionBackend:
    """FastDeploy's DSAAttentionBackend, from which the plug-in's derives."""

    num_heads: int
    attn_softmax_scale: float
    block_size: int
    max_seq_len: int
    num_layers: int
    num_layers_draft_model: int
    start_layer_index: int
    rank: int
    device_id: int | str
    pd_disaggregation_mode: str
    keep_pd_step_flag: bool

    def __init__(self, fd_config: FDConfig, *args: object, **kwargs: object) -> None: ...
