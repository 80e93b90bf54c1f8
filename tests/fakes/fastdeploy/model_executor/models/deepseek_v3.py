"""DeepSeek-V3.2 and GLM-5 as FastDeploy builds them (`model_executor/models/deepseek_v3.py`).

Attribute and parameter names and the order of the layers' calls are upstream's, as at 8f8e7cf6
(April 2026); what the calls compute is in `layers/`. Names of weights for logs (`prefix`) are not
passed on. The indexer's `forward` is a name alone.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import paddle
from paddle import nn

from fastdeploy import _tree
from fastdeploy.model_executor.graph_optimization.decorator import support_graph_optimization
from fastdeploy.model_executor.layers.attention import Attention
from fastdeploy.model_executor.layers.linear import (
    ColumnParallelLinear,
    KVBatchLinear,
    MergedReplicatedLinear,
    ReplicatedLinear,
    RowParallelLinear,
)
from fastdeploy.model_executor.layers.normalization import LayerNorm, RMSNorm
from fastdeploy.model_executor.layers.rotary_embedding import DeepseekScalingRotaryEmbedding

from .dense import Embedding, Mlp, MoE, load_into
from .model_base import ModelForCasualLM, ModelRegistry

_TREE = _tree.current()
_DSA_MODELS = ("deepseek_v32", "glm_moe_dsa")


class Indexer(nn.Layer):
    """The lightning indexer; its cache is entry 2 * layer_id + 1."""

    def __init__(self, fd_config: Any, layer_id: int, prefix: str = "") -> None:
        super().__init__()
        config = fd_config.model_config
        self.layer_id, self.max_model_len = layer_id, config.max_model_len
        self.index_head_dim, self.index_n_heads = config.index_head_dim, config.index_n_heads
        self.index_topk, self.rope_dim = config.index_topk, config.qk_rope_head_dim
        heads_width = self.index_head_dim * self.index_n_heads
        self.wq_b = ReplicatedLinear(fd_config, config.q_lora_rank, heads_width)
        self.wk = ReplicatedLinear(fd_config, config.hidden_size, self.index_head_dim)
        self.weights_proj = ReplicatedLinear(fd_config, config.hidden_size, self.index_n_heads)
        self.k_norm = LayerNorm(fd_config, self.index_head_dim, 1e-6)
        # upstream never uses them
        self.offsets = paddle.zeros([self.max_model_len], dtype="int32")
        self.lengths = paddle.zeros([self.max_model_len], dtype="int32")

    def forward(self, forward_meta: Any, hidden_states: Any, qr: Any, rotary_emb: Any) -> Any:
        """int32 [num_tokens, index_topk]; the double has none of DeepGEMM's kernels."""


class DeepseekV32DSAAttention(nn.Layer):
    """MLA in absorbed form over what the indexer selects."""

    def __init__(self, fd_config: Any, layer_id: int, prefix: str = "") -> None:
        super().__init__()
        config = fd_config.model_config
        self.layer_id = layer_id
        self.num_attention_heads = config.num_attention_heads
        tp_size = fd_config.parallel_config.tensor_parallel_size
        self.num_attention_heads_tp = self.num_attention_heads // tp_size
        self.hidden_size = config.hidden_size
        self.qk_nope_head_dim, self.qk_rope_head_dim = (
            config.qk_nope_head_dim,
            config.qk_rope_head_dim,
        )
        self.qk_head_dim = self.qk_nope_head_dim + self.qk_rope_head_dim
        self.v_head_dim, self.q_lora_rank = config.v_head_dim, config.q_lora_rank
        self.kv_lora_rank, self.rms_norm_eps = config.kv_lora_rank, config.rms_norm_eps
        self._make_projections(fd_config)
        self.rotary_emb = self._rotary(config)
        self.indexer_rotary_emb = self._rotary(config)
        self.indexer = _indexer_class()(fd_config=fd_config, layer_id=layer_id, prefix=prefix)
        self.dsa_attn = Attention(fd_config=fd_config, layer_id=layer_id)

    def _make_projections(self, fd_config: Any) -> None:
        heads, rank, eps = self.num_attention_heads, self.kv_lora_rank, self.rms_norm_eps
        hidden, nope, v = self.hidden_size, self.qk_nope_head_dim, self.v_head_dim
        self.qkv_a_proj_with_mqa = MergedReplicatedLinear(
            fd_config, hidden, self.q_lora_rank + rank + self.qk_rope_head_dim
        )
        self.q_a_layernorm = RMSNorm(fd_config, self.q_lora_rank, eps)
        self.kv_a_layernorm = RMSNorm(fd_config, rank, eps)
        self.q_b_proj = ColumnParallelLinear(fd_config, self.q_lora_rank, heads * self.qk_head_dim)
        self.kv_b_proj = ColumnParallelLinear(fd_config, rank, heads * (nope + v))
        self.o_proj = RowParallelLinear(fd_config, heads * v, hidden)
        self.kv_b_proj_bmm = KVBatchLinear(self.kv_b_proj, rank, heads, nope, v)

    def _rotary(self, config: Any) -> DeepseekScalingRotaryEmbedding:
        """YaRN where the model has a factor; GLM keeps its base in rope_parameters."""
        base = config.rope_theta
        if config.model_type == "glm_moe_dsa":
            base = config.rope_parameters["rope_theta"]
        scaling = config.rope_scaling or {}
        if "factor" not in scaling:
            return DeepseekScalingRotaryEmbedding(
                self.qk_rope_head_dim, config.max_model_len, base, 1.0
            )
        names = ("beta_fast", "beta_slow", "mscale", "mscale_all_dim")
        return DeepseekScalingRotaryEmbedding(
            self.qk_rope_head_dim,
            scaling["original_max_position_embeddings"],
            base,
            scaling["factor"],
            **{name: scaling[name] for name in names if name in scaling},
        )

    def forward(self, forward_meta: Any, hidden_states: Any) -> Any:
        """[num_tokens, hidden] of the same, through FastDeploy's own backend."""
        return self.dsa_attn(
            q=self.qkv_a_proj_with_mqa(hidden_states),
            v=self.indexer(forward_meta, hidden_states, None, rotary_emb=self.indexer_rotary_emb),
            forward_meta=forward_meta,
        )


def _indexer_class() -> type[nn.Layer]:
    """The module's indexer at this moment, under the name that the tree has for it."""
    return globals()["DSAIndexer" if _TREE.defect == "missing_symbol" else "Indexer"]


class DeepSeekV3DecoderLayer(nn.Layer):
    """Norm, attention, norm, MLP; the class of the attention is looked up when it is made."""

    def __init__(self, fd_config: Any, prefix: str = "") -> None:
        super().__init__()
        config = fd_config.model_config
        layer_id = self.layer_id = int(prefix.rpartition(".")[2])
        if config.model_type not in _DSA_MODELS:
            raise NotImplementedError(f"the double has no layer for {config.model_type!r} here")
        self.self_attn = DeepseekV32DSAAttention(
            fd_config=fd_config, layer_id=layer_id, prefix=f"{prefix}.self_attn"
        )
        if config.n_routed_experts and layer_id >= config.first_k_dense_replace:
            self.mlp: nn.Layer = MoE(fd_config)
        else:
            self.mlp = Mlp(fd_config, config.intermediate_size)
        hidden, eps = config.hidden_size, config.rms_norm_eps
        self.input_layernorm = RMSNorm(fd_config, hidden, eps)
        self.post_attention_layernorm = RMSNorm(fd_config, hidden, eps)

    def forward(self, forward_meta: Any, hidden_states: Any, residual: Any) -> tuple[Any, Any]:
        """The MLP's output and the sum that the next norm adds it to."""
        if hidden_states.shape[0] > 0:
            hidden_states, residual = self.input_layernorm(
                hidden_states, residual_input=residual, forward_meta=forward_meta
            )
            hidden_states = self.self_attn(forward_meta, hidden_states)
            hidden_states, residual = self.post_attention_layernorm(hidden_states, residual)
        else:
            residual = hidden_states
        return self.mlp(hidden_states), residual


@support_graph_optimization
class DeepSeekV3Model(nn.Layer):
    """Embedding, layers, last norm: what a graph holds."""

    def __init__(self, fd_config: Any) -> None:
        super().__init__()
        config = fd_config.model_config
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        names = (f"deepseek_v3.layers.{i}" for i in range(config.num_hidden_layers))
        self.layers = nn.LayerList([DeepSeekV3DecoderLayer(fd_config, name) for name in names])
        self.norm = RMSNorm(fd_config, config.hidden_size, config.rms_norm_eps)

    def forward(self, ids_remove_padding: Any, forward_meta: Any) -> Any:
        """[num_tokens, hidden] of int64 [num_tokens], normed."""
        hidden_states = self.embed_tokens(ids_remove_padding)
        residual = None
        for layer in self.layers:
            hidden_states, residual = layer(forward_meta, hidden_states, residual)
        return self.norm(hidden_states, residual, forward_meta=forward_meta)[0]


@ModelRegistry.register_model_class(architecture="DeepseekV3ForCausalLM", module_name="deepseek_v3")
class DeepseekV3ForCausalLM(ModelForCasualLM):
    """The whole model."""

    def __init__(self, fd_config: Any) -> None:
        super().__init__(fd_config)
        config = fd_config.model_config
        self.model = DeepSeekV3Model(fd_config)
        self.ori_vocab_size = config.ori_vocab_size
        self.lm_head = RowParallelLinear(fd_config, config.hidden_size, config.vocab_size)
        self.eval()

    def load_weights(self, weights: Iterable[tuple[str, np.ndarray]]) -> None:
        """Fill the parameters from a checkpoint's names and float32 arrays."""
        load_into(self, weights)

    if _TREE.defect == "before_7367":

        def pre_process(self, forward_meta: Any) -> None:
            """Positions, which before #7367 the model makes."""

    def forward(self, inputs: dict[str, Any], forward_meta: Any) -> Any:
        """Hidden states of the step, [num_tokens, hidden]."""
        ids = inputs["ids_remove_padding"]
        return self.model(ids_remove_padding=ids, forward_meta=forward_meta)

    def clear_graph_opt_backend(self) -> None:
        """Forget the graphs."""
        self.model.clear_graph_opt_backend()

    def compute_logits(self, hidden_states: Any, forward_meta: Any = None) -> Any:
        """float32 [n, ori_vocab_size] of [n, hidden]."""
        return self.lm_head(hidden_states).astype("float32")[:, : self.ori_vocab_size]

    def empty_input_forward(self, forward_meta: Any) -> None:
        """Run the MLPs on one token of zeros, as an idle expert-parallel rank does."""
        hidden = paddle.zeros([1, self.fd_config.model_config.hidden_size])
        for layer in self.model.layers:
            layer.mlp(hidden)


@ModelRegistry.register_model_class(
    architecture="DeepseekV32ForCausalLM", module_name="deepseek_v3"
)
class DeepseekV32ForCausalLM(DeepseekV3ForCausalLM):
    """DeepSeek-V3.2."""


@ModelRegistry.register_model_class(architecture="GlmMoeDsaForCausalLM", module_name="deepseek_v3")
class GlmMoeDsaForCausalLM(DeepseekV32ForCausalLM):
    """GLM-5."""


if _TREE.defect == "missing_symbol":
    DSAIndexer = Indexer
    del Indexer
