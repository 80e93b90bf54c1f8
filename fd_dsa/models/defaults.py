"""Defaults of the fields of config.json, by kind of model."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelDefaults:
    """Defaults of one `model_type`, under the names of config.json.

    No field has a default here. A family that leaves one out stops the import with its name, so
    it never gets another family's value.

    Attributes:
        shares_selections: True if a layer may use the selection of an earlier layer's indexer. No
            field of config.json.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    moe_intermediate_size: int
    num_hidden_layers: int
    first_k_dense_replace: int
    num_attention_heads: int
    n_shared_experts: int
    n_routed_experts: int
    num_experts_per_tok: int
    n_group: int
    topk_group: int
    routed_scaling_factor: float
    norm_topk_prob: bool
    q_lora_rank: int
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    index_n_heads: int
    index_head_dim: int
    index_topk: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    indexer_rope_interleave: bool
    shares_selections: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class DeepseekV4Defaults:
    """Numbers that config.json of a DeepSeek-V4 model may omit, under their names there.

    Widths count elements. `sliding_window` and `max_position_embeddings` count tokens, and
    `index_topk` counts CSA entries. `registry.FAMILIES` has the values.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    moe_intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    head_dim: int
    q_lora_rank: int
    o_groups: int
    o_lora_rank: int
    sliding_window: int
    index_n_heads: int
    index_head_dim: int
    index_topk: int
    num_experts_per_tok: int
    n_routed_experts: int
    max_position_embeddings: int
    hc_mult: int
    hc_sinkhorn_iters: int
    routed_scaling_factor: float
    swiglu_limit: float
    rms_norm_eps: float
    hc_eps: float
