"""Names and shapes of the tensors that a model's checkpoint must hold.

Source: Hugging Face transformers 5.23, models/deepseek_v32 and models/glm_moe_dsa.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from functools import singledispatch

from fd_dsa.models.config import ModelConfig
from fd_dsa.models.dequantize import BLOCK

LM_HEAD = "lm_head.weight"
EMBEDDING = "model.embed_tokens.weight"
MTP_EMBEDDING = "embed_tokens.weight"
MTP_HEAD = "shared_head.head.weight"


@dataclass(frozen=True, slots=True)
class ExpectedTensor:
    """One tensor of a checkpoint.

    Attributes:
        shape: as stored; weights of GEMMs are [out, in].
        quantisable: may be stored as FP8 with a `_scale_inv` companion.
        ids_below: int64 numbers from 0 to below this one; 0: floating-point values.
    """

    shape: tuple[int, ...]
    quantisable: bool = False
    ids_below: int = 0

    @property
    def num_elements(self) -> int:
        return math.prod(self.shape)


@singledispatch
def expected_tensors(config: ModelConfig) -> dict[str, ExpectedTensor]:
    """All tensors of a model, by their Hugging Face names, in the order of its layers.

    The layer for multi-token prediction has some where `config` says that it is loaded. Experts
    are listed one by one, as checkpoints store them. A layer whose indexer is shared has no
    indexer tensors; a model whose head is tied to the embedding has no `lm_head.weight`.
    Models with a configuration class of their own register theirs.
    """
    norm = ExpectedTensor((config.hidden_size,))
    embedding = ExpectedTensor((config.vocab_size, config.hidden_size))
    tensors = {EMBEDDING: embedding}
    for layer in range(config.num_hidden_layers):
        parts = _layer(config, layer)
        tensors |= {f"model.layers.{layer}.{name}": one for name, one in parts.items()}
    tensors["model.norm.weight"] = norm
    if not config.tie_word_embeddings:
        tensors[LM_HEAD] = ExpectedTensor((config.head_rows, config.hidden_size))
    if config.mtp is not None:
        parts = _mtp(config) | _layer(config.with_mtp_layer, config.num_hidden_layers)
        tensors |= {mtp_name(config, name): one for name, one in parts.items()}
    return tensors


def mtp_name(config: ModelConfig, name: str) -> str:
    """Full name of a tensor of the layer for multi-token prediction."""
    return f"model.layers.{config.num_hidden_layers}.{name}"


def down_projections(config: ModelConfig, prefix: str, fp8: Collection[str]) -> dict[str, int]:
    """Names and rows of the weights of the first GEMM of an attention, in their order.

    The indexer's wk is one of them where all are FP8 and end at blocks: between q_a_proj and
    kv_a_proj_with_mqa, which may end within one. Biases are those of the two alone.

    Args:
        prefix: of the names.
        fp8: names of the tensors that are held as FP8 where their places allow it.
    """
    rows = {
        "q_a_proj": config.q_lora_rank,
        "indexer.wk": config.index_head_dim,
        "kv_a_proj_with_mqa": config.kv_lora_rank + config.qk_rope_head_dim,
    }
    parts = {f"{prefix}{name}.weight": count for name, count in rows.items()}
    ends_at_blocks = config.q_lora_rank % BLOCK == config.index_head_dim % BLOCK == 0
    if config.attention_bias or not ends_at_blocks or not all(name in fp8 for name in parts):
        del parts[f"{prefix}indexer.wk.weight"]
    return parts


def _mtp(config: ModelConfig) -> dict[str, ExpectedTensor]:
    """What a layer for multi-token prediction has beside a decoder layer; never FP8.

    Source: the index of DeepSeek-V3.2's and GLM-5's checkpoints.
    """
    hidden = config.hidden_size
    norm, table = ExpectedTensor((hidden,)), ExpectedTensor((config.vocab_size, hidden))
    tensors = {name: norm for name in ("enorm.weight", "hnorm.weight", "shared_head.norm.weight")}
    tensors["eh_proj.weight"] = ExpectedTensor((hidden, 2 * hidden))
    if config.mtp is not None and config.mtp.has_embedding:
        tensors[MTP_EMBEDDING] = table
    if config.mtp is not None and config.mtp.has_head:
        tensors[MTP_HEAD] = table
    return tensors


def _layer(config: ModelConfig, layer: int) -> dict[str, ExpectedTensor]:
    norm = ExpectedTensor((config.hidden_size,))
    parts = {"input_layernorm.weight": norm, "post_attention_layernorm.weight": norm}
    parts |= _attention(config)
    if config.indexer_types[layer] == "full":
        parts |= _indexer(config)
    if config.mlp_layer_types[layer] == "dense":
        return parts | _gated("mlp.", config.hidden_size, config.intermediate_size)
    return parts | _experts(config)


def _attention(config: ModelConfig) -> dict[str, ExpectedTensor]:
    """MLA of a layer, without its indexer."""
    heads, latent = config.num_attention_heads, config.kv_lora_rank
    kv_a_rows = latent + config.qk_rope_head_dim
    kv_b_rows = heads * (config.qk_nope_head_dim + config.v_head_dim)
    weights = {
        "q_a_proj": (config.q_lora_rank, config.hidden_size),
        "q_b_proj": (heads * config.qk_head_dim, config.q_lora_rank),
        "kv_a_proj_with_mqa": (kv_a_rows, config.hidden_size),
        "kv_b_proj": (kv_b_rows, latent),
        "o_proj": (config.hidden_size, heads * config.v_head_dim),
    }
    tensors = _weights("self_attn.", weights)
    tensors["self_attn.q_a_layernorm.weight"] = ExpectedTensor((config.q_lora_rank,))
    tensors["self_attn.kv_a_layernorm.weight"] = ExpectedTensor((latent,))
    if config.attention_bias:
        for name in ("q_a_proj", "kv_a_proj_with_mqa", "o_proj"):
            tensors[f"self_attn.{name}.bias"] = ExpectedTensor(weights[name][:1])
    return tensors


def _indexer(config: ModelConfig) -> dict[str, ExpectedTensor]:
    heads, width = config.index_n_heads, config.index_head_dim
    prefix = "self_attn.indexer."
    tensors = _weights(
        prefix,
        {"wq_b": (heads * width, config.q_lora_rank), "wk": (width, config.hidden_size)},
    )
    tensors[f"{prefix}k_norm.weight"] = ExpectedTensor((width,))
    tensors[f"{prefix}k_norm.bias"] = ExpectedTensor((width,))
    tensors[f"{prefix}weights_proj.weight"] = ExpectedTensor((heads, config.hidden_size))
    return tensors


def _experts(config: ModelConfig) -> dict[str, ExpectedTensor]:
    num_experts, width = config.n_routed_experts, config.moe_intermediate_size
    tensors = {
        "mlp.gate.weight": ExpectedTensor((num_experts, config.hidden_size)),
        "mlp.gate.e_score_correction_bias": ExpectedTensor((num_experts,)),
    }
    tensors |= _gated("mlp.shared_experts.", config.hidden_size, width * config.n_shared_experts)
    for expert in range(num_experts):
        tensors |= _gated(f"mlp.experts.{expert}.", config.hidden_size, width)
    return tensors


def _gated(prefix: str, hidden_size: int, width: int) -> dict[str, ExpectedTensor]:
    up, down = (width, hidden_size), (hidden_size, width)
    return _weights(prefix, {"gate_proj": up, "up_proj": up, "down_proj": down})


def _weights(prefix: str, shapes: dict[str, tuple[int, int]]) -> dict[str, ExpectedTensor]:
    """Weights of GEMMs, which may be quantised."""
    return {
        f"{prefix}{name}.weight": ExpectedTensor(shape, quantisable=True)
        for name, shape in shapes.items()
    }
