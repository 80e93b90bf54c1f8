"""Defaults of the fields of config.json, by kind of model."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class FamilyDefaults:
    """Defaults that every family has, under the names of config.json.

    No field of a family has a default here. A family that leaves one out stops the import with its
    name, so it never gets another family's value.

    Widths count elements. `max_position_embeddings` counts tokens, and `index_topk` counts the keys
    that an indexer selects.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    moe_intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    n_routed_experts: int
    num_experts_per_tok: int
    routed_scaling_factor: float
    q_lora_rank: int
    index_n_heads: int
    index_head_dim: int
    index_topk: int
    max_position_embeddings: int
    rms_norm_eps: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelDefaults(FamilyDefaults):
    """Further defaults of a model with the layers of DeepSeek-V3.2.

    Attributes:
        shares_selections: True if a layer may use the selection of an earlier layer's indexer. No
            field of config.json.
    """

    intermediate_size: int
    first_k_dense_replace: int
    n_shared_experts: int
    n_group: int
    topk_group: int
    norm_topk_prob: bool
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    rope_theta: float
    indexer_rope_interleave: bool
    shares_selections: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class DeepseekV4Defaults(FamilyDefaults):
    """Further defaults of a DeepSeek-V4 model, whose `index_topk` counts CSA entries."""

    head_dim: int
    o_groups: int
    o_lora_rank: int
    sliding_window: int
    hc_mult: int
    hc_sinkhorn_iters: int
    swiglu_limit: float
    hc_eps: float
